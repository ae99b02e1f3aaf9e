"""Qwen2-MoE (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): biased q/k/v, a shared expert behind a sigmoid gate.

Source: the `Qwen2MoeForCausalLM` checkpoints and configuration keys as published with Hugging Face transformers.
"""

from __future__ import annotations

import dataclasses

import jax
from flax import nnx

from hybrimoe_jax.models.config import QwenConfig
from hybrimoe_jax.models.decoder import CausalLM, assemble, grouped_query
from hybrimoe_jax.models.layers import Linear, SwiGLU
from hybrimoe_jax.models.moe import MoEBlock


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2MoeConfig(QwenConfig):
    """Qwen2-MoE's own keys of config.json, with their defaults."""

    shared_expert_intermediate_size: int
    num_key_value_heads: int | None = 16
    max_window_layers: int = 28
    layer_types: list[str] | None = None
    qkv_bias: bool = True

    def window(self, layer: int) -> int | None:
        """Whether each layer slides: by `layer_types` where given, else by transformers' rule.

        With `use_sliding_window`, every other layer (0, 2, ...) below `max_window_layers` slides.
        """
        if not self.use_sliding_window:
            return None
        if self.layer_types is not None:
            slides = self.layer_types[layer] == "sliding_attention"
        else:
            slides = layer % 2 == 0 and layer < self.max_window_layers
        return (self.sliding_window or None) if slides else None


class Qwen2MoeBlock(MoEBlock):
    """Adds `sigmoid(shared_expert_gate(x)) * shared_expert(x)`."""

    def __init__(self, config: Qwen2MoeConfig, rngs: nnx.Rngs | None):
        sizes = config.hidden_size, config.num_experts, config.num_experts_per_tok
        super().__init__(*sizes, normalise=config.norm_topk_prob, rngs=rngs)
        self.shared_expert = SwiGLU(config.hidden_size, config.shared_expert_intermediate_size, rngs=rngs)
        self.shared_expert_gate = Linear(config.hidden_size, 1, rngs=rngs)

    def shared(self, x: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)


def build(config: Qwen2MoeConfig, rngs: nnx.Rngs | None) -> CausalLM:
    attention = grouped_query(config, rngs, qkv_bias=config.qkv_bias)
    return assemble(config, rngs, attention, lambda: Qwen2MoeBlock(config, rngs))
