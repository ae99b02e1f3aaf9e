"""The header of a safetensors file, believed only where the file bears it out.

What the `safetensors` library refuses is refused here: tensors that overlap or leave gaps, fractional or huge shapes,
unknown types, metadata that are no texts, deep nesting. Beyond it, a name that stands twice is refused as well; there
the library takes the last one. Source: the format description of the `safetensors` project, and version 0.8 of its
library, which a test compares with this file.
"""

from __future__ import annotations

import itertools
import json
import math
import operator
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from hybrimoe_jax.errors import UserError, shown_name

BITS = {"BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64}
BITS |= {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8}
BITS |= {"F8_E5M2FNUZ": 8, "BF16": 16, "F16": 16, "F32": 32, "F64": 64, "C64": 64}
MAX_HEADER = 100_000_000
"""Bytes; the format's own limit."""
MAX_DEPTH = 125
"""Of what an entry may hold beside its own keys; the library's parser takes 128 levels in all."""
KEYS = ("dtype", "shape", "data_offsets")


class Entry(NamedTuple):
    """A tensor of the header: its type's name, its shape, and where its first byte lies in the file."""

    kind: str
    shape: tuple[int, ...]
    offset: int


class _Wrong(ValueError):
    """Why a header is refused."""


def read_entries(path: Path) -> dict[str, Entry]:
    """The tensors of a file by name, in the header's order. UserError for a file that is cut off, or no safetensors."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            if len(start) < 8:
                raise _Wrong(f"{size} bytes is too short for a safetensors file")
            (length,) = struct.unpack("<Q", start)
            if length > MAX_HEADER or 8 + length > size:
                raise _Wrong(f"its header claims {length} bytes but the file has {size}")
            text = file.read(length)
        return _entries(_parsed(text), 8 + length, size)
    except _Wrong as wrong:
        raise UserError(f"{path}: {wrong}; the file is truncated or corrupt, download or save it again") from None


def _parsed(text: bytes) -> dict[str, Any]:
    """The header as JSON, by the library's rules."""
    try:
        header = json.loads(
            text.decode(),
            object_pairs_hook=_once,
            parse_constant=_number,
            parse_float=_number,
            parse_int=lambda digits: int(digits) if digits != "-0" else -0.0,
        )
    except _Wrong:
        raise
    except (ValueError, RecursionError):
        raise _Wrong("its header is not JSON") from None
    if not isinstance(header, dict):
        raise _Wrong("its header is not a JSON object")
    return header


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise _Wrong(f"its header has {shown_name(twice)} twice")
    return made


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _entries(header: dict[str, Any], begins: int, size: int) -> dict[str, Entry]:
    """The header's tensors, which must fill the file from `begins` to `size` without gap or overlap."""
    _check_metadata(header.pop("__metadata__", None))
    found = {name: _entry(name, entry) for name, entry in header.items()}
    end = 0
    for name, (_, _, (start, stop)) in sorted(found.items(), key=lambda item: item[1][2]):
        if start != end:
            what = "overlaps another" if start < end else "leaves a gap before it"
            raise _Wrong(f"the byte range of {shown_name(name)} {what}")
        end = stop
    if begins + end != size:
        raise _Wrong(f"it should have {begins + end} bytes but has {size}")
    return {name: Entry(kind, shape, begins + start) for name, (kind, shape, (start, _)) in found.items()}


def _check_metadata(metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Wrong("its __metadata__ are not texts by name")
    _check_texts(itertools.chain.from_iterable(metadata.items()))


def _check_texts(texts: Iterable[str]) -> None:
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError:
        raise _Wrong("its header is not JSON: half a surrogate pair") from None


def _entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """-> type, shape, byte range."""
    _check_texts([name])
    if not isinstance(entry, dict) or any(key not in entry for key in KEYS):
        raise _Wrong(f"its entry for {shown_name(name)} is incomplete")
    kind, shape, place = (entry[key] for key in KEYS)
    listed = isinstance(shape, list) and isinstance(place, list) and len(place) == 2
    if not listed or not all(type(n) is int and n < 2**64 for n in (*shape, *place)):
        raise _Wrong(f"its entry for {shown_name(name)} has a shape or a byte range that are not whole numbers")
    for more in entry.keys() - set(KEYS):
        _check_depth(name, entry[more])
    start, stop = place
    bits = BITS.get(kind) if isinstance(kind, str) else None
    numbers = list(itertools.accumulate(shape, operator.mul, initial=1))
    if bits is None:
        raise _Wrong(f"its entry for {shown_name(name)} has the unknown dtype {shown_name(kind)}")
    fits = (stop - start) * 8 == bits * numbers[-1] and min((*shape, start)) >= 0
    if not fits or max(numbers) * bits >= 2**64:
        raise _Wrong(
            f"its entry for {shown_name(name)} (dtype {kind}, shape {shown_name(list(shape))}) does not match its byte "
            "range"
        )
    return kind, tuple(shape), (start, stop)


def _check_depth(name: str, value: Any) -> None:
    level, depth = [value], 0
    while level := [v for v in level if isinstance(v, (list, dict))]:
        depth += 1
        if depth > MAX_DEPTH:
            raise _Wrong(f"its entry for {shown_name(name)} is nested too deep")
        level = [inner for v in level for inner in (v.values() if isinstance(v, dict) else v)]
