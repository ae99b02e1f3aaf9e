"""Quantised formats: their names, what their numbers mean, and the one byte layout that every side reads.

Shapes: a matrix is [R, K], R outputs by K inputs; G values along K share a scale (the last group may be shorter).

A format is called `int8-g64`, `int4-g128`, `int4z-g64-s32-a8`:

    int8    codes -127..127              w = scale * code
    int4    codes 0..15                  w = scale * (code - 8)
    int4z   codes 0..15, zero points     w = scale * (code - zero), zero 0..255 for each group
    -gG     group size along the inputs: 32, 64 or 128
    -s32    scales are float32 instead of float16
    -a8     activations are quantised too, see `packing.quantise_activations`; without it they stay float32

**Layout.** One buffer of bytes holds codes, scales and zero points, each part beginning at a multiple of 64 bytes. It
is the same in a checkpoint, in host memory, on the link and in a device slot, and depends on no instruction set. Rows
go in panels of 8, the inputs in steps of 4: a dot-product instruction multiplies 4 neighbouring bytes of a row by 4
activations, so that 8 rows fill 32 bytes, two steps 64. R is padded to a multiple of 8, K to a multiple of 32; padded
rows have scale 0, and kernels take activations past K as 0, so that what the codes there mean does not matter.

    int8 codes   [R/8][K/4][8 rows][4 inputs]               one byte each
    int4 codes   [R/8][K/8][8 rows][4 inputs]               byte: input 8i + j in its low half, 8i + 4 + j in its high
    scales       [R/8][groups][8 rows]                      float16 or float32, little-endian
    zero points  [R/8][groups][8 rows]                      uint8

An expert's buffer is its gate, up and down matrices one after the other.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import numpy as np

from hybrimoe_jax.errors import UserError, shown
from hybrimoe_jax.formats.plain import ALIGNMENT

PANEL, STEP, PADDED = 8, 4, 32
GROUPS = (32, 64, 128)
PLAIN = ("f32", "bf16")
"""Formats that are not quantised."""
QUANTISED = (
    "a quantised one: int8-g64, int4-g64, int4z-g128, int4-g32-a8 and the like (groups 32, 64 or 128; -s32: float32 "
    "scales; -a8: int8 activations)"
)
"""Of a message that lists what may be said."""
_NAME = re.compile(r"int(8|4|4z)-g(32|64|128)(-s32)?(-a8)?")


@dataclasses.dataclass(frozen=True)
class Format:
    """A quantised format; `Format.parse(name)` and `str(format)` convert. `a8`: int8 activations."""

    bits: int
    group: int
    zeros: bool = False  # zero points
    scale: str = "f16"
    a8: bool = False

    @staticmethod
    @functools.cache
    def parse(name: str) -> Format:
        """Raises UserError for what is not a format's name."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise UserError(f"format {shown(name)} is not known; say {QUANTISED}")
        kind, group, scale, a8 = match.groups()
        return Format(int(kind[0]), int(group), kind == "4z", "f32" if scale else "f16", bool(a8))

    def __str__(self) -> str:
        parts = (f"int{self.bits}{'z' * self.zeros}-g{self.group}", "-s32" * (self.scale == "f32"), "-a8" * self.a8)
        return "".join(parts)

    @property
    def scale_dtype(self) -> np.dtype:
        return np.dtype("<f2" if self.scale == "f16" else "<f4")

    @property
    def middle(self) -> int:
        """The code that means zero where there are no zero points."""
        return 8 if self.bits == 4 else 0


def is_format(name: str) -> bool:
    """Whether this is the name of a quantised format."""
    return _NAME.fullmatch(name) is not None


def check_format(name: str) -> None:
    """UserError, listing the names, for what is neither a plain format nor a quantised one."""
    if name not in PLAIN and not is_format(name):
        raise UserError(f"format {shown(name)} is not known; say {', '.join(PLAIN)}, or {QUANTISED}")


def _padded(n: int, to: int) -> int:
    return -(-n // to) * to


@dataclasses.dataclass(frozen=True)
class MatrixLayout:
    """Where the parts of a packed [rows, columns] matrix lie, in bytes from its start."""

    format: Format
    rows: int
    columns: int

    @property
    def panels(self) -> int:
        return _padded(self.rows, PANEL) // PANEL

    @property
    def depth(self) -> int:
        """K, padded."""
        return _padded(self.columns, PADDED)

    @property
    def groups(self) -> int:
        return -(-self.columns // self.format.group)

    @property
    def codes_nbytes(self) -> int:
        return self.panels * PANEL * self.depth * self.format.bits // 8

    @property
    def scales_at(self) -> int:
        return _padded(self.codes_nbytes, ALIGNMENT)

    @property
    def zeros_at(self) -> int:
        return self.scales_at + _padded(self.panels * self.groups * PANEL * self.format.scale_dtype.itemsize, ALIGNMENT)

    @property
    def nbytes(self) -> int:
        return self.zeros_at + (_padded(self.panels * self.groups * PANEL, ALIGNMENT) if self.format.zeros else 0)


@dataclasses.dataclass(frozen=True)
class PackedMatrix:
    """`data` uint8 [layout.nbytes], numpy or jax; a pytree whose only leaf is `data` (see `models.packed`)."""

    data: Any
    layout: MatrixLayout

    @property
    def shape(self) -> tuple[int, int]:
        """[R, K]."""
        return self.layout.rows, self.layout.columns

    @property
    def size(self) -> int:
        return self.layout.rows * self.layout.columns

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes


@dataclasses.dataclass(frozen=True)
class ExpertLayout:
    """Where an expert's three matrices lie. width D, hidden F: gate and up are [F, D], down is [D, F]."""

    format: Format
    width: int
    hidden: int

    @functools.cached_property
    def inward(self) -> MatrixLayout:
        return MatrixLayout(self.format, self.hidden, self.width)

    @functools.cached_property
    def outward(self) -> MatrixLayout:
        return MatrixLayout(self.format, self.width, self.hidden)

    @property
    def nbytes(self) -> int:
        return 2 * self.inward.nbytes + self.outward.nbytes


@dataclasses.dataclass(frozen=True)
class PackedExpert:
    """One routed expert: `data` uint8 [layout.nbytes]; a pytree whose only leaf is `data`."""

    data: Any
    layout: ExpertLayout

    @property
    def matrices(self) -> tuple[PackedMatrix, PackedMatrix, PackedMatrix]:
        """gate, up, down: views of `data`."""
        size, inward = self.layout.inward.nbytes, self.layout.inward
        return (
            PackedMatrix(self.data[:size], inward),
            PackedMatrix(self.data[size : 2 * size], inward),
            PackedMatrix(self.data[2 * size :], self.layout.outward),
        )

    @property
    def width(self) -> int:
        return self.layout.width

    @property
    def hidden(self) -> int:
        return self.layout.hidden

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes
