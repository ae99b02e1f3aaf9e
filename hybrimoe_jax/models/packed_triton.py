"""Quantised experts at decode on a GPU: Pallas kernels, compiled by Triton, that read a slot's bytes once, as they lie.

The reference is `models.packed.packed_forward`, which leaves to XLA whether the unpacking is fused into the product.
Here it always is: one kernel computes silu(gate) * up, a second one down. Each takes the slot's whole buffer, codes,
scales and zero points at their offsets in it, because XLA would copy a part of a buffer, or one seen as another type,
before it calls a kernel.

A program of the grid computes one panel, 8 outputs of every token. It walks the panel's codes tile by tile: one load of
neighbouring bytes, unpacked in registers, multiplied by the inputs of each token and then by their group's scale,
summed in float32. Weights are those of the reference but for the rounding of scale * code where scales are float32;
sums are taken in another order.

Nothing here was timed on a GPU yet (docs/gpu.md), so the reference is what runs unless `--device-kernel pallas` is
given. jax 0.11 calls its Triton backend deprecated: `available` says whether this jax still has it.

Shapes: N tokens, at most `MOST_ROWS`; a tile is T lines of 32 bytes, in g groups of c lines; a line is 8 rows of a
panel by 4 bytes.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from hybrimoe_jax.formats.packing import PANEL, STEP, MatrixLayout, PackedExpert
from hybrimoe_jax.models.packed import rounded_activations

try:
    triton: Any = importlib.import_module("jax.experimental.pallas.triton")
except ImportError:
    triton = None

MOST_ROWS = 8
"""Tokens in a call; a program keeps sums of each in registers. With more the reference's matrix product pays."""
LINE = PANEL * STEP
TILE_LINES = 256
"""Lines that a program has on their way at one token, 16 registers of sums a thread and matrix; at more, fewer."""
WARPS = 4


def available() -> bool:
    """Whether this jax has what the kernels are compiled with."""
    return triton is not None


def triton_forward(expert: PackedExpert, x: jax.Array, interpret: bool = False) -> jax.Array:
    """x [N, D] -> the expert's output [N, D], N at most `MOST_ROWS`.

    `interpret`: emulate the kernels with jax operations, on any backend; slow, for tests.
    """
    layout = expert.layout
    chex.assert_shape(x, (None, layout.inward.columns))
    chex.assert_shape(expert.data, (layout.nbytes,))
    inward, outward = layout.inward, layout.outward
    seen = rounded_activations(x, layout.format)
    inner = _call(_silu_gate_up, (inward, inward), (0, inward.nbytes), expert.data, seen, interpret)
    return _call(
        _plain, (outward,), (2 * inward.nbytes,), expert.data, rounded_activations(inner, layout.format), interpret
    )


def _silu_gate_up(gate: jax.Array, up: jax.Array) -> jax.Array:
    return gate / (1 + jnp.exp(-gate)) * up


def _plain(product: jax.Array) -> jax.Array:
    return product


def _call(
    combine, layouts: Sequence[MatrixLayout], at: Sequence[int], data, x: jax.Array, interpret: bool
) -> jax.Array:
    """`combine` of the products of x [N, K] with matrices [R, K] of one layout -> [N, R].

    The matrices begin at bytes `at` of `data`.
    """
    layout, tokens = layouts[0], x.shape[0]
    kernel = functools.partial(_kernel, combine, layouts, at)
    params = None if interpret else triton.CompilerParams(num_warps=WARPS, num_stages=1)
    out = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((tokens, layout.panels * PANEL), jnp.float32),
        grid=(layout.panels,),
        interpret=interpret,
        compiler_params=params,
    )(data, x)
    return out[:, : layout.rows]


def _kernel(combine, layouts: Sequence[MatrixLayout], at: Sequence[int], data, x, out) -> None:
    """One panel. Refs: data uint8 [bytes], x float32 [N, K], out float32 [N, panels * 8]."""
    panel, layout = pl.program_id(0), layouts[0]
    tokens, columns = x.shape
    inputs, lines = _inputs(layout), layout.depth // _inputs(layout)
    tile = min(TILE_LINES // pl.next_power_of_2(tokens), pl.next_power_of_2(lines))

    def add(step, sums):
        line = step * tile + jax.lax.broadcasted_iota(jnp.int32, (tile, PANEL, STEP), 0)
        column = line * inputs + jax.lax.broadcasted_iota(jnp.int32, (tile, PANEL, STEP), 2)
        halves = [column + half for half in range(0, inputs, STEP)]
        whole = columns % (tile * inputs) == 0
        weights = [_weights(data, layout, start, panel, step * tile, tile) for start in at]
        sums = [list(of_matrix) for of_matrix in sums]
        for token in range(tokens):
            seen = [_load(x, (token, half), None if whole else half < columns) for half in halves]
            for (codes, scales), of_matrix in zip(weights, sums):
                products = sum(code * value for code, value in zip(codes, seen))
                of_matrix[token] += jnp.sum(products, axis=2) * scales
        return sums

    nothing = jnp.zeros((tile, PANEL), jnp.float32)
    sums = jax.lax.fori_loop(0, -(-lines // tile), add, [[nothing] * tokens for _ in at])
    for token, parts in enumerate(zip(*sums)):
        out[token, pl.ds(panel * PANEL, PANEL)] = combine(*(jnp.sum(part, axis=0) for part in parts))


def _weights(data, layout: MatrixLayout, start: int, panel, first, tile: int) -> tuple[list[jax.Array], jax.Array]:
    """Lines first .. first + tile of a panel of the matrix at byte `start`: codes and scales.

    Codes less their zero, float32 [T, 8, 4], the first 4 inputs of each line and the next 4 where a byte holds two; and
    scales [T, 8]. Past the panel's last line both are 0.
    """
    format, lines = layout.format, layout.depth // _inputs(layout)

    def part(at: int, per_panel: int, size: int, in_group: int) -> jax.Array:
        """uint8 [T, 8, size]: each row's bytes for each line in the part at `at`, one for every `in_group` lines."""
        line, row, byte = (jax.lax.broadcasted_iota(jnp.int32, (tile, PANEL, size), axis) for axis in range(3))
        line = first + line
        index = jax.lax.div(line, in_group) * (PANEL * size) + row * size + byte
        return _load(data, (start + at + panel * per_panel + index,), None if lines % tile == 0 else line < lines)

    in_group, per_group = format.group // _inputs(layout), layout.groups * PANEL
    raw = part(0, lines * LINE, STEP, 1)
    codes = [raw & 15, raw >> 4] if format.bits == 4 else [jax.lax.bitcast_convert_type(raw, jnp.int8)]
    codes = [code.astype(jnp.float32) for code in codes]
    if format.zeros:
        zeros = part(layout.zeros_at, per_group, 1, in_group).astype(jnp.float32)
        codes = [code - zeros for code in codes]
    elif format.middle:
        codes = [code - format.middle for code in codes]
    size = format.scale_dtype.itemsize
    return codes, _floats(part(layout.scales_at, per_group * size, size, in_group))


def _inputs(layout: MatrixLayout) -> int:
    """How many inputs a line of the codes covers: 4, or 8 where a byte holds two."""
    return STEP * 8 // layout.format.bits


def _floats(raw: jax.Array) -> jax.Array:
    """Little-endian float16 [..., 2] or float32 [..., 4] as bytes -> float32 [...]."""
    shifts = 8 * jax.lax.broadcasted_iota(jnp.int32, raw.shape, raw.ndim - 1)
    words = jnp.sum(raw.astype(jnp.int32) << shifts, axis=-1)
    if raw.shape[-1] == 2:
        return jax.lax.bitcast_convert_type(words.astype(jnp.int16), jnp.float16).astype(jnp.float32)
    return jax.lax.bitcast_convert_type(words, jnp.float32)


def _load(ref, index: tuple, inside: jax.Array | None) -> jax.Array:
    """ref[index], 0 where not `inside` (None: everywhere is inside)."""
    return triton.load(ref.at[index]) if inside is None else triton.load(ref.at[index], mask=inside, other=0)
