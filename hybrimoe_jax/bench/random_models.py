"""Models of real sizes with random weights, for timing: no download, the same weights for every contender."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from hybrimoe_jax.checkpoint.convert import convert_random
from hybrimoe_jax.checkpoint.export import export_hf

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


def write_random_hf(folder: Path, config: dict = MID) -> Path:
    """Writes the Hugging Face folder (absent so far) of a model of random weights; the same ones each time."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        source = Path(scratch, "config.json")
        source.write_text(json.dumps(config))
        return export_hf(convert_random(source, Path(scratch, "checkpoint")), folder)
