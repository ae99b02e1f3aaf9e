"""A random Hugging Face MoE checkpoint of a real size, for timing: no download, the same weights for every contender.

Routers are spread wider than an initialiser would make them, so that top-k is no near-tie and greedy tokens can be compared.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

MID = dict(
    model_type="qwen2_moe",
    architectures=["Qwen2MoeForCausalLM"],
    hidden_size=1024,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_key_value_heads=4,
    vocab_size=8192,
    max_position_embeddings=2048,
    tie_word_embeddings=False,
    intermediate_size=1024,
    moe_intermediate_size=512,
    shared_expert_intermediate_size=1024,
    num_experts=32,
    num_experts_per_tok=4,
    norm_topk_prob=False,
    decoder_sparse_step=1,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    hidden_act="silu",
    dtype="float32",
)
"""A Qwen2-MoE of 466 million parameters, float32."""

DEEPSEEK_V2_LITE = dict(
    model_type="deepseek_v2",
    hidden_size=2048,
    num_hidden_layers=27,
    num_attention_heads=16,
    num_key_value_heads=16,
    vocab_size=102400,
    max_position_embeddings=163840,
    intermediate_size=10944,
    moe_intermediate_size=1408,
    n_routed_experts=64,
    n_shared_experts=2,
    num_experts_per_tok=6,
    first_k_dense_replace=1,
    kv_lora_rank=512,
    q_lora_rank=None,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    norm_topk_prob=False,
    topk_method="greedy",
    n_group=1,
    topk_group=1,
    routed_scaling_factor=1.0,
    tie_word_embeddings=False,
    rms_norm_eps=1e-6,
    rope_theta=10000,
    hidden_act="silu",
    torch_dtype="bfloat16",
)
"""The shapes of DeepSeek-V2-Lite, 15.7 billion parameters (its published configuration, rotary scaling left out)."""


def write_random_qwen2_moe(folder: Path, config: dict = MID, seed: int = 0) -> Path:
    """Writes `config.json` and `model.safetensors` into `folder` (made if absent) and returns it."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(seed)
    width, heads, kv = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    head = width // heads

    def matrix(out: int, into: int, std: float = 0.02) -> np.ndarray:
        return rng.standard_normal((out, into), np.float32) * np.float32(std)

    tensors = {
        "model.embed_tokens.weight": matrix(config["vocab_size"], width),
        "lm_head.weight": matrix(config["vocab_size"], width),
        "model.norm.weight": 1 + matrix(1, width, 0.1)[0],
    }
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for name, rows in (("q", heads * head), ("k", kv * head), ("v", kv * head)):
            tensors[f"{at}self_attn.{name}_proj.weight"] = matrix(rows, width)
            tensors[f"{at}self_attn.{name}_proj.bias"] = matrix(1, rows, 0.05)[0]
        tensors[f"{at}self_attn.o_proj.weight"] = matrix(width, heads * head)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}{name}.weight"] = 1 + matrix(1, width, 0.1)[0]
        tensors[f"{at}mlp.gate.weight"] = matrix(config["num_experts"], width, 0.3)
        tensors[f"{at}mlp.shared_expert_gate.weight"] = matrix(1, width)
        shared, routed = config["shared_expert_intermediate_size"], config["moe_intermediate_size"]
        names = [("shared_expert", shared), *((f"experts.{e}", routed) for e in range(config["num_experts"]))]
        for name, hidden in names:
            tensors[f"{at}mlp.{name}.gate_proj.weight"] = matrix(hidden, width)
            tensors[f"{at}mlp.{name}.up_proj.weight"] = matrix(hidden, width)
            tensors[f"{at}mlp.{name}.down_proj.weight"] = matrix(width, hidden)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder
