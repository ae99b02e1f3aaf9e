"""Grouped-query attention over a positional cache: writing it in place, the mask, the product at once or in blocks.

Shapes: B batch, T tokens of this call, S cache capacity, D model width, H query heads, K key/value heads, d head width.
Positions [B, T]: a row's tokens follow one another; padding (position >= S) comes after them, writes nothing and is
seen by none.
"""

from __future__ import annotations

from typing import Protocol

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from hybrimoe_jax.host_kernels.native import attention as native
from hybrimoe_jax.models import one_token
from hybrimoe_jax.models.layers import Linear, RMSNorm, apply_fused, rotate_half
from hybrimoe_jax.models.one_token import NEG_INF
from hybrimoe_jax.models.precision import einsum
from hybrimoe_jax.models.products import calls_native
from hybrimoe_jax.models.rope import Rope

BLOCK = 128
"""Queries and keys of one piece of `blocked_attention`: on XLA's CPU backend blocks of 32 to 256 differ by a tenth."""


def cache_write(cache: jax.Array, new: jax.Array, positions: jax.Array, axis: int = 1) -> jax.Array:
    """Writes `new` at `positions` [B, T] of a cache [B, ..., S (`axis`), ...]. Padding is dropped.

    `new` has T in the place of S.

    One block of T places per row is read, merged and written back: a scatter at arbitrary places makes XLA:CPU copy the
    whole cache several times per call (eight copies a layer were a third of a decode step).
    """
    batch, tokens = positions.shape
    capacity = cache.shape[axis]
    chex.assert_shape(new, (*cache.shape[:axis], tokens, *cache.shape[axis + 1 :]))
    if one_token.in_place(tokens) and batch > 1:
        return one_token.write(cache, new, positions, axis)
    if tokens > capacity:  # what is past the capacity can only be padding
        new, positions = jax.lax.slice_in_dim(new, 0, capacity, axis=axis), positions[:, :capacity]
        tokens = capacity
    new = new.astype(cache.dtype)
    first = positions[:, 0]
    starts = jnp.clip(first, 0, capacity - tokens)
    for row in range(batch):
        at: list[int | jax.Array] = [0] * cache.ndim
        at[0], at[axis] = row, starts[row]
        places = starts[row] + jnp.arange(tokens)
        source = jnp.clip(places - first[row], 0, tokens - 1)
        written = positions[row][source] == places
        block = new[row : row + 1] if tokens == 1 else jnp.take(new[row : row + 1], source, axis=axis)
        size = [*cache.shape]
        size[0], size[axis] = 1, tokens
        old = jax.lax.dynamic_slice(cache, at, size)
        shape = [1] * cache.ndim
        shape[axis] = tokens
        cache = jax.lax.dynamic_update_slice(cache, jnp.where(written.reshape(shape), block, old), at)
    # Without the barrier the update is fused into the products that read the cache, which then work on copies of all of
    # it.
    return jax.lax.optimization_barrier(cache)


def visible(positions: jax.Array, capacity: int, window: int | None) -> jax.Array:
    """Causal mask [B, T, S]: key j is seen by the query at position p when p - window < j <= p."""
    keys = jnp.arange(capacity)[None, None, :]
    query = positions[:, :, None]
    seen = keys <= query
    return seen if window is None else seen & (keys > query - window)


class CachedAttention(Protocol):
    """What a decoder layer asks of its attention, whatever it keeps of the tokens it has seen."""

    def cache_shapes(self, batch: int, capacity: int) -> dict[str, tuple[int, ...]]: ...

    def __call__(
        self, x: jax.Array, cache: dict, positions: jax.Array, span: int | None = None
    ) -> tuple[jax.Array, dict]: ...


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
        rope: Rope,
        rngs: nnx.Rngs | None,
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
        """Shapes of a cache for positions 0..capacity-1, with one place more: so attention always reads a true slice.

        Where it reads all, XLA:CPU fuses the write into the products and copies the cache for each of them.
        """
        shape = (batch, self.kv_heads, capacity + 1, self.head_dim)
        return {"k": shape, "v": shape}

    def __call__(
        self, x: jax.Array, cache: dict, positions: jax.Array, span: int | None = None
    ) -> tuple[jax.Array, dict]:
        """x [B, T, D], positions [B, T] (>= S marks padding) -> ([B, T, D], updated cache).

        `span`: no valid position is at or past it, so only that much of the cache is read; None reads all of it. A span
        of T says that every row starts at position 0.
        """
        chex.assert_rank(x, 3)
        chex.assert_shape(positions, x.shape[:2])
        batch, tokens, _ = x.shape
        q, k, v = apply_fused(x, self.q_proj, self.k_proj, self.v_proj)
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
        if tokens == 1 and calls_native() and cache["k"].dtype == jnp.float32:
            new, at, caches = (q[:, 0], k[:, 0], v[:, 0]), positions[:, 0], (cache["k"], cache["v"])
            span = span or caches[0].shape[2]
            out, *cached = native.grouped(*new, at, *caches, span, self.window, self.head_dim**-0.5)
            return self.o_proj(out.reshape(batch, 1, -1)), dict(zip(("k", "v"), cached))
        cache = {
            name: cache_write(cache[name], part.transpose(0, 2, 1, 3), positions, axis=2)
            for name, part in (("k", k), ("v", v))
        }
        span, scale = span or cache["k"].shape[2], self.head_dim**-0.5
        if one_token.in_place(tokens):
            out = one_token.grouped(q, cache["k"], cache["v"], visible(positions, span, self.window), scale)
        else:
            keys, values = cache["k"][:, :, :span], cache["v"][:, :, :span]
            out = attend(q, keys, values, positions, self.window, scale)
        return self.o_proj(out.reshape(batch, tokens, self.heads * self.head_dim)), cache


def grouped_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scale: float) -> jax.Array:
    """q [B, T, H, d], k and v [B, K, S, d], mask [B, T, S] -> [B, T, H, d]; softmax in float32.

    The query heads of a group share their keys, so they are one product with G*T rows; the probabilities are divided by
    their sum after the second product. On XLA:CPU this is 2-3 times faster than products over [B, S, K, d].
    """
    batch, tokens, heads, width = q.shape
    kv_heads, span = k.shape[1], k.shape[2]
    chex.assert_shape(k, (batch, kv_heads, span, width))
    chex.assert_shape(v, (batch, kv_heads, span, None))
    chex.assert_shape(mask, (batch, tokens, span))
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


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, window: int | None, scale: float
) -> jax.Array:
    """q [B, T, H, d] at `positions` [B, T] over k and v [B, K, S, d] -> [B, T, H, d].

    Where T = S, every row starts at position 0. XLA:CPU runs long ones in blocks: the whole product's passes over [H,
    T, S] cost more than the products.
    """
    chex.assert_rank((q, k, v), 4)
    chex.assert_shape(positions, q.shape[:2])

    def at_once(q, k, v, positions):
        return grouped_attention(q, k, v, visible(positions, k.shape[2], window), scale)

    if q.shape[1] < BLOCK or k.shape[2] < BLOCK:
        return at_once(q, k, v, positions)
    in_blocks = causal_attention if q.shape[1] == k.shape[2] else blocked_attention

    def blocked(q, k, v, positions):
        return in_blocks(q, k, v, positions, window, scale)

    return jax.lax.platform_dependent(q, k, v, positions, cpu=blocked, default=at_once)


def causal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, window: int | None, scale: float
) -> jax.Array:
    """`attend` where every row starts at position 0: which keys a block of queries sees is known when it is compiled.

    On two cores 1.7 times faster than `blocked_attention`, whose loop XLA:CPU runs on one.
    """
    parts = []
    for start in range(0, q.shape[1], BLOCK):
        stop = min(start + BLOCK, q.shape[1])
        low = 0 if window is None else max(0, start - window + 1)
        mask = visible(positions[:, start:stop], stop, window)[:, :, low:]
        parts.append(grouped_attention(q[:, start:stop], k[:, :, low:stop], v[:, :, low:stop], mask, scale))
    return jnp.concatenate(parts, axis=1)


def blocked_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, window: int | None, scale: float
) -> jax.Array:
    """`attend` with an online softmax over blocks of keys, skipping blocks that no query can see.

    Source: FlashAttention, arXiv 2205.14135. On XLA:CPU (one core) 512 tokens of 16 heads took 41 ms
    at once, 12 in blocks.
    """
    batch, tokens, heads, width = q.shape
    kv_heads, span = k.shape[1], k.shape[2]
    groups, pieces = heads // kv_heads, -(-tokens // BLOCK)
    padding = pieces * BLOCK - tokens
    q = jnp.pad(q * scale, ((0, 0), (0, padding), (0, 0), (0, 0)))
    positions = jnp.pad(positions, ((0, 0), (0, padding)), mode="edge")
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)

    def piece(i):
        at = jax.lax.dynamic_slice_in_dim(positions, i * BLOCK, BLOCK, 1)
        mine = jax.lax.dynamic_slice_in_dim(q, i * BLOCK, BLOCK, 1).reshape(batch, BLOCK, kv_heads, groups, width)
        mine = mine.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, groups * BLOCK, width)
        low = jnp.zeros((), jnp.int32) if window is None else jnp.maximum(jnp.min(at) - window + 1, 0) // BLOCK
        high = jnp.minimum(jnp.max(jnp.where(at < span, at, 0)) // BLOCK + 1, -(-span // BLOCK))

        def body(j, state):
            top, total, out = state
            start = jnp.minimum(j * BLOCK, span - BLOCK)  # the last block may begin inside the one before
            places = start + jnp.arange(BLOCK)
            keys, values = (jax.lax.dynamic_slice_in_dim(part, start, BLOCK, 2) for part in (k, v))
            seen = (places <= at[..., None]) & (places >= j * BLOCK)
            if window is not None:
                seen &= places > at[..., None] - window
            logits = einsum("bkqd,bksd->bkqs", mine, keys).reshape(batch, kv_heads, groups, BLOCK, BLOCK)
            logits = jnp.where(seen[:, None, None], logits, NEG_INF).reshape(batch, kv_heads, groups * BLOCK, BLOCK)
            higher = jnp.maximum(top, jnp.max(logits, axis=-1))
            weights, kept = jnp.exp(logits - higher[..., None]), jnp.exp(top - higher)
            out = out * kept[..., None] + einsum("bkqs,bksd->bkqd", weights, values)
            return higher, total * kept + jnp.sum(weights, axis=-1), out

        rows = (batch, kv_heads, groups * BLOCK)
        empty = jnp.full(rows, NEG_INF), jnp.zeros(rows), jnp.zeros((*rows, v.shape[-1]))
        _, total, out = jax.lax.fori_loop(low, jnp.maximum(high, low + 1), body, empty)
        out = (out / total[..., None]).reshape(batch, kv_heads, groups, BLOCK, -1)
        return out.transpose(0, 3, 1, 2, 4).reshape(batch, BLOCK, heads, -1)

    done = jax.lax.map(piece, jnp.arange(pieces))  # [pieces, B, BLOCK, H, d]
    return jnp.moveaxis(done, 0, 1).reshape(batch, pieces * BLOCK, heads, -1)[:, :tokens]
