"""Qwen3-MoE (30B-A3B, 235B-A22B): an RMS norm on every query and key head, no shared expert, its own `head_dim`.

Source: Qwen team, arXiv 2505.09388, and the keys and weight names of the published checkpoints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from flax import nnx

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.models.config import ModelConfig, on_sparse_step
from hybrimoe_jax.models.decoder import CausalLM, assemble, grouped_query
from hybrimoe_jax.models.moe import MoEBlock


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig(ModelConfig):
    """Qwen3-MoE's own keys of config.json, with their defaults."""

    num_experts: int
    moe_intermediate_size: int
    num_key_value_heads: int | None = 4
    head_dim: int | None = None
    max_position_embeddings: int = 32768
    attention_bias: bool = False
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] | None = None
    use_sliding_window: bool = False
    sliding_window: int | None = 4096

    aliases: ClassVar[Mapping[str, str]] = {"num_local_experts": "num_experts"}

    def check(self, raw: Mapping[str, Any]) -> None:
        if self.decoder_sparse_step < 1:
            raise UserError(f"config.json: decoder_sparse_step must be at least 1, not {self.decoder_sparse_step}")
        if self.use_sliding_window and not self.sliding_window:
            raise UserError("config.json: use_sliding_window is true but sliding_window is not given")
        super().check(raw)

    @property
    def moe_width(self) -> int:
        return self.moe_intermediate_size

    def is_moe(self, layer: int) -> bool:
        return on_sparse_step(layer, self.decoder_sparse_step, self.mlp_only_layers)

    def window(self, layer: int) -> int | None:
        return (self.sliding_window or None) if self.use_sliding_window else None


def build(config: Qwen3MoeConfig, rngs: nnx.Rngs | None) -> CausalLM:
    def moe_block() -> MoEBlock:
        sizes = config.hidden_size, config.num_experts, config.num_experts_per_tok
        return MoEBlock(*sizes, normalise=config.norm_topk_prob, rngs=rngs)

    bias = config.attention_bias
    norm = {"qk_norm": "head", "eps": config.rms_norm_eps}
    return assemble(config, rngs, grouped_query(config, rngs, qkv_bias=bias, out_bias=bias, **norm), moe_block)
