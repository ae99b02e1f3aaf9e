"""Quantised experts in NumPy: the reference that every other kernel of packed experts is tested against.

Shapes: N load, [R, K] a matrix of R outputs and K inputs, G groups along K.

A block of rows is turned into float32 while it is in the cache, `(code - zero) * scale` in this order, and multiplied by
BLAS, which accumulates in float32. With `-a8` the inputs of each product are first rounded as `packing.quantise_activations`
says, at every load: those of gate and up are the expert's input, those of down are `silu(gate) * up`. A product of int8 codes
summed as integers differs from this only by the rounding of float32 sums.
"""

from __future__ import annotations

import numpy as np

from hybrimoe_jax.host_kernels.kernel import Scratch
from hybrimoe_jax.formats.packing import PANEL, Format, PackedExpert, PackedMatrix, quantise_activations

BLOCK_FLOATS = 64 * 1024
NIBBLES = np.uint32(0x0F0F0F0F)

_scratch = Scratch()


def rounded_activations(x: np.ndarray, format: Format) -> np.ndarray:
    """x [N, K] as a product in this format sees it: rounded to int8 codes and back with `-a8`, else x itself."""
    if not format.a8:
        return x
    codes, scales = quantise_activations(x, format.group)
    return codes.astype(np.float32) * scales[:, np.arange(x.shape[1]) // format.group]


def dequantise_panels(matrix: PackedMatrix, start: int, stop: int, out: np.ndarray) -> np.ndarray:
    """Rows of the panels [start, stop) -> out [8 (stop - start), depth] float32, equal to `packing.dequantise`'s bit for bit."""
    layout = matrix.layout
    format, data, count = layout.format, np.asarray(matrix.data), stop - start
    # Four neighbouring inputs are one 32-bit word, so that rows are brought together without touching single bytes.
    words = data[: layout.codes_nbytes].view(np.uint32).reshape(layout.panels, -1, PANEL)[start:stop].transpose(0, 2, 1)
    if format.bits == 4:
        both = np.empty((*words.shape, 2), np.uint32)
        np.bitwise_and(words, NIBBLES, out=both[..., 0])
        np.bitwise_and(words >> np.uint32(4), NIBBLES, out=both[..., 1])
        codes = both.view(np.uint8)
    else:
        codes = np.ascontiguousarray(words).view(np.int8)
    np.copyto(out, codes.reshape(count * PANEL, layout.depth), casting="unsafe")

    def by_row(at: int, dtype: np.dtype) -> np.ndarray:
        values = data[at:][: layout.panels * layout.groups * PANEL * dtype.itemsize].view(dtype)
        values = values.reshape(layout.panels, layout.groups, PANEL)[start:stop].transpose(0, 2, 1)
        return values.astype(np.float32).reshape(count * PANEL, layout.groups, 1)

    scales = by_row(layout.scales_at, format.scale_dtype)
    offsets = by_row(layout.zeros_at, np.dtype(np.uint8)) if format.zeros else None
    whole = layout.depth // format.group  # the last group may be shorter
    for groups, part in (
        (slice(0, whole), out[:, : whole * format.group].reshape(count * PANEL, whole, format.group)),
        (slice(whole, None), out[:, None, whole * format.group :]),
    ):
        if part.size:
            if offsets is not None:
                part -= offsets[:, groups]
            elif format.middle:
                part -= np.float32(format.middle)
            part *= scales[:, groups]
    return out


def product(matrix: PackedMatrix, x: np.ndarray, out: np.ndarray) -> None:
    """matrix [R, K] times x [N, K] (as `rounded_activations` gives it) -> out [R, N], a block of rows at a time."""
    layout = matrix.layout
    step = max(1, BLOCK_FLOATS // (PANEL * layout.depth)) * (1 if len(x) <= 16 else 8)
    for start in range(0, layout.panels, step):
        stop = min(start + step, layout.panels)
        block = dequantise_panels(matrix, start, stop, _scratch.view("block", (stop - start) * PANEL, layout.depth))
        rows = slice(start * PANEL, min(stop * PANEL, layout.rows))
        np.matmul(block[: rows.stop - rows.start, : layout.columns], x.T, out=out[rows])


def packed_expert(expert: PackedExpert, x: np.ndarray, out: np.ndarray, silu_times) -> np.ndarray:
    """x [N, D] float32 -> out [N, D]; `silu_times(gate, up, out)` is the reference kernel's."""
    format, load = expert.layout.format, len(x)
    gate, up, down = expert.matrices
    seen = rounded_activations(x, format)
    act = _scratch.view("gate", expert.hidden, load)
    both = _scratch.view("up", expert.hidden, load)
    product(gate, seen, act)
    product(up, seen, both)
    inner = silu_times(act, both, both).T
    y = _scratch.view("y", expert.width, load)
    product(down, rounded_activations(inner, format), y)
    np.copyto(out, y.T)
    return out
