"""Quantised matrices and experts: rounding numbers to codes, laying codes out (`layout` says how), and back.

Shapes: a matrix is [R, K], R outputs by K inputs; G values along K share a scale.
"""

# NumPy 2.5 types some functions by what its stubs leave unknown.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import numpy as np

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.layout import (
    PANEL,
    STEP,
    ExpertLayout,
    Format,
    MatrixLayout,
    PackedExpert,
    PackedMatrix,
)
from hybrimoe_jax.formats.plain import F32, ExpertWeights, aligned_empty, is_finite

TINY = np.float32(2.0**-100)
"""Groups of activations whose largest magnitude is below this count as zeros."""
NIBBLES = np.uint32(0x0F0F0F0F)


def pack(
    format: Format,
    codes: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray | None = None,
    out: np.ndarray | None = None,
) -> PackedMatrix:
    """Lays out codes [R, K] (int8, or uint8 0..15), scales [R, groups] and zero points [R, groups] (uint8).

    `out`: a uint8 buffer of the layout's size to fill. Scales are rounded to the format's type here.
    """
    layout = MatrixLayout(format, *codes.shape)
    if scales.shape != (layout.rows, layout.groups) or (zeros is None) == format.zeros:
        raise ValueError(f"{format}: scales {scales.shape} and zero points do not fit codes {codes.shape}")
    data = aligned_empty(layout.nbytes, np.uint8) if out is None else out
    data[:] = 0
    rows, depth = layout.panels * PANEL, layout.depth
    full = np.full((rows, depth), format.middle, np.uint8)
    if zeros is not None:  # padding of a row's last group decodes to zero as well, where a code can
        full[: layout.rows] = np.minimum(zeros[:, -1:], 15)
        full[layout.rows :] = 0
    full[: layout.rows, : layout.columns] = codes.view(np.uint8)
    steps = full.reshape(layout.panels, PANEL, depth // STEP, STEP).transpose(0, 2, 1, 3)
    if format.bits == 4:
        steps = steps[:, 0::2] | (steps[:, 1::2] << 4)
    data[: layout.codes_nbytes] = steps.reshape(-1)
    by_panel = _by_panel(layout, scales.astype(format.scale_dtype))
    data[layout.scales_at :][: by_panel.nbytes] = by_panel.reshape(-1).view(np.uint8)
    if zeros is not None:
        data[layout.zeros_at :][: rows * layout.groups] = _by_panel(layout, zeros).reshape(-1)
    return PackedMatrix(data, layout)


def _by_panel(layout: MatrixLayout, values: np.ndarray) -> np.ndarray:
    """[R, groups] -> [panels, groups, 8], zeros for padding."""
    full = np.zeros((layout.panels * PANEL, layout.groups), values.dtype)
    full[: layout.rows] = values
    return np.ascontiguousarray(full.reshape(layout.panels, PANEL, layout.groups).transpose(0, 2, 1))


def unpack(matrix: PackedMatrix) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """What `pack` was given: codes [R, K], scales [R, groups] float32, zero points [R, groups] or None."""
    layout, data = matrix.layout, np.asarray(matrix.data)
    format = layout.format
    # A step's four inputs of a row are one 32-bit word.
    words = data[: layout.codes_nbytes].view(np.uint32).reshape(layout.panels, -1, PANEL).transpose(0, 2, 1)
    if format.bits == 4:
        words = np.stack([words & NIBBLES, words >> 4 & NIBBLES], axis=3)
    full = np.ascontiguousarray(words).view(np.uint8).reshape(layout.panels * PANEL, layout.depth)
    codes = np.ascontiguousarray(full[: layout.rows, : layout.columns])
    count = layout.panels * layout.groups * PANEL

    def rows_of(start: int, dtype: np.dtype) -> np.ndarray:
        values = data[start : start + count * dtype.itemsize].view(dtype)
        return (
            values.reshape(layout.panels, layout.groups, PANEL)
            .transpose(0, 2, 1)
            .reshape(-1, layout.groups)[: layout.rows]
        )

    scales = rows_of(layout.scales_at, format.scale_dtype).astype(np.float32)
    zeros = rows_of(layout.zeros_at, np.dtype(np.uint8)).copy() if format.zeros else None
    return codes if format.bits == 4 else codes.view(np.int8), scales, zeros


def scales_are_finite(matrix: PackedMatrix) -> bool:
    """Whether its numbers are: a scale times the farthest code."""
    layout, dtype = matrix.layout, matrix.layout.format.scale_dtype
    nbytes = layout.panels * layout.groups * PANEL * dtype.itemsize
    farthest = 127 if layout.format.bits == 8 else 15 if layout.format.zeros else 8
    scales = np.asarray(matrix.data[layout.scales_at : layout.scales_at + nbytes]).view(dtype)
    with np.errstate(over="ignore"):
        return is_finite(scales.astype(np.float32) * np.float32(farthest))


def dequantise(matrix: PackedMatrix) -> np.ndarray:
    """The float32 matrix [R, K] that the codes stand for (float32 products of scale and code)."""
    codes, scales, zeros = unpack(matrix)
    format, columns = matrix.layout.format, matrix.layout.columns

    def by_column(values: np.ndarray) -> np.ndarray:
        return np.repeat(values, format.group, axis=1)[:, :columns]

    out = codes.astype(np.float32)
    out -= np.float32(format.middle) if zeros is None else by_column(zeros)
    out *= by_column(scales)
    return out


def quantise_activations(x: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """The `-a8` rule: x [N, K] float32 -> codes [N, K] int8 in -127..127, scales [N, groups] float32.

    In every group m is the largest magnitude, in float32: code = x * (127 / m) rounded to the nearest, ties to even;
    scale = m / 127. A group with m < 2^-100 is all zeros.
    """
    rows, columns = x.shape
    groups = -(-columns // group)
    full = np.zeros((rows, groups * group), np.float32)
    full[:, :columns] = x
    full = full.reshape(rows, groups, group)
    most = np.abs(full).max(axis=2, keepdims=True)
    alive = most >= TINY
    factor = np.divide(np.float32(127), most, out=np.zeros_like(most), where=alive)
    codes = np.rint(full * factor).astype(np.int8).reshape(rows, -1)[:, :columns]
    return codes, np.where(alive, most / np.float32(127), np.float32(0))[:, :, 0]


def quantise(weights: np.ndarray, format: Format) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Round to nearest: float32 [R, K] -> what `pack` takes. Scales are rounded to the format's type first.

    int8: the largest magnitude of a group becomes 127. int4: the value of largest magnitude becomes code 0 (that is -8
    times the scale, which may be negative). int4z: the group's range, widened to include 0, becomes 0..15.
    """
    rows, columns = weights.shape
    size = format.group
    groups = -(-columns // size)
    full = np.zeros((rows, groups * size), np.float32)
    full[:, :columns] = weights
    full = full.reshape(rows, groups, size)
    zeros = None
    if format.zeros:
        low, high = np.minimum(full.min(axis=2), 0), np.maximum(full.max(axis=2), 0)
        scales = _rounded((high - low) / 15, format)
        zeros = np.clip(np.rint(-low * reciprocal(scales)), 0, 15).astype(np.uint8)
        codes = np.rint(full * reciprocal(scales)[:, :, None]) + zeros[:, :, None]
        codes = np.clip(codes, 0, 15).astype(np.uint8)
    elif format.bits == 4:
        extreme = np.take_along_axis(full, np.abs(full).argmax(axis=2)[:, :, None], axis=2)[:, :, 0]
        scales = _rounded(extreme / -8, format)
        codes = np.clip(np.rint(full * reciprocal(scales)[:, :, None]) + 8, 0, 15).astype(np.uint8)
    else:
        scales = _rounded(np.abs(full).max(axis=2) / 127, format)
        codes = np.clip(np.rint(full * reciprocal(scales)[:, :, None]), -127, 127).astype(np.int8)
    return np.ascontiguousarray(codes.reshape(rows, -1)[:, :columns]), scales, zeros


def _rounded(scales: np.ndarray, format: Format) -> np.ndarray:
    return scales.astype(format.scale_dtype).astype(np.float32)


def reciprocal(scales: np.ndarray) -> np.ndarray:
    """1 / scales, 0 where a scale is 0."""
    return np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)


def pack_expert(gate: np.ndarray, up: np.ndarray, down: np.ndarray, format: Format) -> PackedExpert:
    """Rounds an expert (gate, up [F, D], down [D, F], float32) to the format."""
    layout = ExpertLayout(format, down.shape[0], down.shape[1])
    expert = PackedExpert(aligned_empty(layout.nbytes, np.uint8), layout)
    for weights, place in zip((gate, up, down), expert.matrices, strict=True):
        pack(format, *quantise(weights, format), out=place.data)
    return expert


HostExpert = ExpertWeights | PackedExpert
"""A routed expert in host memory, of whichever kind its checkpoint stores."""


def dequantise_expert(expert: PackedExpert) -> ExpertWeights:
    """The float32 expert that the codes stand for."""
    width, hidden = expert.width, expert.hidden
    weights = ExpertWeights(aligned_empty((2 * hidden, width)), aligned_empty((width, hidden)))
    gate, up, down = expert.matrices
    weights.gate_up[:hidden], weights.gate_up[hidden:] = dequantise(gate), dequantise(up)
    weights.down[:] = dequantise(down)
    return weights


def plain_expert(expert: HostExpert) -> ExpertWeights:
    """The expert's numbers in plain matrices, whichever kind it is."""
    return dequantise_expert(expert) if isinstance(expert, PackedExpert) else expert


def plain_matrix(matrix: PackedMatrix | np.ndarray) -> np.ndarray:
    """The matrix's numbers in float32, whichever kind it is."""
    return dequantise(matrix) if isinstance(matrix, PackedMatrix) else np.asarray(matrix, np.float32)


def format_of(expert: HostExpert) -> str:
    """The name of an expert's weight format: `f32`, `bf16`, or that of a quantised one."""
    if isinstance(expert, PackedExpert):
        return str(expert.layout.format)
    return "f32" if expert.down.dtype == F32 else "bf16"


def check_packed(expert: PackedExpert, where: str = "expert") -> None:
    """Raises UserError where the buffer is not the one that its layout describes."""
    data, size = expert.data, expert.layout.nbytes
    if data.dtype != np.uint8 or data.shape != (size,) or not data.flags.c_contiguous:
        raise UserError(f"{where}: {expert.layout.format} data is {data.dtype} {data.shape}; uint8 [{size}] is needed")


def refuse_packed(expert: HostExpert, kernel: str) -> ExpertWeights:
    """The plain expert given; UserError for a quantised one, in the name of a kernel that computes none."""
    if isinstance(expert, PackedExpert):
        raise packed_refusal(str(expert.layout.format), kernel)
    return expert


def packed_refusal(fmt: str, kernel: str) -> UserError:
    """Of experts in a quantised format, by a kernel that computes none."""
    return UserError(
        f"host kernel {kernel} computes float32 and bfloat16 experts, and these are {fmt}; "
        "use auto, native or reference"
    )
