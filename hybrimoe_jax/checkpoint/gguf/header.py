"""What stands before the weights of a GGUF file: metadata, and where each tensor lies.

    magic "GGUF", version u32, tensors u64, keys u64
    a key: text, type u32, value          a text: length u64, UTF-8        an array: type u32, length u64, items
    a tensor: text, axes u32, sizes u64 each, innermost first, type u32, offset u64
    padding; then the tensors, in this order, each padded to `general.alignment`

Every count is held against the bytes that are left before anything is made of it. Refused are what PyPI's `gguf`
refuses, which a test compares with this file, and what llama.cpp refuses beyond it: more than four axes, arrays in
arrays, tensors elsewhere than one after another. Files in big-endian byte order are refused by that name. Source: the
GGUF specification of the ggml project.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

from hybrimoe_jax.errors import UserError, shown_name

VERSIONS = (2, 3)
ALIGNMENT = "general.alignment"
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Type of a value -> what `struct` calls it."""
UINT32, TEXT, ARRAY = 4, 8, 9
MOST_AXES = 4
LEAST_KEY, LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8
"""Bytes that a key and a tensor take at least."""


class Array(NamedTuple):
    """An array of the metadata, which is not read: its items' type, and how many."""

    type: int
    length: int


class Place(NamedTuple):
    """A tensor: its type's name, its shape, outermost axis first, and its bytes in the file."""

    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Header(NamedTuple):
    """Metadata by key (an array as an `Array`), and tensors by name."""

    fields: dict[str, Any]
    tensors: dict[str, Place]


class _Wrong(ValueError):
    """Why a file is refused."""


class _Cursor:
    """Reads on from a place in the file."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def skip(self, size: int, what: str) -> int:
        """Goes over so many bytes; where they began."""
        if size > self.left:
            raise _Wrong(f"{what} needs {size} bytes and the file has {max(0, self.left)} left")
        began, self.at = self.at, self.at + size
        return began

    def number(self, code: str, what: str) -> Any:
        return struct.unpack_from(f"<{code}", self.data, self.skip(struct.calcsize(f"<{code}"), what))[0]

    def count(self, least: int, what: str) -> int:
        """A u64 that says how many things of `least` bytes or more follow."""
        count = self.number("Q", what)
        if count * least > self.left:
            raise _Wrong(f"{what} are said to be {count}, and the file has {self.left} bytes left")
        return count

    def text(self, what: str) -> str:
        size = self.count(1, f"the characters of {what}")
        began = self.skip(size, what)
        try:
            return self.data[began : began + size].decode()
        except UnicodeDecodeError:
            raise _Wrong(f"{what} is not UTF-8") from None

    def value(self, kind: int, what: str) -> Any:
        if kind == TEXT:
            return self.text(what)
        if kind == ARRAY:
            return self.array(what)
        if kind not in SCALARS:
            raise _Wrong(f"{what} is of the unknown type {kind}")
        return self.number(SCALARS[kind], what)

    def array(self, what: str) -> Array:
        kind = self.number("I", what)
        if kind not in SCALARS and kind != TEXT:
            raise _Wrong(f"{what} is an array of the {'type array' if kind == ARRAY else f'unknown type {kind}'}")
        size = 8 if kind == TEXT else struct.calcsize(SCALARS[kind])
        array = Array(kind, self.count(size, f"the items of {what}"))
        if kind == TEXT:
            for _ in range(array.length):
                self.skip(self.number("Q", what), what)
        else:
            self.skip(array.length * size, what)
        return array


def read_gguf(path: Path, types: dict[int, tuple[str, int, int]]) -> Header:
    """The file's metadata and tensors.

    Args:
      types: of tensors: number -> name, elements of a block, bytes of a block.

    Raises UserError for a file that is cut off or damaged, and for one in big-endian byte order.
    """
    try:
        with open(path, "rb") as file:
            if path.stat().st_size < 24:
                raise _Wrong("it is too short")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _header(_Cursor(data), path, types)
    except _Wrong as wrong:
        raise UserError(f"{path}: not a whole GGUF file ({wrong}); download it again") from None


def _header(cursor: _Cursor, path: Path, types: dict[int, tuple[str, int, int]]) -> Header:
    _check_version(cursor, path)
    tensors, keys = cursor.count(LEAST_TENSOR, "tensors"), cursor.count(LEAST_KEY, "keys")
    fields: dict[str, Any] = {}
    alignment = 32
    for number in range(keys):
        key = cursor.text(f"the name of key {number}")
        if key in fields:
            raise _Wrong(f"the key {shown_name(key)} is there twice")
        kind = cursor.number("I", shown_name(key))
        value = fields[key] = cursor.value(kind, shown_name(key))
        if key == ALIGNMENT:
            if kind != UINT32 or value.bit_count() != 1:
                raise _Wrong(f"its {ALIGNMENT} is no power of two")
            alignment = value
    infos: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    for number in range(tensors):
        name = cursor.text(f"the name of tensor {number}")
        if name in infos:
            raise _Wrong(f"the tensor {shown_name(name)} is there twice")
        infos[name] = _tensor(cursor, shown_name(name), types)
    begins = -(-cursor.at // alignment) * alignment
    return Header(fields, _placed(infos, begins, alignment, len(cursor.data)))


def _check_version(cursor: _Cursor, path: Path) -> None:
    if cursor.data[cursor.skip(4, "its magic") :][:4] != b"GGUF":
        raise _Wrong("it does not begin with GGUF")
    version = cursor.number("I", "its version")
    if version & 0xFFFF == 0 and version >> 24 in VERSIONS:
        raise UserError(
            f"{path}: a GGUF file in big-endian byte order is not supported; take the little-endian file of the same "
            "model, or convert it with gguf_convert_endian.py of llama.cpp"
        )
    if version not in VERSIONS:
        raise _Wrong(f"it is of version {version}, and versions 2 and 3 are read")


def _tensor(
    cursor: _Cursor, name: str, types: dict[int, tuple[str, int, int]]
) -> tuple[str, tuple[int, ...], int, int]:
    """-> type's name, shape, bytes, offset as stored."""
    axes = cursor.number("I", name)
    if not 1 <= axes <= MOST_AXES:
        raise _Wrong(f"{name} has {axes} axes, and 1 to {MOST_AXES} are possible")
    shape = tuple(cursor.number("Q", name) for _ in range(axes))[::-1]
    kind, offset = cursor.number("I", name), cursor.number("Q", name)
    if kind not in types:
        raise _Wrong(f"{name} is of the unknown type {kind}")
    called, elements, nbytes = types[kind]
    if shape[-1] % elements or 0 in shape:
        raise _Wrong(f"{name} is {called} of shape {list(shape)}, and rows are of whole blocks of {elements}")
    return called, shape, math.prod(shape) // elements * nbytes, offset


def _placed(
    infos: dict[str, tuple[str, tuple[int, ...], int, int]], begins: int, alignment: int, size: int
) -> dict[str, Place]:
    """Where the tensors lie: one after another from `begins` on."""
    places, at = {}, 0
    for name, (kind, shape, nbytes, offset) in infos.items():
        if offset != at:
            raise _Wrong(f"{shown_name(name)} is said to lie at {offset}, and the tensors before it end at {at}")
        if begins + at + nbytes > size:
            raise _Wrong(f"{shown_name(name)} ends at {begins + at + nbytes}, and the file at {size}")
        places[name] = Place(kind, shape, begins + at, nbytes)
        at = -(-(at + nbytes) // alignment) * alignment
    return places
