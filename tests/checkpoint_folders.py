"""Tiny Hugging Face folders written without transformers: a Qwen2-MoE of 2 layers, 4 experts, D 16, F 8, names by
hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from hybrimoe_jax.checkpoint.reader import open_checkpoint
from hybrimoe_jax.formats.plain import ExpertWeights

LAYERS, EXPERTS, WIDTH, HIDDEN, VOCAB = 2, 4, 16, 8, 24
CONFIG = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": HIDDEN,
    "shared_expert_intermediate_size": 12,
    "intermediate_size": 20,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
BF16 = ml_dtypes.bfloat16


def expert(layer: int, index: int, part: str) -> str:
    return f"model.layers.{layer}.mlp.experts.{index}.{part}_proj.weight"


def tensors(dtype=np.float32, seed: int = 0, layers: int = LAYERS) -> dict[str, np.ndarray]:
    shapes = {
        "model.embed_tokens.weight": (VOCAB, WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (VOCAB, WIDTH),
    }
    for i in range(layers):
        base = f"model.layers.{i}."
        shapes |= {f"{base}{n}.weight": (WIDTH,) for n in ("input_layernorm", "post_attention_layernorm")}
        for name, rows in (("q", WIDTH), ("k", WIDTH // 2), ("v", WIDTH // 2)):
            shapes[f"{base}self_attn.{name}_proj.weight"] = (rows, WIDTH)
            shapes[f"{base}self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{base}self_attn.o_proj.weight"] = (WIDTH, WIDTH)
        shapes[f"{base}mlp.gate.weight"] = (EXPERTS, WIDTH)
        shapes[f"{base}mlp.shared_expert_gate.weight"] = (1, WIDTH)
        for part in ("gate", "up"):
            shapes[f"{base}mlp.shared_expert.{part}_proj.weight"] = (12, WIDTH)
        shapes[f"{base}mlp.shared_expert.down_proj.weight"] = (WIDTH, 12)
        for e in range(EXPERTS):
            shapes |= {expert(i, e, "gate"): (HIDDEN, WIDTH), expert(i, e, "up"): (HIDDEN, WIDTH)}
            shapes[expert(i, e, "down")] = (WIDTH, HIDDEN)
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def write_hf(folder: Path, weights: dict[str, np.ndarray], shards: int = 1, base=CONFIG, **config) -> Path:
    """A folder as `save_pretrained` lays it out; `shards` > 1 deals the tensors round and writes an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**base, **config}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    if shards == 1:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder
    where = {}
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {n: weights[n] for n in list(weights)[i::shards]}
        save_file(part, folder / name, {"format": "pt"})
        where |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def flip_byte(path: Path, at: int = 3) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(bytes(data))


def expert_file(checkpoint: Path, layer: int, index: int) -> Path:
    """The file that holds one expert of a converted checkpoint."""
    return checkpoint / "pieces" / f"layer_{layer:05d}" / "state" / "experts" / "c" / str(index) / "0" / "0"


def contents(path: Path, dtype=None) -> dict:
    """A converted checkpoint under the Hugging Face names of its (Qwen2) source."""
    checkpoint = open_checkpoint(path)
    out, experts = checkpoint.dense(verify=True), checkpoint.experts(dtype=dtype, verify=True)
    for moe_layer, layer in enumerate(checkpoint.config.moe_layers):
        for e in range(experts.num_experts):
            gate_up, down = cast(ExpertWeights, experts.get(moe_layer, e))
            half = len(gate_up) // 2
            matrices = {"gate": gate_up[:half], "up": gate_up[half:], "down": down}
            out |= {expert(layer, e, part): matrix for part, matrix in matrices.items()}
    return out


def assert_same(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].dtype == array.dtype and np.array_equal(got[name], array), name
