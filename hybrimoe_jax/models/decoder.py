"""The decoder skeleton that every family fills in: layers, the causal language model and its cache.

Attribute names are the checkpoint's weight names, so that loading is a walk over one dictionary.
Shapes: B batch, T tokens of this call, S cache capacity, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from hybrimoe_jax.models.attention import Attention, CachedAttention
from hybrimoe_jax.models.config import ModelConfig
from hybrimoe_jax.models.layers import Embedding, Linear, RMSNorm, SwiGLU
from hybrimoe_jax.models.moe import MoEBlock, RoutedPart
from hybrimoe_jax.models.products import product


class DecoderLayer(nnx.Module):
    """Pre-norm block; `mlp` is a dense SwiGLU or a MoEBlock (`mlp_name` is what the checkpoint calls it)."""

    def __init__(self, width: int, eps: float, attention: CachedAttention, mlp: nnx.Module, mlp_name: str = "mlp"):
        self.input_layernorm = RMSNorm(width, eps)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(width, eps)
        self.mlp_name = mlp_name
        setattr(self, mlp_name, mlp)

    @property
    def ffn(self) -> nnx.Module:
        return getattr(self, self.mlp_name)

    @property
    def is_moe(self) -> bool:
        return isinstance(self.ffn, MoEBlock)

    def attend(
        self, h: jax.Array, cache: dict, positions: jax.Array, span: int | None = None
    ) -> tuple[jax.Array, dict]:
        """Residual stream [B, T, D] -> the stream after attention, and the updated cache; `span` as in `Attention`."""
        out, cache = self.self_attn(self.input_layernorm(h), cache, positions, span)
        return h + out, cache

    def ffn_input(self, h: jax.Array) -> jax.Array:
        """The normed router input [N, D] of the residual stream [B, T, D]."""
        return self.post_attention_layernorm(h).reshape(-1, h.shape[-1])

    def __call__(
        self, index: int, h: jax.Array, cache: dict, positions: jax.Array, experts: RoutedPart
    ) -> tuple[jax.Array, dict]:
        h, cache = self.attend(h, cache, positions)
        x = self.ffn_input(h)
        y = self.ffn(index, x, experts) if self.is_moe else self.ffn(x)
        return h + y.reshape(h.shape), cache


class Decoder(nnx.Module):
    """`model.` of the checkpoint: token table, layers, final norm."""

    def __init__(self, vocab: int, width: int, eps: float, layers: list[DecoderLayer], rngs: nnx.Rngs | None):
        self.embed_tokens = Embedding(vocab, width, rngs=rngs)
        self.layers = nnx.List(layers)
        self.norm = RMSNorm(width, eps)


class CausalLM(nnx.Module):
    """Decoder plus output head; `lm_head` is absent when the embeddings are tied."""

    def __init__(self, config: ModelConfig, layers: list[DecoderLayer], rngs: nnx.Rngs | None):
        self.config = config
        self.model = Decoder(config.vocab_size, config.hidden_size, config.rms_norm_eps, layers, rngs)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, rngs=rngs)

    def init_cache(self, batch: int, capacity: int, dtype: jax.typing.DTypeLike = jnp.float32) -> list[dict]:
        return [
            {name: jnp.zeros(shape, dtype) for name, shape in layer.self_attn.cache_shapes(batch, capacity).items()}
            for layer in self.model.layers
        ]

    def head(self, h: jax.Array) -> jax.Array:
        """Final norm and logits [..., V] of the residual stream [..., D]."""
        h = self.model.norm(h)
        if self.lm_head is None:
            return product(h, self.model.embed_tokens.weight.get_value())
        return self.lm_head(h)

    def __call__(
        self, ids: jax.Array, cache: list[dict], positions: jax.Array, experts: RoutedPart
    ) -> tuple[jax.Array, list]:
        """ids [B, T], positions [B, T] -> (logits [B, T, V], updated cache)."""
        chex.assert_rank(ids, 2)
        chex.assert_equal_shape((ids, positions))
        h = self.model.embed_tokens(ids)
        updated = []
        for index, layer in enumerate(self.model.layers):
            h, entry = layer(index, h, cache[index], positions, experts)
            updated.append(entry)
        return self.head(h), updated


def assemble(
    config: ModelConfig,
    rngs: nnx.Rngs | None,
    attention: Callable[[int], CachedAttention],
    moe_block: Callable[[], MoEBlock],
    mlp_name: str = "mlp",
    mlp_bias: bool = False,
) -> CausalLM:
    """The model from what differs between families: `attention(layer)` and `moe_block()` make a layer's two parts.

    Layers without experts have a dense SwiGLU, with biases where `mlp_bias`.
    """

    def mlp(layer: int) -> nnx.Module:
        if config.is_moe(layer):
            return moe_block()
        return SwiGLU(config.hidden_size, config.intermediate_size, bias=mlp_bias, rngs=rngs)

    layers = [
        DecoderLayer(config.hidden_size, config.rms_norm_eps, attention(index), mlp(index), mlp_name)
        for index in range(config.num_hidden_layers)
    ]
    return CausalLM(config, layers, rngs)


def grouped_query(config: ModelConfig, rngs: nnx.Rngs | None, **options) -> Callable[[int], Attention]:
    """Makes a layer's grouped-query attention; `options`: those of `Attention` in which families differ."""
    sizes = config.hidden_size, config.num_attention_heads, config.kv_heads, config.head_width
    return lambda layer: Attention(*sizes, rope=config.rope, rngs=rngs, window=config.window(layer), **options)
