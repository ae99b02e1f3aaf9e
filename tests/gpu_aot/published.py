"""The five families at published sizes: what their public `config.json` files say, as far as shapes go."""

from __future__ import annotations

from typing import Any

from hybrimoe_jax.bench.random_models import DEEPSEEK_V2_LITE

_COMMON: dict[str, Any] = {"hidden_act": "silu", "tie_word_embeddings": False}
PUBLISHED: dict[str, dict[str, Any]] = {
    "DeepSeek-V2-Lite": DEEPSEEK_V2_LITE,
    "Qwen3-30B-A3B": _COMMON
    | dict(
        model_type="qwen3_moe",
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=40960,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        rms_norm_eps=1e-6,
        rope_theta=1e6,
    ),
    "Mixtral-8x7B": _COMMON
    | dict(
        model_type="mixtral",
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        max_position_embeddings=32768,
        intermediate_size=14336,
        num_local_experts=8,
        num_experts_per_tok=2,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
    ),
    "Qwen1.5-MoE-A2.7B": _COMMON
    | dict(
        model_type="qwen2_moe",
        hidden_size=2048,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=151936,
        max_position_embeddings=8192,
        intermediate_size=5632,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
        num_experts=60,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        decoder_sparse_step=1,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
    ),
    "OLMoE-1B-7B": _COMMON
    | dict(
        model_type="olmoe",
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=50304,
        max_position_embeddings=4096,
        intermediate_size=1024,
        num_experts=64,
        num_experts_per_tok=8,
        norm_topk_prob=False,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        clip_qkv=None,
    ),
}
