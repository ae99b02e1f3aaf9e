"""What every quantised matrix comes down to: codes, scales, zero points, and which columns share them.

Shapes: a matrix is [R, K], R outputs by K inputs; N groups of columns. w[r, k] = scales[r, n] * (codes[r, k] - zeros[r,
n]) with n = group_of[k]. A float16 or bfloat16 scale times a difference of codes is exact in float32.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hybrimoe_jax.checkpoint.weights import by_new_name
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.layout import GROUPS

F32 = np.dtype(np.float32)


@dataclasses.dataclass(frozen=True)
class Codes:
    """A quantised matrix as its checkpoint has it.

    `codes` [R, K] uint8 0..15 (4 bits) or int8 (8 bits); `scales` [R, N] float32; `zeros` [R, N] uint8, None where zero
    is the middle code (8 of 4 bits, 0 of 8); `group_of` [K].
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    group_of: np.ndarray

    def values(self) -> np.ndarray:
        """The float32 matrix [R, K]."""
        if self.zeros is not None:
            offset = self.zeros.astype(np.float32)[:, self.group_of]
        else:
            offset = np.float32(8 if self.codes.dtype == np.uint8 else 0)
        with np.errstate(invalid="ignore", over="ignore"):  # a scale that is no number is refused by its tensor's name
            return (self.codes.astype(np.float32) - offset) * self.scales[:, self.group_of]

    def grouped(self, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None] | None:
        """Codes, scales and zero points as `packing.pack` takes them.

        A scale is that of `group` neighbouring columns.

        None where neighbouring columns have different scales (act-order, smaller groups).
        """
        firsts = self.group_of[::group]
        if not np.array_equal(np.repeat(firsts, group)[: len(self.group_of)], self.group_of):
            return None
        return self.codes, self.scales[:, firsts], None if self.zeros is None else self.zeros[:, firsts]

    def rows(self, order: np.ndarray) -> Codes:
        """The matrix with its rows in another order."""
        zeros = None if self.zeros is None else self.zeros[order]
        return Codes(self.codes[order], self.scales[order], zeros, self.group_of)

    def columns(self, order: np.ndarray) -> Codes:
        """The matrix with its columns in another order; each keeps its group's scale."""
        return Codes(np.ascontiguousarray(self.codes[:, order]), self.scales, self.zeros, self.group_of[order])


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a quantised tensor is made of, known without reading its codes.

    `group` is the largest of packing's groups (None: no one fits) with one scale for every so many neighbouring
    columns, `zeros` whether zero points differ from the middle.
    """

    bits: int
    group: int | None
    zeros: bool
    scale: str  # "f16" or "f32": the narrowest type that is sure to hold the scales


def fitting_group(size: int, columns: int) -> int | None:
    """The largest offered group of columns that lies within one of `size` columns, wherever it begins."""
    return next((g for g in reversed(GROUPS) if size % g == 0 or size >= columns), None)


def run_length(group_of: np.ndarray) -> int | None:
    """The same for groups as listed, column by column."""
    for size in reversed(GROUPS):
        if np.array_equal(np.repeat(group_of[::size], size)[: len(group_of)], group_of):
            return size
    return None


class QuantisedTensor(abc.ABC):
    """A matrix [R, K] that lies quantised in a file; as a `Tensor` it is its exact float32 values."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]: ...

    @property
    @abc.abstractmethod
    def where(self) -> str:
        """File and name, for messages."""

    @property
    def dtype(self) -> np.dtype:
        return F32

    @property
    @abc.abstractmethod
    def kind(self) -> Kind: ...

    @abc.abstractmethod
    def group_of(self) -> np.ndarray:
        """The group of each column, [K]."""

    @abc.abstractmethod
    def codes(self) -> Codes:
        """Reads the matrix. Raises UserError for damage, and where its numbers are not what `kind` says."""

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        codes = self.codes()
        part = slice(start, stop)
        zeros = None if codes.zeros is None else codes.zeros[part]
        return Codes(codes.codes[part], codes.scales[part], zeros, codes.group_of).values()


def gathered(
    stored: Mapping[str, Any], parts: Sequence[str], needed: Sequence[str], make: Callable[[dict[str, Any], str], Any]
) -> dict[str, Any]:
    """`stored` with every quantised matrix in one piece.

    Its parts `X.part` are replaced by `make(found, X)` under the name `X.weight`.

    `needed` are those of `parts` that a matrix must have, the first of them the one that tells it is there; `found`
    maps part to tensor. Raises UserError where another is lacking, and where `X.weight` is there, too.
    """

    def renamed() -> Iterator[tuple[str, str, Any]]:
        for name, tensor in stored.items():
            stem, _, part = name.rpartition(".")
            if part not in parts:
                yield name, name, tensor
            elif part == needed[0]:
                found = {part: stored[f"{stem}.{part}"] for part in parts if f"{stem}.{part}" in stored}
                lacking = [part for part in needed if part not in found]
                if lacking:
                    raise UserError(f"{tensor.path}: {stem} has no {', '.join(lacking)}; download it again")
                yield f"{stem}.weight", name, make(found, stem)

    return by_new_name(renamed(), next((tensor.path.parent for tensor in stored.values()), ""))


def check_stored(where: str, words: Sequence[Any], scales: Any) -> None:
    """UserError where packed words are no int32, or scales no floats: their bits would mean something else."""
    for part in words:
        if part is not None and part.kind != "I32":
            raise UserError(
                f"{where}: {part.name.rpartition('.')[2]} is stored as {part.kind}, and packed words are I32; "
                "download or save it again"
            )
    _ = scales.dtype  # refuses what is no float


def groups_listed(g_idx: Any, groups: int, where: str) -> np.ndarray:
    """The stored group of each column, [K]; UserError where one is not in 0..groups-1."""
    of = g_idx.integers()
    if of.min() < 0 or of.max() >= groups:
        raise UserError(
            f"{where}: {g_idx.name.rpartition('.')[2]} names groups outside 0..{groups - 1}; download it again"
        )
    return of


def groups_in_order(columns: int, size: int) -> np.ndarray:
    """The group of each column, [K], where groups are runs of `size` columns."""
    return np.arange(columns) // size


def check_group_size(sizes: Collection[Any], columns: int, groups: int, where: str) -> int:
    """The columns of a group, where no list says which group a column is in.

    It is the one of `sizes` (those that the configuration names; -1 is a whole row) that makes `groups` of `columns`.
    UserError where none does, or several do and differ.
    """
    whole = {columns if size == -1 else size for size in sizes if isinstance(size, int) and (size == -1 or size > 0)}
    fitting = {min(size, columns) for size in whole if -(-columns // size) == groups}
    if not whole and groups == 1:
        return columns
    if len(fitting) != 1:
        named = ", ".join(str(size) for size in sizes) or "not given"
        raise UserError(
            f"{where}: {groups} groups of {columns} inputs do not follow from config.json, whose group_size is "
            f"{named}; "
            "download both again"
        )
    return fitting.pop()


def scale_type(scales: Any) -> str:
    """Of `Kind`, for a stored tensor of scales."""
    return "f16" if scales.kind == "F16" else "f32"


def unpack_words(words: np.ndarray, bits: int, axis: int, count: int) -> np.ndarray:
    """uint8 fields of int32 words along `axis`, lowest bits first; the first `count` of them."""
    fields = 32 // bits
    shifts = (np.arange(fields, dtype=np.uint32) * bits).reshape((-1,) + (1,) * (words.ndim - 1 - axis))
    wide = np.expand_dims(words.view(np.uint32), axis + 1)
    out = ((wide >> shifts) & np.uint32(2**bits - 1)).astype(np.uint8)
    shape = list(words.shape)
    shape[axis] *= fields
    return np.take(out.reshape(shape), np.arange(count), axis=axis)


def centred(codes: np.ndarray, zeros: np.ndarray | None, bits: int, where: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Unsigned codes of 8 bits around 128 become int8 around 0; those of 4 bits stay.

    A zero point of the middle everywhere is dropped.
    """
    if zeros is not None and np.all(zeros == 2 ** (bits - 1)):
        zeros = None
    if bits == 4:
        return codes, zeros
    if zeros is not None:
        raise UserError(f"{where}: 8 bits with zero points other than 128 are not supported; save it symmetric")
    return (codes.astype(np.int16) - 128).astype(np.int8), None
