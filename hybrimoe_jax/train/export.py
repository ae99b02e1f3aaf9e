"""A trained model as a Hugging Face folder, and both kinds of folder back.

`transformers` opens it as any Qwen2-MoE checkpoint.

Weights are bfloat16 under the per-expert checkpoint names (`model.layers.0.mlp.experts.3.gate_proj.weight`), which is
also what `python -m hybrimoe_jax.convert` reads.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tokenizers
from safetensors.numpy import load_file, save_file

from hybrimoe_jax.checkpoint.reader import open_checkpoint
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.files import read_json
from hybrimoe_jax.formats.packing import plain_expert, plain_matrix
from hybrimoe_jax.models.config import ModelConfig
from hybrimoe_jax.models.registry import parse_config
from hybrimoe_jax.models.target import default_device
from hybrimoe_jax.train.loop import Params
from hybrimoe_jax.train.tokens import END_OF_TEXT


def raw_config(tokenizer: tokenizers.Tokenizer, shape: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of a model of `shape` (its own keys win) with this tokenizer's vocabulary and end of text."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "vocab_size": tokenizer.get_vocab_size(),
        "bos_token_id": end,
        "eos_token_id": end,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_dropout": 0.0,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "use_cache": True,
        **shape,
    }


def write_hf(
    folder: Path,
    raw: Mapping[str, Any],
    params: Params,
    tokenizer: tokenizers.Tokenizer,
    frequencies: Sequence[Sequence[int]] | None = None,
) -> None:
    """Writes the folder beside itself and renames it; one that is there is replaced.

    `frequencies` [MoE layer][expert] are activation counts on training text, which static placements go by.
    """
    beside = folder.with_name(folder.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    tensors = dict(params["dense"])
    for layer, entry in params["experts"].items():
        for expert, (gate_up, down) in enumerate(zip(np.asarray(entry["gate_up"]), np.asarray(entry["down"]))):
            gate, up = np.split(gate_up, 2)
            prefix = f"model.layers.{layer}.mlp.experts.{expert}"
            tensors |= {f"{prefix}.{k}_proj.weight": v for k, v in (("gate", gate), ("up", up), ("down", down))}
    shipped = {
        name: np.ascontiguousarray(np.asarray(leaf).astype(ml_dtypes.bfloat16)) for name, leaf in tensors.items()
    }
    save_file(shipped, beside / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(beside / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": raw["max_position_embeddings"],
    }
    generation = {"bos_token_id": raw["bos_token_id"], "eos_token_id": raw["eos_token_id"], "do_sample": False}
    contents = {"config.json": raw, "tokenizer_config.json": settings, "generation_config.json": generation}
    if frequencies is not None:
        contents["expert_frequencies.json"] = {"counts": [list(map(int, layer)) for layer in frequencies]}
    for name, content in contents.items():
        (beside / name).write_text(
            json.dumps(content, indent=None if name.startswith("expert") else 2) + "\n", encoding="utf-8"
        )
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(beside, folder)
    shutil.rmtree(old, ignore_errors=True)


def read_model(folder: Path) -> tuple[ModelConfig, Params, tokenizers.Tokenizer]:
    """A folder of `write_hf`, or that folder converted, with weights in float32. UserError where it is neither."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one that `train` or `convert` has written")
    default_device()
    return read_converted(folder) if (folder / "manifest.json").is_file() else read_hf(folder)


def read_converted(folder: Path) -> tuple[ModelConfig, Params, tokenizers.Tokenizer]:
    """A model folder of `python -m hybrimoe_jax.convert`; of quantised weights the numbers that they stand for."""
    checkpoint = open_checkpoint(folder)
    store = checkpoint.experts(dtype=np.float32)
    experts = {}
    for moe_layer, layer in enumerate(checkpoint.config.moe_layers):
        weights = [plain_expert(store.get(moe_layer, expert)) for expert in range(store.num_experts)]
        experts[str(layer)] = {
            "gate_up": jnp.asarray(np.stack([w.gate_up for w in weights])),
            "down": jnp.asarray(np.stack([w.down for w in weights])),
        }
    dense = {name: jnp.asarray(plain_matrix(leaf)) for name, leaf in checkpoint.dense().items()}
    return checkpoint.config, {"dense": dense, "experts": experts}, read_tokenizer(folder)


def read_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """The folder's `tokenizer.json`; UserError where it has none."""
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: lacks tokenizer.json, without which no text can be evaluated")
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def read_hf(folder: Path) -> tuple[ModelConfig, Params, tokenizers.Tokenizer]:
    """A model folder of `write_hf`."""
    missing = [n for n in ("config.json", "model.safetensors") if not (folder / n).is_file()]
    if missing:
        raise UserError(f"{folder}: lacks {', '.join(missing)}; give a folder that `train` has written")
    config = parse_config(read_json(folder / "config.json"))
    tensors = {name: np.asarray(leaf, np.float32) for name, leaf in load_file(folder / "model.safetensors").items()}
    experts = {}
    for layer in config.moe_layers:
        names = [f"model.layers.{layer}.mlp.experts.{e}" for e in range(config.num_experts)]
        gate, up, down = (
            np.stack([tensors.pop(f"{n}.{k}_proj.weight") for n in names]) for k in ("gate", "up", "down")
        )
        experts[str(layer)] = {"gate_up": jnp.asarray(np.concatenate([gate, up], axis=1)), "down": jnp.asarray(down)}
    dense = {name: jnp.asarray(leaf) for name, leaf in tensors.items()}
    return config, {"dense": dense, "experts": experts}, read_tokenizer(folder)
