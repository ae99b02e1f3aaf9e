"""Quantised experts inside jitted programs: the packed bytes are the argument, dequantised where they are multiplied.

`PackedMatrix` and `PackedExpert` (`formats.packing`) are registered as pytrees here. Their bytes are the leaf and their
layout is static, so a program is compiled per layout and a slot is one array. Only one matrix at a time exists in
float32, and on a GPU none for few rows: there a product is a sum for each row (`_summed`), which XLA fuses with the
unpacking. A dot would write the float32 matrix to memory first.

Host and device mean the same by an expert: the dequantised weights and, with `-a8`, the rounded activations are bit for
bit those of the NumPy reference (`host_kernels.reference`). Sums differ by float32 rounding, and so may the
silu(gate) * up that is rounded again for down: there a value next to a rounding boundary can take the other step.

Measured on XLA:CPU (one core, 1408 x 2048, int4-g64, load 1): this form 1.3 ms; a product over the panels as they lie
2.3 ms; multiply and reduce without a matrix 6.7 ms.

Shapes: N tokens, [R, K] a matrix of R outputs and K inputs, P panels of 8 rows, S steps of 4 inputs, G groups.
"""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np

from hybrimoe_jax.formats.packing import (
    PANEL,
    STEP,
    TINY,
    Format,
    PackedExpert,
    PackedMatrix,
)
from hybrimoe_jax.models.precision import SMALLEST_SIDE, einsum

FEW_ROWS = 8
"""Up to that many rows a GPU unpacks while it multiplies; with more, writing the matrix once costs less."""

jax.tree_util.register_dataclass(PackedMatrix, data_fields=["data"], meta_fields=["layout"])
jax.tree_util.register_dataclass(PackedExpert, data_fields=["data"], meta_fields=["layout"])


def dequantise(matrix: PackedMatrix) -> jax.Array:
    """The float32 matrix [R, K] that the codes stand for."""
    layout = matrix.layout
    chex.assert_shape(matrix.data, (layout.nbytes,))
    chex.assert_type(matrix.data, jnp.uint8)
    panels, steps = layout.panels, layout.depth // STEP
    raw = matrix.data[: layout.codes_nbytes]
    if layout.format.bits == 4:
        # Shifts along an axis, not a stack of two halves: a GPU's fusions would write a stack to memory.
        halves = jnp.arange(0, 8, 4, dtype=jnp.uint8)[:, None, None]
        pairs = raw.reshape(panels, steps // 2, 1, PANEL, STEP)
        codes = (pairs >> halves & 15).reshape(panels, steps, PANEL, STEP)
    else:
        codes = jax.lax.bitcast_convert_type(raw, jnp.int8).reshape(panels, steps, PANEL, STEP)
    weights = codes.astype(jnp.float32)
    if layout.format.zeros:
        weights = weights - _by_step(matrix, layout.zeros_at, np.dtype(np.uint8))
    elif layout.format.middle:
        weights = weights - layout.format.middle
    weights = weights * _by_step(matrix, layout.scales_at, layout.format.scale_dtype)
    return weights.transpose(0, 2, 1, 3).reshape(panels * PANEL, layout.depth)[: layout.rows, : layout.columns]


def _by_step(matrix: PackedMatrix, at: int, dtype: np.dtype) -> jax.Array:
    """Scales or zero points from byte `at` on, for every step of every row: float32 [P, S, 8, 1]."""
    layout = matrix.layout
    shape = (layout.panels, layout.groups, PANEL)
    raw = matrix.data[at : at + int(np.prod(shape)) * dtype.itemsize]
    if dtype.itemsize > 1:
        raw = jax.lax.bitcast_convert_type(raw.reshape(-1, dtype.itemsize), dtype.newbyteorder("="))
    steps = layout.format.group // STEP
    values = jnp.broadcast_to(raw.reshape(shape)[:, :, None], (*shape[:2], steps, PANEL))
    values = values.reshape(layout.panels, layout.groups * steps, PANEL)[:, : layout.depth // STEP]
    return values.astype(jnp.float32)[..., None]


def rounded_activations(x: jax.Array, format: Format) -> jax.Array:
    """x [N, K] as a product in this format sees it: rounded to int8 codes and back with `-a8`, else x itself."""
    chex.assert_rank(x, 2)
    if not format.a8:
        return x
    rows, columns = x.shape
    groups = -(-columns // format.group)
    full = jnp.pad(x, ((0, 0), (0, groups * format.group - columns))).reshape(rows, groups, format.group)
    most = jnp.max(jnp.abs(full), axis=2, keepdims=True)
    alive = most >= TINY
    # Behind a barrier 127 is no constant: XLA would multiply by its rounded inverse where NumPy divides.
    top = jax.lax.optimization_barrier(jnp.float32(127))
    codes = jnp.round(full * jnp.where(alive, top / jnp.where(alive, most, 1), 0))
    return (codes * jnp.where(alive, most / top, 0)).reshape(rows, -1)[:, :columns]


def matmul(x: jax.Array, matrix: PackedMatrix) -> jax.Array:
    """x [N, K] (as `rounded_activations` gives it) times the matrix [R, K] -> [N, R]."""
    chex.assert_shape(x, (None, matrix.layout.columns))
    if x.shape[0] > FEW_ROWS:
        return _multiplied(x, matrix)
    return jax.lax.platform_dependent(x, matrix, cuda=_summed, default=_multiplied)


def _multiplied(x: jax.Array, matrix: PackedMatrix) -> jax.Array:
    return einsum("nk,rk->nr", x, dequantise(matrix))


def _summed(x: jax.Array, matrix: PackedMatrix) -> jax.Array:
    """The same without a dot: XLA makes one fusion of the unpacking and the sums of all rows."""
    weights = dequantise(matrix)
    return jnp.stack([jnp.sum(weights * row, axis=1) for row in x])


def packed_forward(expert: PackedExpert, x: jax.Array) -> jax.Array:
    """x [N, D] -> the expert's output [N, D]."""
    format = expert.layout.format
    gate, up, down = expert.matrices
    seen = rounded_activations(x, format)
    gated, up = _after(jax.nn.silu(matmul(seen, gate)), up)
    inner, down = _after(gated * matmul(seen, up), down)
    return matmul(rounded_activations(inner, format), down)


def _after(rows: jax.Array, matrix: PackedMatrix) -> tuple[jax.Array, PackedMatrix]:
    """Has a matrix unpacked once `rows` [N, R] are there: XLA unpacks all of an expert's before it multiplies.

    Not for few rows, which are computed without a float matrix where XLA finds a way.
    """
    if rows.shape[0] < SMALLEST_SIDE:
        return rows, matrix
    rows, data = jax.lax.optimization_barrier((rows, matrix.data))
    return rows, dataclasses.replace(matrix, data=data)
