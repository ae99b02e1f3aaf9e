"""How one shard of a converted checkpoint lies on disk: an Orbax item, and a record of what it holds with its hashes.

Shards lie in the folder `pieces`, which is also their name in the manifest, or together in `pieces.zip`. The item has
a leaf for each dense tensor under its checkpoint name. In a MoE layer it has one leaf `experts` as well: [E, 3, F*D],
or uint8 [E, bytes of an expert] where they are quantised. Plain: row 0 is gate (F x D), row 1 up (F x D), row 2 down
(D x F), each row-major; rows 0 and 1 together are the host kernels' `gate_up` [2F, D]. Quantised: the layout of
`formats.layout`. Either way an expert is one contiguous read and needs no rearranging. Of the stored bytes of each
dense tensor and each expert there is a hash, BLAKE2b of 16 bytes, and a CRC-32, which is compared at every reading. A
quantised dense tensor is a leaf of bytes, and its record says the format and the matrix's shape.

Shapes: E experts, D model width, F expert width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from hybrimoe_jax.checkpoint.dense import format_of, is_projection, pack_tensor
from hybrimoe_jax.checkpoint.finite import called, check_packed_finite, expert_parts, narrowed
from hybrimoe_jax.checkpoint.orbax import Leaf, open_leaf, read_rows, save_item
from hybrimoe_jax.checkpoint.weights import Experts, PackedExperts, Shard, Tensor, row_block
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.packing import ExpertLayout, Format, MatrixLayout, pack_expert
from hybrimoe_jax.formats.plain import BF16, F32

LAYOUT = "hybrimoe-jax checkpoint"
PLAIN_VERSION, VERSION = 1, 2
"""Of the files' meaning. 2 brought quantised experts; a checkpoint without any is still written, and read, as 1."""
EXPERTS = "experts"
FORMATS = {"f32": F32, "bf16": BF16}
DTYPES = {"float32": F32, "bfloat16": BF16, "uint8": np.dtype(np.uint8)}


def digest(data: np.ndarray | bytes) -> str:
    """Hexadecimal BLAKE2b (16 bytes) of an array's bytes."""
    return hashlib.blake2b(as_bytes(data), digest_size=16).hexdigest()


class Sums:
    """The hash and the CRC-32 of bytes that come in pieces."""

    def __init__(self):
        self._hash, self._crc = hashlib.blake2b(digest_size=16), 0

    def add(self, data: np.ndarray) -> None:
        self._hash.update(as_bytes(data))
        self._crc = zlib.crc32(as_bytes(data), self._crc)

    def record(self) -> dict[str, Any]:
        return {"hash": self._hash.hexdigest(), "crc32": self._crc}


def damage(data: np.ndarray, hashed: str | None, crc: int | None) -> str | None:
    """How stored bytes differ from the manifest: by their hash, or where none is given their CRC-32; None: they do not.

    On one core of this project's machine a gigabyte takes 1.6 s to hash, and 0.3 s to sum up.
    """
    if hashed is not None:
        return "hash" if digest(data) != hashed else None
    return "checksum" if crc is not None and zlib.crc32(as_bytes(data)) != crc else None


def as_bytes(data: np.ndarray | bytes) -> memoryview | bytes:
    if isinstance(data, np.ndarray):
        return np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
    return data


def stored_dtype(dtype: np.dtype, fmt: str | None) -> np.dtype:
    """What a tensor becomes: `fmt` where given, else its own type (float16 widens to float32, exactly)."""
    if fmt is not None:
        return FORMATS[fmt]
    return BF16 if dtype == BF16 else F32


@dataclasses.dataclass(frozen=True)
class ExpertForm:
    """How experts are stored: one is an array `row` of `dtype`. `layout` where they are quantised."""

    format: str
    row: tuple[int, ...]
    dtype: np.dtype
    layout: ExpertLayout | None = None

    @staticmethod
    def of(format: str, width: int, hidden: int) -> ExpertForm:
        """Of a format's name; width D, hidden F. UserError for an unknown one."""
        if format in FORMATS:
            return ExpertForm(format, (3, hidden * width), FORMATS[format])
        layout = ExpertLayout(Format.parse(format), width, hidden)
        return ExpertForm(format, (layout.nbytes,), np.dtype(np.uint8), layout)

    @property
    def nbytes(self) -> int:
        """Of one expert."""
        return int(np.prod(self.row)) * self.dtype.itemsize


class HashedLeaf:
    """Reads a tensor's rows once and in order, converting and hashing on the way."""

    def __init__(self, tensor: Tensor, dtype: np.dtype, where: str):
        self.tensor, self.dtype, self.sums, self.where = tensor, dtype, Sums(), where

    def read(self, start: int, stop: int) -> np.ndarray:
        block = narrowed(self.tensor.read(start, stop), self.dtype, self.where)
        self.sums.add(block)
        return block

    def leaf(self) -> Leaf:
        shape = tuple(self.tensor.shape)
        return Leaf(shape, row_block(shape, self.dtype), self.read)

    def record(self) -> dict[str, Any]:
        return {"shape": list(self.tensor.shape), "dtype": self.dtype.name, **self.sums.record()}


class PackedLeaf:
    """The bytes of a tensor rounded to a quantised format, which is done when the first are read."""

    dtype = np.dtype(np.uint8)
    empty = np.empty(0, np.uint8)

    def __init__(self, tensor: Tensor, format: Format, where: str):
        self.tensor, self.layout, self.where = tensor, MatrixLayout(format, *tensor.shape), where
        self.sums, self._data = Sums(), self.empty

    def read(self, start: int, stop: int) -> np.ndarray:
        if start == 0:
            with np.errstate(over="ignore", invalid="ignore"):
                made = pack_tensor(self.tensor, self.layout.format)
            check_packed_finite(made, self.tensor.read, self.where)
            self._data = made.data
        block = self._data[start:stop]
        self.sums.add(block)
        if stop == self.layout.nbytes:
            self._data = self.empty
        return block

    def leaf(self) -> Leaf:
        shape = (self.layout.nbytes,)
        return Leaf(shape, row_block(shape, self.dtype), self.read)

    def record(self) -> dict[str, Any]:
        made = {"shape": [self.layout.nbytes], "dtype": self.dtype.name, **self.sums.record()}
        return {**made, "format": str(self.layout.format), "matrix": list(self.tensor.shape)}


def dense_leaf(
    name: str, tensor: Tensor, fmt: str | None, dense_format: Format | None, where: object = "the model"
) -> HashedLeaf | PackedLeaf:
    """How a dense tensor is stored: `fmt` as in `stored_dtype`, `dense_format` that of the projections.

    `where`: it is from, for messages.
    """
    place = called(tensor, f"{where}: {name}")
    if dense_format is not None and is_projection(name, tuple(tensor.shape)):
        return PackedLeaf(tensor, format_of(name, dense_format), place)
    return HashedLeaf(tensor, stored_dtype(tensor.dtype, fmt), place)


class ExpertRows:
    """Reads a layer's experts one by one as they are stored, [1, *row], rounding and hashing each."""

    def __init__(self, experts: Experts, form: ExpertForm, where: str):
        self.experts, self.form, self.where = experts, form, where
        self.hashes: list[str] = []
        self.crcs: list[int] = []

    def read(self, start: int, stop: int) -> np.ndarray:
        out = np.empty((stop - start, *self.form.row), self.form.dtype)
        for row, expert in zip(out, range(start, stop), strict=True):
            self._fill(row, expert)
            self.hashes.append(digest(row))
            self.crcs.append(zlib.crc32(as_bytes(row)))
        return out

    def _fill(self, row: np.ndarray, expert: int) -> None:
        layout, names = self.form.layout, expert_parts(self.experts, expert, self.where)
        if layout is None:
            for part, matrix, name in zip(row, self.experts.read(expert), names, strict=True):
                part[:] = narrowed(matrix, row.dtype, name).reshape(-1)
            return
        with np.errstate(over="ignore", invalid="ignore"):
            if isinstance(self.experts, PackedExperts):
                made = self.experts.packed(expert)
            else:
                gate, up, down = (np.asarray(matrix, np.float32) for matrix in self.experts.read(expert))
                made = pack_expert(gate, up, down, layout.format)
        for number, (matrix, name) in enumerate(zip(made.matrices, names, strict=True)):
            check_packed_finite(matrix, lambda n=number: self.experts.read(expert)[n], name)
        row[:] = made.data


def write_shard(
    folder: Path,
    shard: Shard,
    fmt: str | None,
    form: ExpertForm,
    dense_format: Format | None = None,
    where: object = "the model",
) -> dict[str, Any]:
    """Writes `folder` (anything there is replaced) and returns the shard's record; memory is a few row blocks.

    `fmt` and `dense_format` are the dense tensors' (see `dense_leaf`), `form` the experts'. UserError, which begins
    with `where`, for numbers that are not finite before or after they are rounded.
    """
    if folder.exists():
        shutil.rmtree(folder)
    dense = {name: dense_leaf(name, t, fmt, dense_format, where) for name, t in shard.dense.items()}
    leaves = {name: leaf.leaf() for name, leaf in dense.items()}
    experts = None
    if shard.experts is not None:
        rows, shape = ExpertRows(shard.experts, form, f"{where}: layer {shard.layer}"), (shard.experts.count, *form.row)
        leaves[EXPERTS] = Leaf(shape, 1, rows.read)
        sums = {"hashes": rows.hashes, "crc32s": rows.crcs}  # filled as rows are read
        experts = {"shape": list(shape), "dtype": form.dtype.name, **sums}
    save_item(folder, leaves)
    return {
        "name": shard.name,
        "layer": shard.layer,
        "dense": {name: leaf.record() for name, leaf in dense.items()},
        "experts": experts,
    }


def shard_is_whole(folder: Path, record: dict[str, Any]) -> bool:
    """Reads a written shard back, a block at a time, and compares every hash with its record."""
    try:
        for name, entry in record["dense"].items():
            store, hasher = open_leaf(folder, name), hashlib.blake2b(digest_size=16)
            shape = tuple(entry["shape"])
            if tuple(store.shape) != shape:
                return False
            step = row_block(shape, DTYPES[entry["dtype"]])
            for start in range(0, shape[0], step):
                hasher.update(as_bytes(read_rows(store[start : min(start + step, shape[0])], None, folder, name)))
            if hasher.hexdigest() != entry["hash"]:
                return False
        experts = record["experts"]
        if experts is None:
            return True
        store = open_leaf(folder, EXPERTS)
        return list(store.shape) == experts["shape"] and all(
            digest(read_rows(store, e, folder, EXPERTS)) == known for e, known in enumerate(experts["hashes"])
        )
    except (UserError, KeyError, TypeError, AttributeError):
        return False
