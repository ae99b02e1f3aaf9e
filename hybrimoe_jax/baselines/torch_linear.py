"""Matrices as torch multiplies with them, made once at load from what a checkpoint holds.

`precision` "float32" computes what the formats mean: activations and sums in float32, so answers are those of the dense
model. Torch has no product of float32 activations with narrower weights that is fast (2.13, CPU, one token through
2048 x 1024, one core: 6.3 ms for its int4 kernel in float32, 0.7 ms for the float32 matrix), so narrower weights are
widened, and whoever asks is told. "bfloat16" computes as torch deployments do: activations rounded to bfloat16, and its
kernels for bfloat16 and int4 weights. An int8 matrix with groups is two int4 ones: code = 16 high + low.

Shapes: a matrix is [R, K], R outputs by K inputs; N rows.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from hybrimoe_jax.formats.layout import Format, PackedMatrix
from hybrimoe_jax.formats.packing import TINY, dequantise, unpack
from hybrimoe_jax.formats.plain import BF16

INT4_ROWS, INT4_GROUPS = 16, (32, 64, 128, 256)
"""What torch's int4 kernel takes: rows in multiples of, and group sizes, which divide the columns."""

Tensor = torch.Tensor


def tensor_of(array: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
    """A copy of a float32 or bfloat16 array as a tensor."""
    array = np.ascontiguousarray(array)
    if array.dtype == BF16:
        made = torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    else:
        made = torch.from_numpy(array.copy())
    return made if dtype is None else made.to(dtype)


def plain(matrix: np.ndarray | PackedMatrix, dtype: torch.dtype) -> Tensor:
    """The numbers of a matrix, [R, K], whichever kind it is."""
    return tensor_of(dequantise(matrix) if isinstance(matrix, PackedMatrix) else matrix, dtype)


def rounded(x: Tensor, group: int) -> Tensor:
    """What `-a8` makes of activations x [N, K] float32: `formats.packing.quantise_activations`, as numbers."""
    rows, columns = x.shape
    padding = -columns % group
    full = functional.pad(x, (0, padding)).view(rows, -1, group)
    most = full.abs().amax(dim=2, keepdim=True)
    factor = torch.where(most >= TINY, 127 / most, 0.0)
    scale = torch.where(most >= TINY, most / 127, 0.0)
    return (torch.round(full * factor) * scale).view(rows, -1)[:, :columns]


def fits_int4(rows: int, columns: int, format: Format) -> bool:
    """Whether torch's int4 kernel takes a matrix of this format and size."""
    return rows % INT4_ROWS == 0 and format.group in INT4_GROUPS and columns % format.group == 0


class Int4Matrix:
    """A quantised matrix for `_weight_int4pack_mm_for_cpu`: w = scale * (code - 8) + zero, in bfloat16.

    One of 8 bits has twice the columns: the high halves of its codes with 16 times the scale, then the low ones.
    """

    def __init__(self, matrices: list[PackedMatrix], dtype: torch.dtype = torch.bfloat16):
        codes, scales, zeros = [], [], []
        for matrix in matrices:
            code, scale, zero = unpack(matrix)
            code, scale = torch.from_numpy(code.astype(np.int32)), torch.from_numpy(scale)
            if matrix.layout.format.bits == 8:
                code = torch.cat([(code >> 4) + 8, code & 15], 1)
                scale, zero = torch.cat([16 * scale, scale], 1), torch.cat([0 * scale, 8 * scale], 1)
            else:
                zero = 0 * scale if zero is None else (8 - torch.from_numpy(zero.astype(np.float32))) * scale
            codes.append(code)
            scales.append(scale)
            zeros.append(zero)
        format = matrices[0].layout.format
        self.group, self.twice = format.group, format.bits == 8
        self.codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.cat(codes).contiguous(), 1)
        pair = torch.stack([torch.cat(scales), torch.cat(zeros)], 2)
        self.scales = pair.transpose(0, 1).contiguous().to(dtype)

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.codes, self.scales

    def __call__(self, x: Tensor) -> Tensor:
        return int4_product(x, self.codes, self.scales, self.group, self.twice)


def int4_product(x: Tensor, codes: Tensor, scales: Tensor, group: int, twice: bool) -> Tensor:
    """Of x [N, K], times the transpose of an `Int4Matrix`'s tensors -> [N, R] of x's type."""
    if twice:
        x = torch.cat([x, x], 1)
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, group, scales)


def as_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, without a call of torch where it is so already."""
    return x if x.dtype is dtype else x.to(dtype)


class Norm:
    """x / sqrt(mean(x^2) + eps) over the last axis, as products: torch's own on a CPU is seven operations.

    One token of 192, one core: 5 us instead of 12.
    """

    def __init__(self, width: int, eps: float, device: torch.device):
        self.eps = torch.tensor([eps], device=device)
        self.mean = torch.full((width,), 1 / width, device=device)

    def __call__(self, x: Tensor) -> Tensor:
        """X float32 [N, D] -> [N, D]."""
        return x * torch.addmv(self.eps, x * x, self.mean).rsqrt_()[:, None]


PANEL = 64
"""Rows that torch packs together for AVX-512: inputs one after the other, the first 32 rows in the low halves."""


def int4_widened(x: Tensor, codes: Tensor, scales: Tensor, group: int, twice: bool) -> Tensor:
    """`int4_product` by unpacking the matrix to bfloat16 first: for many rows, whose product torch has a fast kernel.

    Behind one another, since torch writes a transposed result several times slower.
    """
    rows = codes.shape[0]
    columns, half = 2 * codes.shape[1], PANEL // 2
    packed = codes.view(rows // PANEL, columns // group, group, half)
    by_panel = scales.view(columns // group, 1, rows // PANEL, PANEL, 2).permute(2, 0, 1, 3, 4)
    scale, zero = (part.contiguous() for part in (by_panel[..., 0], by_panel[..., 1] - 8 * by_panel[..., 0]))
    panels = torch.empty((rows // PANEL, columns // group, group, PANEL), dtype=scales.dtype)
    for part, at in ((packed & 15, slice(half)), (packed >> 4, slice(half, None))):
        torch.addcmul(zero[..., at], part.to(scales.dtype), scale[..., at], out=panels[..., at])
    wide = panels.view(-1, columns, PANEL).transpose(0, 1).reshape(columns, rows)
    return torch.mm(torch.cat([x, x], 1) if twice else x, wide)


@functools.cache
def unpacks_int4() -> bool:
    """Whether this torch packs as `int4_widened` reads it; another CPU's may not."""
    codes = torch.arange(PANEL * PANEL, dtype=torch.int32).view(PANEL, PANEL) * 7 % 16
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.stack([torch.ones(2, PANEL), torch.zeros(2, PANEL)], 2).to(torch.bfloat16)
    found = int4_widened(torch.eye(PANEL, dtype=torch.bfloat16), packed, scales, PANEL // 2, False)
    return torch.equal(found.t().float(), codes.float() - 8)


class Linear:
    """`y = x W^T + b` for matrices [R, K] behind one another, of one kind.

    Args:
      biases: of each matrix, or None; together or not at all.
      dtype: of the activations, float32 or bfloat16.
      norm: [K] float32, that x is to be multiplied with before; it becomes part of plain matrices.
    """

    def __init__(
        self,
        matrices: list[Any],
        biases: list[Any],
        dtype: torch.dtype,
        device: torch.device,
        norm: Tensor | None = None,
    ):
        self.dtype = dtype
        self.bias = None if biases[0] is None else torch.cat([tensor_of(b, dtype) for b in biases]).to(device)
        self.weight: Tensor | None = None
        self.int4: Int4Matrix | None = None
        self.group = 0
        packed = [m for m in matrices if isinstance(m, PackedMatrix)]
        if packed and packed[0].layout.format.a8 and dtype == torch.float32:
            self.group = packed[0].layout.format.group
        kernel = dtype == torch.bfloat16 and device.type == "cpu" and len(packed) == len(matrices)
        if kernel and all(fits_int4(*m.shape, m.layout.format) for m in packed):
            self.int4 = Int4Matrix(packed)
        else:
            self.weight = torch.cat([plain(m, torch.float32) for m in matrices]).to(device)
            if norm is not None and not self.group and dtype == torch.float32:
                self.weight, norm = self.weight * norm, None
            self.weight = as_type(self.weight, dtype)
        self.norm = norm

    @property
    def rows(self) -> int:
        """R of all matrices together."""
        return len(self.weight) if self.int4 is None else len(self.int4.codes)  # pyright: ignore[reportArgumentType]

    @property
    def nbytes(self) -> int:
        tensors = [self.weight] if self.int4 is None else list(self.int4.tensors)
        return sum(t.nbytes for t in (*tensors, self.bias) if t is not None)

    def __call__(self, x: Tensor) -> Tensor:
        if self.norm is not None:
            x = x * self.norm
        x = as_type(x, self.dtype)
        if self.int4 is not None:
            y = self.int4(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
            return y if self.bias is None else y + self.bias
        if self.group:
            x = rounded(x.reshape(-1, x.shape[-1]), self.group).view(x.shape)
        return functional.linear(x, self.weight, self.bias)  # pyright: ignore[reportArgumentType]  one of the two is set
