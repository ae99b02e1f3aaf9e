"""A tiny checkpoint as a user has it: a Hugging Face folder with a byte-level tokenizer, converted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import tiny
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCAB = 264
"""All 256 bytes and a few words, so that whatever the model says is some text."""
WORDS = ("the", "he", "ing", "and", "Ġthe", "Ġand", "er")
END = "<end>"


def tokenizer() -> Tokenizer:
    """Byte-level: a character of several bytes is several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "th", "an", *WORDS][: VOCAB - 1]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [("t", "h"), ("a", "n")]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END])
    return backend


def write_hf(folder: Path, **generation) -> Path:
    """A Qwen2-MoE folder: `tiny.weights` over a vocabulary of bytes, with a context long enough to be interrupted
    in."""
    tiny.CONFIGS.setdefault(
        "bytes", {**tiny.CONFIGS["qwen2_moe"], "vocab_size": VOCAB, "max_position_embeddings": 4096}
    )
    _, dense, experts = tiny.weights("bytes")
    tensors = {name: array.copy() for name, array in dense.items()}
    tensors["lm_head.weight"][VOCAB - 1] = 0  # the end token: never the best of a random model's choices
    for layer, (gate_up, down) in enumerate(experts):
        width = down.shape[2]
        for expert in range(len(down)):
            name = f"model.layers.{layer}.mlp.experts.{expert}."
            tensors[name + "gate_proj.weight"] = gate_up[expert, :width]
            tensors[name + "up_proj.weight"] = gate_up[expert, width:]
            tensors[name + "down_proj.weight"] = down[expert]
    folder.mkdir(parents=True)
    save_file(
        {name: np.ascontiguousarray(array) for name, array in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps(tiny.CONFIGS["bytes"]))
    (folder / "generation_config.json").write_text(json.dumps(generation))
    tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    return folder


def converted(folder: Path, **generation) -> Path:
    """The same, converted."""
    from hybrimoe_jax.checkpoint.convert import convert

    convert(write_hf(folder / "hf", **generation), folder / "checkpoint")
    return folder / "checkpoint"
