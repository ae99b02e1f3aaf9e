"""Shared maths of the decoder families: linear, embedding, RMS norm, SwiGLU, rotary embedding.

Shapes: B batch, T tokens of this call, D model width, H query heads, d head width. Weights are stored [out, in] under
the names of the Hugging Face checkpoints: measured 1.3-1.4x faster at small loads on XLA:CPU.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from hybrimoe_jax.models.products import fused_linear, product


def initial(rngs: nnx.Rngs | None, shape: tuple[int, ...]) -> jax.Array:
    """A matrix to begin with, random; zeros without `rngs`, where only shapes are wanted: tracing those is quicker."""
    if rngs is None:
        return jnp.zeros(shape, jnp.float32)
    return 0.02 * jax.random.normal(rngs.params(), shape, jnp.float32)


class Linear(nnx.Module):
    """`y = x W^T + b` with `weight` [out, in], plain or a `PackedMatrix`."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False, rngs: nnx.Rngs | None):
        self.weight = nnx.Param(initial(rngs, (out_features, in_features)))
        self.bias = nnx.Param(jnp.zeros((out_features,), jnp.float32)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.biased(product(x, self.weight.get_value()))

    def biased(self, y: jax.Array) -> jax.Array:
        return y if self.bias is None else y + self.bias[...]


def apply_fused(x: jax.Array, *layers: Linear) -> list[jax.Array]:
    """What each layer makes of x [..., in_features]: [..., out_features] each."""
    made = fused_linear(x, *(layer.weight.get_value() for layer in layers))
    return [layer.biased(y) for layer, y in zip(layers, made, strict=True)]


class Embedding(nnx.Module):
    """Token table, `weight` [vocab, D]."""

    def __init__(self, vocab: int, width: int, *, rngs: nnx.Rngs | None):
        self.weight = nnx.Param(initial(rngs, (vocab, width)))

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.weight[...][ids].astype(jnp.float32)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, in float32."""

    def __init__(self, width: int, eps: float):
        self.weight = nnx.Param(jnp.ones((width,), jnp.float32))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.weight[...], self.eps)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x [..., D], weight [D] -> float32 [..., D]."""
    chex.assert_shape(weight, x.shape[-1:])
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight


class SwiGLU(nnx.Module):
    """Dense or shared expert: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, width: int, hidden: int, *, bias: bool = False, rngs: nnx.Rngs | None):
        self.gate_proj = Linear(width, hidden, bias=bias, rngs=rngs)
        self.up_proj = Linear(width, hidden, bias=bias, rngs=rngs)
        self.down_proj = Linear(hidden, width, bias=bias, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = apply_fused(x, self.gate_proj, self.up_proj)
        return self.down_proj(jax.nn.silu(gate) * up)


def rotate_half(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding in the half-split convention. x [B, T, H, d]; cos, sin [B, T, d/2]."""
    _check_rotary(x, cos, sin)
    a, b = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def rotate_pairs(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding in the interleaved convention: dimensions 2i and 2i+1 are a pair.

    x [B, T, H, d]; cos, sin [B, T, d/2].
    """
    _check_rotary(x, cos, sin)
    a, b = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)


def _check_rotary(x: jax.Array, cos: jax.Array, sin: jax.Array) -> None:
    chex.assert_rank(x, 4)
    chex.assert_shape((cos, sin), (*x.shape[:2], x.shape[3] // 2))
