"""Qwen3-MoE (30B-A3B, 235B-A22B): an RMS norm on every query and key head, no shared expert, its own `head_dim`.

Source: Qwen team, arXiv 2505.09388, and the keys and weight names of the published checkpoints.
"""

from __future__ import annotations

import dataclasses

from flax import nnx

from hybrimoe_jax.models.config import QwenConfig
from hybrimoe_jax.models.decoder import CausalLM, assemble, grouped_query
from hybrimoe_jax.models.moe import MoEBlock


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig(QwenConfig):
    """Qwen3-MoE's own keys of config.json, with their defaults."""

    num_key_value_heads: int | None = 4
    attention_bias: bool = False

    def window(self, layer: int) -> int | None:
        return (self.sliding_window or None) if self.use_sliding_window else None


def build(config: Qwen3MoeConfig, rngs: nnx.Rngs | None) -> CausalLM:
    def moe_block() -> MoEBlock:
        sizes = config.hidden_size, config.num_experts, config.num_experts_per_tok
        return MoEBlock(*sizes, normalise=config.norm_topk_prob, rngs=rngs)

    bias = config.attention_bias
    norm = {"qk_norm": "head", "eps": config.rms_norm_eps}
    return assemble(config, rngs, grouped_query(config, rngs, qkv_bias=bias, out_bias=bias, **norm), moe_block)
