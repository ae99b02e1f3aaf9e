"""Attention of one token a row on a GPU: the cache is written and read where it lies, no part of it is copied.

The products of `models.attention` take a slice of the cache. XLA's GPU compiler copies that slice for each layer (4 to
67 MB at 4,096 places), since a library product or a split sum over places cannot read it in place. Sums of products
can: the slice, the widening to float32 and the softmax become part of the kernel that sums.

The order of the sums is all that differs. XLA's CPU backend does not profit, and keeps the products.

Shapes: B batch, S places of the cache, P places that are read, K key/value heads, G query heads for each, d head width,
H query heads, r latent width, R rotary width.
"""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp

from hybrimoe_jax.models.precision import einsum
from hybrimoe_jax.models.target import backend

NEG_INF = -1e30
PIECE = 128
"""Places that are summed in one go; the pieces' sums are added afterwards, so that a long cache occupies the device."""
SMALLEST_PIECE = 16


def in_place(tokens: int) -> bool:
    """Whether these forms are for a step of so many tokens a row."""
    return tokens == 1 and backend() != "cpu"


def write(cache: jax.Array, new: jax.Array, positions: jax.Array, axis: int) -> jax.Array:
    """Writes `new` at `positions` [B, 1] of a cache [B, ..., S (`axis`), ...]; what is past the end is dropped.

    `new` has 1 in the place of S. One kernel for all rows.
    """
    places = (jnp.arange(cache.shape[0]), *[slice(None)] * (axis - 1), positions[:, 0])
    new = jnp.squeeze(new, axis).astype(cache.dtype)
    return jax.lax.optimization_barrier(cache.at[places].set(new, mode="drop", unique_indices=True))


def grouped(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, scale: float) -> jax.Array:
    """q [B, 1, H, d], caches k and v [B, K, S, d], seen [B, 1, P] -> [B, 1, H, d]."""
    batch, _, heads, width = q.shape
    kv_heads, span = k.shape[1], seen.shape[2]
    chex.assert_shape((k, v), (batch, kv_heads, None, width))
    q = q.reshape(batch, kv_heads, heads // kv_heads, width)
    logits = einsum("bkgd,bksd->bkgs", q, k[:, :, :span].astype(jnp.float32)) * scale
    return _weighted(logits, seen, v).reshape(batch, 1, heads, width)


def latent(q: jax.Array, q_rope: jax.Array, latents: jax.Array, ropes: jax.Array, seen: jax.Array, scale: float):
    """q [B, 1, H, r] and q_rope [B, 1, H, R] over caches [B, S, r] and [B, S, R], seen [B, 1, P] -> [B, 1, H, r]."""
    span = seen.shape[2]
    keys = jnp.concatenate([part[:, :span].astype(jnp.float32) for part in (latents, ropes)], axis=-1)
    query = jnp.concatenate([q, q_rope], axis=-1)[:, 0, :, None]
    logits = jnp.sum(query * keys[:, None], axis=-1)[:, None] * scale
    return _weighted(logits, seen, latents[:, None])


def _weighted(logits: jax.Array, seen: jax.Array, values: jax.Array) -> jax.Array:
    """Softmax of logits [B, K, G, P], where seen [B, 1, P], over the first P of values [B, K, S, d] -> [B, K, G, d]."""
    batch, kv_heads, groups, span = logits.shape
    piece = math.gcd(span, PIECE)
    piece = piece if piece >= SMALLEST_PIECE else span
    # Keys and values are read apart: one slice for both would be kept, and so copied.
    values, logits = jax.lax.optimization_barrier((values, logits))
    values = values[:, :, None, :span].astype(jnp.float32)
    logits = jnp.where(seen[:, :, None], logits, NEG_INF)
    exponents = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    terms = (exponents[..., None] * values).reshape(batch, kv_heads, groups, span // piece, piece, -1)
    sums = jax.lax.optimization_barrier(jnp.sum(terms, axis=4))
    return jnp.sum(sums, axis=3) / jnp.sum(exponents, axis=-1)[..., None]
