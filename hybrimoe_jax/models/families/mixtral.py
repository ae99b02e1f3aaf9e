"""Mixtral (8x7B, 8x22B): every layer sparse, the chosen experts' weights normalised, optional sliding window.

The checkpoints call the block `block_sparse_moe` and an expert's matrices w1 (gate), w3 (up) and w2 (down).
Source: Jiang et al., arXiv 2401.04088, and the keys and weight names of the published checkpoints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from flax import nnx

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.models.config import ModelConfig
from hybrimoe_jax.models.decoder import CausalLM, assemble, grouped_query
from hybrimoe_jax.models.moe import MoEBlock


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtralConfig(ModelConfig):
    """Mixtral's own keys of config.json, with their defaults."""

    num_local_experts: int
    num_key_value_heads: int | None = 8
    head_dim: int | None = None
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6
    sliding_window: int | None = None
    eos_token_id: int | list[int] | None = 2

    aliases: ClassVar[Mapping[str, str]] = {"num_experts": "num_local_experts"}
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"norm_topk_prob": (True, None)}

    def check(self, raw: Mapping[str, Any]) -> None:
        super().check(raw)
        if self.sliding_window == 0:
            raise UserError("config.json: sliding_window must be null or at least 1, not 0")

    @property
    def num_experts(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]  config.json has another name
        return self.num_local_experts

    @property
    def moe_width(self) -> int:
        return self.intermediate_size

    def is_moe(self, layer: int) -> bool:
        return True

    def window(self, layer: int) -> int | None:
        return self.sliding_window


def build(config: MixtralConfig, rngs: nnx.Rngs | None) -> CausalLM:
    def moe_block() -> MoEBlock:
        return MoEBlock(config.hidden_size, config.num_experts, config.num_experts_per_tok, normalise=True, rngs=rngs)

    return assemble(config, rngs, grouped_query(config, rngs), moe_block, mlp_name="block_sparse_moe")
