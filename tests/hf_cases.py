"""The configurations of `hf`'s small models: what all share, what each family adds, and the cases by name."""

from __future__ import annotations

from typing import NamedTuple

VOCAB = 96
COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts_per_tok=2,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=None,
    pad_token_id=None,
)
FAMILY = {
    "mixtral": dict(intermediate_size=24, num_local_experts=6, sliding_window=None),
    "qwen2_moe": dict(
        intermediate_size=40,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=32,
        num_experts=6,
        norm_topk_prob=False,
    ),
    "qwen3_moe": dict(intermediate_size=40, moe_intermediate_size=24, num_experts=6, head_dim=16, norm_topk_prob=True),
    "olmoe": dict(intermediate_size=24, num_experts=8, num_key_value_heads=4, num_experts_per_tok=3),
    "deepseek_v2": dict(
        intermediate_size=40,
        moe_intermediate_size=24,
        n_routed_experts=8,
        num_key_value_heads=4,
        n_shared_experts=2,
        first_k_dense_replace=1,
        kv_lora_rank=24,
        q_lora_rank=None,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        v_head_dim=16,
    ),
}
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, rope_theta=10000.0)
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
    rope_theta=10000.0,
)
LINEAR = dict(rope_type="linear", factor=3.0, rope_theta=10000.0)


class Case(NamedTuple):
    """One configuration: the family, the seed of weights and prompts, and what differs from the family's base."""

    family: str
    seed: int
    overrides: dict


CASES: dict[str, Case] = {
    "mixtral": Case("mixtral", 2, {}),
    "mixtral-window-tied": Case("mixtral", 3, dict(sliding_window=7, head_dim=16, tie_word_embeddings=True)),
    "qwen2": Case("qwen2_moe", 3, {}),
    "qwen2-mixed": Case(
        "qwen2_moe",
        0,
        dict(
            mlp_only_layers=[0],
            norm_topk_prob=True,
            qkv_bias=False,
            tie_word_embeddings=True,
            use_sliding_window=True,
            sliding_window=9,
            max_window_layers=2,
        ),
    ),
    "qwen3": Case("qwen3_moe", 3, {}),
    "qwen3-window-bias": Case(
        "qwen3_moe",
        3,
        dict(
            attention_bias=True, use_sliding_window=True, sliding_window=11, mlp_only_layers=[1], norm_topk_prob=False
        ),
    ),
    "olmoe": Case("olmoe", 0, {}),
    "olmoe-clip": Case("olmoe", 0, dict(clip_qkv=0.8, norm_topk_prob=True, num_key_value_heads=2, attention_bias=True)),
    "deepseek-lite": Case("deepseek_v2", 1, dict(rope_parameters=YARN | dict(mscale=0.707, mscale_all_dim=0.707))),
    "deepseek-groups": Case(
        "deepseek_v2",
        0,
        dict(
            q_lora_rank=20,
            topk_method="group_limited_greedy",
            n_group=4,
            topk_group=2,
            num_experts_per_tok=3,
            routed_scaling_factor=2.5,
        ),
    ),
}
SLOW_CASES: dict[str, Case] = {
    "mixtral-linear": Case("mixtral", 3, dict(rope_parameters=LINEAR, num_local_experts=8, num_key_value_heads=4)),
    "qwen2-step-types": Case(
        "qwen2_moe",
        0,
        dict(
            num_hidden_layers=4,
            decoder_sparse_step=2,
            use_sliding_window=True,
            sliding_window=6,
            layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        ),
    ),
    "qwen2-llama3": Case("qwen2_moe", 1, dict(rope_parameters=LLAMA3)),
    "qwen3-yarn-tied": Case(
        "qwen3_moe", 0, dict(rope_parameters=YARN, tie_word_embeddings=True, decoder_sparse_step=2)
    ),
    "olmoe-deep": Case("olmoe", 10, dict(num_hidden_layers=5, num_experts=16, num_experts_per_tok=4)),
    "deepseek-bias-mscale": Case(
        "deepseek_v2",
        2,
        dict(
            rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=0.5),
            attention_bias=True,
            mlp_bias=True,
            q_lora_rank=20,
            n_shared_experts=1,
        ),
    ),
    "deepseek-one-group": Case(
        "deepseek_v2",
        0,
        dict(
            topk_method="group_limited_greedy", n_group=2, topk_group=1, num_experts_per_tok=4, first_k_dense_replace=0
        ),
    ),
}
ALL_CASES = CASES | SLOW_CASES
