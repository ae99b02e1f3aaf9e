"""Qwen2-MoE (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): biased q/k/v, a shared expert behind a sigmoid gate.

Source: the `Qwen2MoeForCausalLM` checkpoints and configuration keys as published with Hugging Face transformers.
"""

from __future__ import annotations

import dataclasses

import jax
from flax import nnx
from hybrimoe_jax.models.config import ModelConfig
from hybrimoe_jax.models.decoder import CausalLM, DecoderLayer
from hybrimoe_jax.models.layers import Attention, Linear, SwiGLU
from hybrimoe_jax.models.moe import MoEBlock
from hybrimoe_jax.models.rope import make_rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2MoeConfig(ModelConfig):
    num_experts: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    intermediate_size: int
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] | None = None
    use_sliding_window: bool = False
    sliding_window: int | None = None
    max_window_layers: int = 28
    qkv_bias: bool = True

    @property
    def moe_width(self) -> int:
        return self.moe_intermediate_size

    def is_moe(self, layer: int) -> bool:
        return layer not in (self.mlp_only_layers or ()) and (layer + 1) % self.decoder_sparse_step == 0

    def window(self, layer: int) -> int | None:
        return self.sliding_window if self.use_sliding_window and layer >= self.max_window_layers else None


class Qwen2MoeBlock(MoEBlock):
    """Adds `sigmoid(shared_expert_gate(x)) * shared_expert(x)`."""

    def __init__(self, config: Qwen2MoeConfig, rngs: nnx.Rngs):
        super().__init__(
            config.hidden_size,
            config.num_experts,
            config.num_experts_per_tok,
            normalise=config.norm_topk_prob,
            rngs=rngs,
        )
        self.shared_expert = SwiGLU(config.hidden_size, config.shared_expert_intermediate_size, rngs=rngs)
        self.shared_expert_gate = Linear(config.hidden_size, 1, rngs=rngs)

    def shared(self, x: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)


def build(config: Qwen2MoeConfig, rngs: nnx.Rngs) -> CausalLM:
    head_dim = config.hidden_size // config.num_attention_heads
    rope = make_rope(head_dim, config.rope_theta, config.rope_scaling)

    def layer(index: int) -> DecoderLayer:
        attention = Attention(
            config.hidden_size,
            config.num_attention_heads,
            config.kv_heads,
            head_dim,
            rope=rope,
            rngs=rngs,
            qkv_bias=config.qkv_bias,
            window=config.window(index),
        )
        if config.is_moe(index):
            mlp = Qwen2MoeBlock(config, rngs)
        else:
            mlp = SwiGLU(config.hidden_size, config.intermediate_size, rngs=rngs)
        return DecoderLayer(config.hidden_size, config.rms_norm_eps, attention, mlp)

    return CausalLM(config, [layer(i) for i in range(config.num_hidden_layers)], rngs)
