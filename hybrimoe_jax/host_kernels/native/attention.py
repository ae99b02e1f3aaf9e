"""Decode attention inside jitted programs on the CPU backend, as XLA FFI calls.

One token a row; the cache is written and read in place.

What they compute is said in jax.numpy by `models.attention` and `models.families.deepseek_v2`, which they are tested
against.
Where the caches are donated nothing of them is copied.

Shapes: B batch, S places of the cache, H query heads, K key/value heads, d head width; latent attention: r latent
width, R rotary width, n un-rotated query width, v value width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from hybrimoe_jax.formats.packing import PackedMatrix
from hybrimoe_jax.host_kernels.native import library
from hybrimoe_jax.host_kernels.native.ffi import GROUPED, HANDLERS, LATENT, register, threads
from hybrimoe_jax.host_kernels.native.library import PLAIN, format_code


def _call(
    name: str, shape: tuple[int, ...], caches: tuple[jax.Array, jax.Array], *operands, scale: float, **numbers: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`operands`, then the caches; the result of this shape, then the caches."""
    register(name, HANDLERS[name])
    results = [jax.ShapeDtypeStruct(shape, jnp.float32), *(jax.ShapeDtypeStruct(c.shape, c.dtype) for c in caches)]
    first = len(operands)
    call = jax.ffi.ffi_call(name, results, input_output_aliases={first: 1, first + 1: 2})
    numbers |= {"isa": library.library().experts_best_isa(), "threads": threads()}
    fixed = {key: np.int64(number) for key, number in numbers.items()}
    out, *written = call(*operands, *caches, scale=np.float32(scale), **fixed)
    return out, written[0], written[1]


def grouped(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    span: int,
    window: int | None,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Writes k and v to the caches and attends q to them -> [B, H, d] and the two caches.

    k and v [B, K, d] go to `positions` [B] of keys and values [B, K, S, d]; q [B, H, d] attends to those up to there
    (with a window: to its last ones). All float32. A position at or past S marks padding; none is else at or past
    `span`.
    """
    return _call(GROUPED, q.shape, (keys, values), q, k, v, positions, scale=scale, span=span, window=window or 0)


def latent(
    q: jax.Array,
    q_rope: jax.Array,
    latent: jax.Array,
    rope: jax.Array,
    up: jax.Array | PackedMatrix,
    positions: jax.Array,
    latents: jax.Array,
    ropes: jax.Array,
    span: int,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same for multi-head latent attention -> [B, H, v] and the two caches.

    q [B, H, n], q_rope [B, H, R], latent [B, r], rope [B, R], up [H * (n + v), r] (float32, bfloat16, or packed with n
    and v multiples of 8) and caches [B, S, r] and [B, S, R].
    """
    packed = isinstance(up, PackedMatrix)
    data, rows = (up.data, up.layout.rows) if packed else (up, up.shape[0])
    format = format_code(up.layout.format) if packed else PLAIN[up.dtype.name]
    out = (*q.shape[:2], rows // q.shape[1] - q.shape[2])
    operands = q, q_rope, latent, rope, data, positions
    return _call(LATENT, out, (latents, ropes), *operands, scale=scale, span=span, format=format)
