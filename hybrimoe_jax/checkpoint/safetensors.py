"""The safetensors format, read and written in bounded pieces.

A file is eight bytes (header length, little-endian), a JSON header naming each tensor's dtype, shape and byte range,
then the bytes. Reading ranges with `pread` instead of mapping the file keeps the process's memory at what was asked for
(mapped pages count as resident, so converting a large shard would look as large as the shard), and lets a truncated
file be refused before anything is read. Source: the format description of the `safetensors` project.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from hybrimoe_jax.checkpoint.safetensors_header import read_entries
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.files import replacing

BF16 = np.dtype(ml_dtypes.bfloat16)
READABLE = {"F32": np.dtype(np.float32), "BF16": BF16, "F16": np.dtype(np.float16)}
INTEGERS = {"I32": np.dtype(np.int32), "I64": np.dtype(np.int64)}
WRITABLE = {dtype: name for name, dtype in READABLE.items()}


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """One tensor lying in a file: rows are read on demand, nothing is kept."""

    path: Path
    name: str
    kind: str  # the format's dtype name, such as "BF16"
    shape: tuple[int, ...]
    offset: int  # of the first byte in the file

    @property
    def where(self) -> str:
        """File and name, for messages."""
        return f"{self.path}: {self.name}"

    @property
    def dtype(self) -> np.dtype:
        """Raises UserError where the stored type is not a float this project computes with."""
        if self.kind not in READABLE:
            raise UserError(
                f"{self.path}: tensor {self.name} is stored as {self.kind}; only {', '.join(READABLE)} are supported "
                "(a quantised checkpoint must be expanded first)"
            )
        return READABLE[self.kind]

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) of the first axis (everything by default; a scalar is one row) as a fresh array."""
        return self._rows(self.dtype, start, stop)

    def integers(self) -> np.ndarray:
        """The whole of a tensor of integers, such as packed codes.

        Raises UserError where it is stored as something else.
        """
        if self.kind not in INTEGERS:
            raise UserError(
                f"{self.path}: tensor {self.name} is stored as {self.kind}, not as integers; download it again"
            )
        return self._rows(INTEGERS[self.kind], 0, None)

    def _rows(self, dtype: np.dtype, start: int, stop: int | None) -> np.ndarray:
        rows = self.shape[0] if self.shape else 1
        stop = rows if stop is None else stop
        shape = (stop - start, *self.shape[1:]) if self.shape else ()
        out = np.empty(shape, dtype)
        row_bytes = math.prod(self.shape[1:]) * dtype.itemsize
        with open(self.path, "rb") as file:
            file.seek(self.offset + start * row_bytes)
            got = file.readinto(out.reshape(-1).view(np.uint8).data) if out.nbytes else 0
        if got != out.nbytes:
            raise UserError(f"{self.path}: the file ended while {self.name} was read; download it again")
        return out


def read_header(path: Path) -> dict[str, FileTensor]:
    """The tensors of one file by name; UserError where the file is truncated or not safetensors (`read_entries`)."""
    return {name: FileTensor(path, name, *entry) for name, entry in read_entries(path).items()}


@dataclasses.dataclass(frozen=True)
class Outgoing:
    """A tensor to be written: its bytes are asked for once, in order, as C-contiguous arrays."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    blocks: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def write_file(path: Path, tensors: Sequence[Outgoing]) -> None:
    """Writes one file beside its destination and renames it; memory is one block."""
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for t in tensors:
        kind = WRITABLE[np.dtype(t.dtype)]
        header[t.name] = {"dtype": kind, "shape": list(t.shape), "data_offsets": [end, end + t.nbytes]}
        end += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for t in tensors:
            written = 0
            for block in t.blocks():
                data = np.ascontiguousarray(block, t.dtype).reshape(-1).view(np.uint8)
                file.write(data.data)
                written += data.nbytes
            if written != t.nbytes:
                raise ValueError(f"{t.name}: {written} bytes given, {t.nbytes} announced")


def write_folder(folder: Path, tensors: Iterable[Outgoing], max_file_bytes: int = 5 * 10**9) -> None:
    """Writes `model.safetensors`, or numbered shards with an index.

    Shards where the tensors need more than `max_file_bytes`.
    """
    groups: list[list[Outgoing]] = [[]]
    size = total = 0
    for t in tensors:
        if groups[-1] and size + t.nbytes > max_file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(t)
        size += t.nbytes
        total += t.nbytes
    if len(groups) == 1:
        write_file(folder / "model.safetensors", groups[0])
        return
    where = {}
    for i, group in enumerate(groups, 1):
        name = f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        write_file(folder / name, group)
        where |= {t.name: name for t in group}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
