"""Shared maths of the decoder families: linear, RMS norm, rotary embedding, attention with a positional cache.

Shapes: B batch, T tokens of this call, S cache capacity, D model width, H query heads, K key/value heads, d head width.
Weights are stored [out, in] under the names of the Hugging Face checkpoints (measured 1.3-1.4x faster at small loads on XLA:CPU).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

NEG_INF = -1e30
PRECISION = jax.lax.Precision.HIGHEST
"""float32 products as float32: a GPU's default rounds the operands to TF32 (10 mantissa bits), which moves greedy tokens."""


def einsum(spec: str, *operands: jax.Array) -> jax.Array:
    """`jnp.einsum` with float32 operands kept and results accumulated in float32."""
    return jnp.einsum(spec, *operands, precision=PRECISION, preferred_element_type=jnp.float32)


class Linear(nnx.Module):
    """`y = x W^T + b` with `weight` [out, in]."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False, rngs: nnx.Rngs, std: float = 0.02):
        self.weight = nnx.Param(std * jax.random.normal(rngs.params(), (out_features, in_features), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((out_features,), jnp.float32)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = einsum("...i,oi->...o", x, self.weight[...])
        return y if self.bias is None else y + self.bias[...]


class Embedding(nnx.Module):
    """Token table, `weight` [vocab, D]."""

    def __init__(self, vocab: int, width: int, *, rngs: nnx.Rngs, std: float = 0.02):
        self.weight = nnx.Param(std * jax.random.normal(rngs.params(), (vocab, width), jnp.float32))

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
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight


class SwiGLU(nnx.Module):
    """Dense or shared expert: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, width: int, hidden: int, *, bias: bool = False, rngs: nnx.Rngs):
        self.gate_proj = Linear(width, hidden, bias=bias, rngs=rngs)
        self.up_proj = Linear(width, hidden, bias=bias, rngs=rngs)
        self.down_proj = Linear(hidden, width, bias=bias, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


def rotate_half(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding in the half-split convention. x [B, T, H, d]; cos, sin [B, T, d/2]."""
    a, b = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def rotate_pairs(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding in the interleaved convention: dimensions 2i and 2i+1 are a pair. x [B, T, H, d]; cos, sin [B, T, d/2]."""
    a, b = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)


def cache_write(cache: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    """Writes new [B, T, ...] at positions [B, T] of cache [B, S, ...]; positions >= S (padding) are dropped."""
    rows = jnp.arange(cache.shape[0])[:, None]
    return cache.at[rows, positions].set(new.astype(cache.dtype), mode="drop")


def cache_write_heads(cache: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    """The same for a cache that is apart by heads: new [B, T, K, d] into cache [B, K, S, d]."""
    rows = jnp.arange(cache.shape[0])[:, None]
    return cache.at[rows, :, positions].set(new.astype(cache.dtype), mode="drop")


def visible(positions: jax.Array, capacity: int, window: int | None) -> jax.Array:
    """Causal mask [B, T, S]: key j is seen by the query at position p when p - window < j <= p."""
    keys = jnp.arange(capacity)[None, None, :]
    query = positions[:, :, None]
    seen = keys <= query
    return seen if window is None else seen & (keys > query - window)


class Attention(nnx.Module):
    """Grouped-query attention with a cache of `k`, `v` [B, K, S, d] (heads apart, so that no product transposes it).

    Options cover the families: bias on q/k/v or on all four, RMS norm per head (Qwen3) or over the whole projection
    (OLMoE), clipping of q/k/v (OLMoE), sliding window.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        rope,
        rngs: nnx.Rngs,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: str | None = None,
        eps: float = 1e-6,
        clip: float | None = None,
        window: int | None = None,
    ):
        self.q_proj = Linear(width, heads * head_dim, bias=qkv_bias, rngs=rngs)
        self.k_proj = Linear(width, kv_heads * head_dim, bias=qkv_bias, rngs=rngs)
        self.v_proj = Linear(width, kv_heads * head_dim, bias=qkv_bias, rngs=rngs)
        self.o_proj = Linear(heads * head_dim, width, bias=out_bias, rngs=rngs)
        self.qk_norm, self.clip, self.window, self.rope = qk_norm, clip, window, rope
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        if qk_norm is not None:
            per_head = qk_norm == "head"
            self.q_norm = RMSNorm(head_dim if per_head else heads * head_dim, eps)
            self.k_norm = RMSNorm(head_dim if per_head else kv_heads * head_dim, eps)

    def cache_shapes(self, batch: int, capacity: int) -> dict[str, tuple[int, ...]]:
        shape = (batch, self.kv_heads, capacity, self.head_dim)
        return {"k": shape, "v": shape}

    def __call__(
        self, x: jax.Array, cache: dict, positions: jax.Array, span: int | None = None
    ) -> tuple[jax.Array, dict]:
        """x [B, T, D], positions [B, T] (>= S marks padding) -> ([B, T, D], updated cache).

        `span`: no valid position is at or past it, so only that much of the cache is read; None reads all of it.
        """
        batch, tokens, _ = x.shape
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.clip is not None:
            q, k, v = (jnp.clip(t, -self.clip, self.clip) for t in (q, k, v))
        q = q.reshape(batch, tokens, self.heads, self.head_dim)
        k = k.reshape(batch, tokens, self.kv_heads, self.head_dim)
        v = v.reshape(batch, tokens, self.kv_heads, self.head_dim)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = self.rope(positions)
        q, k = rotate_half(q, cos, sin), rotate_half(k, cos, sin)
        cache = {"k": cache_write_heads(cache["k"], k, positions), "v": cache_write_heads(cache["v"], v, positions)}
        span = span or cache["k"].shape[2]
        mask = visible(positions, span, self.window)
        out = grouped_attention(q, cache["k"][:, :, :span], cache["v"][:, :, :span], mask, self.head_dim**-0.5)
        return self.o_proj(out.reshape(batch, tokens, self.heads * self.head_dim)), cache


def grouped_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scale: float) -> jax.Array:
    """q [B, T, H, d], k and v [B, K, S, d], mask [B, T, S] -> [B, T, H, d]; softmax in float32.

    The query heads of a group share their keys, so they are one product with G*T rows; the probabilities are divided by
    their sum after the second product. On XLA:CPU this is 2-3 times faster than products over [B, S, K, d].
    """
    batch, tokens, heads, width = q.shape
    kv_heads, span = k.shape[1], k.shape[2]
    groups = heads // kv_heads
    q = q.reshape(batch, tokens, kv_heads, groups, width).transpose(0, 2, 3, 1, 4)
    logits = einsum("bkqd,bksd->bkqs", q.reshape(batch, kv_heads, groups * tokens, width), k.astype(jnp.float32))
    logits = (logits * scale).reshape(batch, kv_heads, groups, tokens, span)
    logits = jnp.where(mask[:, None, None], logits, NEG_INF)
    exponents = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    rows = exponents.reshape(batch, kv_heads, groups * tokens, span)
    out = einsum("bkqs,bksd->bkqd", rows, v.astype(jnp.float32)).reshape(batch, kv_heads, groups, tokens, -1)
    out = out / jnp.sum(exponents, axis=-1)[..., None]
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, tokens, heads, v.shape[-1])
