"""OLMoE (1B-7B): an RMS norm over the whole query and key projections, optional clipping of q, k and v.

Source: Muennighoff et al., arXiv 2409.02060, and the keys and weight names of the published checkpoints.
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
class OlmoeConfig(ModelConfig):
    """OLMoE's own keys of config.json, with their defaults."""

    num_experts: int
    rms_norm_eps: float = 1e-5
    attention_bias: bool = False
    clip_qkv: float | None = None
    norm_topk_prob: bool = False
    eos_token_id: int | list[int] | None = 50279

    aliases: ClassVar[Mapping[str, str]] = {"num_local_experts": "num_experts"}

    def check(self, raw: Mapping[str, Any]) -> None:
        super().check(raw)
        if self.clip_qkv is not None and self.clip_qkv <= 0:
            raise UserError(f"config.json: clip_qkv must be above 0, not {self.clip_qkv}")
        if self.hidden_size != self.head_width * self.num_attention_heads:
            raise UserError("config.json: hidden_size is not a multiple of num_attention_heads")
        if raw.get("head_dim") not in (None, self.head_width):
            raise UserError(
                f"config.json: head_dim {raw['head_dim']} is not supported for olmoe ({self.head_width} is)"
            )

    @property
    def moe_width(self) -> int:
        return self.intermediate_size

    def is_moe(self, layer: int) -> bool:
        return True


def build(config: OlmoeConfig, rngs: nnx.Rngs | None) -> CausalLM:
    def moe_block() -> MoEBlock:
        sizes = config.hidden_size, config.num_experts, config.num_experts_per_tok
        return MoEBlock(*sizes, normalise=config.norm_topk_prob, rngs=rngs)

    bias = config.attention_bias
    norm = {"qk_norm": "full", "eps": config.rms_norm_eps, "clip": config.clip_qkv}
    return assemble(config, rngs, grouped_query(config, rngs, qkv_bias=bias, out_bias=bias, **norm), moe_block)
