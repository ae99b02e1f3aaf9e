"""A trace as a table for other programs: CSV, and JSON lines. Both hold all that the `.npz` file holds, exactly.

A line is a row of the trace: one token in one MoE layer of one step. The first line says what the `.npz` file's `meta`
says; additions (`x_<name>`) of numbers or texts stand there too, as `extra`; others are refused.

* **CSV**: the first line is `# ` and that JSON, the second the columns: those of the trace, with `expert_<i>`,
  `weight_<i>`, `score_<expert>` and `lookahead_<distance>_<expert>`. What was not recorded is an empty cell.
* **JSONL**: the first line is that JSON; every other one an object: `step`, `layer`, `phase` ("prefill" or "decode"),
  `sequence`, `position`, `batch`, `ids`, `weights`, `scores`, `lookahead` (by distance), each where it was recorded.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hybrimoe_jax.errors import UserError, said, shown, shown_name
from hybrimoe_jax.files import replacing
from hybrimoe_jax.npz import most_bytes
from hybrimoe_jax.trace.columns import BATCH, INDEX_COLUMNS, PHASES, Trace
from hybrimoe_jax.trace.file import (
    EMPTY,
    EXTRA,
    FORMAT,
    LOOKAHEAD,
    arrays_of,
    check_trace,
    describe,
    facts_and_about,
    read_meta,
    trace_from,
)
from hybrimoe_jax.trace.layouts import whole_lines

CSV_MARK, JSON_MARK = f'# {{"format": "{FORMAT}"', f'{{"format": "{FORMAT}"'
"""What the files begin with."""
CELLS = {"ids": "expert_", "weights": "weight_", "scores": "score_"}
"""Columns of the arrays that have several numbers a row."""


def described(trace: Trace, where: str) -> str:
    """The first line: a trace's `meta`, with its additions. UserError for an unsound trace, and where JSON cannot."""
    check_trace(trace, where)
    extra = {name: _addition(array, f"{where}: array {EXTRA}{name}") for name, array in trace.extra.items()}
    return describe(trace, where, extra=extra) if extra else describe(trace, where)


def undescribed(line: str, arrays: dict[str, np.ndarray], where: str) -> Trace:
    """The trace of arrays by their names in the `.npz` file, and of the first line."""
    read, bytes_left = read_meta(line, where), most_bytes(len(line))
    try:
        for name, entry in read.get("extra", {}).items():
            arrays[EXTRA + name] = array = _added(entry["values"], entry["dtype"], bytes_left)
            if not array.size:
                arrays[EXTRA + name] = array.reshape(entry.get("shape", array.shape))
            bytes_left -= array.nbytes
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{where}: its `extra` is damaged ({said(error)})") from None
    return trace_from(arrays, *facts_and_about(read, where), where)


def _addition(array: np.ndarray, where: str) -> dict[str, Any]:
    """An array as JSON holds it: numbers that are not finite as their names. UserError where it cannot."""
    if not _is_plain(array.dtype):
        raise UserError(f"{where} holds {array.dtype}; a table has numbers and texts only, so leave it out")
    values = array
    if array.dtype.kind == "f" and not (finite := np.isfinite(array)).all():
        values = array.astype(object)
        values[~finite] = array[~finite].astype(str)
    shape = {} if array.size else {"shape": list(array.shape)}  # the lists of [0, 3] do not tell the 3
    return {"dtype": str(array.dtype), "values": values.tolist(), **shape}


def _is_plain(dtype: np.dtype) -> bool:
    return dtype.kind in "biufU" and (dtype.kind == "U" or dtype.itemsize <= 8)


def _added(values: Any, name: Any, most: int) -> np.ndarray:
    """What `_addition` told; ValueError for another type, and for more than `most` bytes."""
    dtype = np.dtype(name) if isinstance(name, str) and re.fullmatch("[<>=|]?[A-Za-z]{1,9}[0-9]{0,9}", name) else None
    if dtype is None or not _is_plain(dtype):
        raise ValueError(f"its dtype is {shown(name)}; that of numbers or texts is needed")
    array = np.array(values, object)
    kinds = {"b": (bool,), "i": (int,), "u": (int,), "f": (int, float, str), "U": (str,)}[dtype.kind]
    wide = dtype.itemsize // 4
    odd = [v for v in array.flat if type(v) not in kinds or (dtype.kind == "U" and len(v) > wide)]
    if odd:
        raise ValueError(f"{shown(odd[0])} stands among values of {dtype}")
    if array.size * dtype.itemsize > most:
        raise ValueError(f"its {array.size} values of {dtype} would take far more memory than the file")
    return array.astype(dtype)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Lines as a file, packed where its name ends in .gz."""
    with replacing(path, "wb") as file:
        if path.suffix != ".gz":
            file.writelines(line.encode() for line in lines)
            return
        with gzip.GzipFile(path.stem, "wb", fileobj=file, mtime=0) as packed:
            packed.writelines(line.encode() for line in lines)


def tables_of(trace: Trace) -> dict[str, np.ndarray]:
    """A trace's arrays that have a row each."""
    return {name: array for name, array in arrays_of(trace).items() if not name.startswith(EXTRA)}


def csv_lines(trace: Trace, where: str) -> Iterator[str]:
    """The lines of a CSV file, with their ends."""
    yield f"# {described(trace, where)}\n"
    names, columns = [], []
    for name, array in tables_of(trace).items():
        parts = array.reshape(len(array), -1).T
        names += [name] if array.ndim == 1 else [f"{_cell(name)}{i}" for i in range(len(parts))]
        columns += [_cells(part) for part in parts]
    yield ",".join(names) + "\n"
    for row in zip(*columns):
        yield ",".join(row) + "\n"


def _cell(name: str) -> str:
    return CELLS.get(name, f"{name}_")


def _cells(column: np.ndarray) -> list[str]:
    """Shortest texts that read back as the same numbers."""
    if column.dtype.kind != "f":
        return list(map(str, column.tolist()))
    return ["" if text == "nan" else text for text in column.astype(np.float32).astype(str).tolist()]


def read_csv(text: str, where: str) -> Trace:
    """What `csv_lines` wrote."""
    lines = whole_lines(text, where)
    if len(lines) < 3:
        raise UserError(f"{where}: {EMPTY}")
    names, rows = lines[1].split(","), [line.split(",") for line in lines[2:]]
    for number, row in enumerate(rows, 3):
        if len(row) != len(names):
            raise UserError(f"{where}: line {number} has {len(row)} values; {len(names)} are needed")
        if not lines[number - 1].isascii() or "_" in lines[number - 1]:  # `int` takes 1_000 and the digits of others
            column = next(i for i, cell in enumerate(row) if not cell.isascii() or "_" in cell)
            raise _no_number(row[column], f"{where}: column {names[column]}, line {number}")
    arrays: dict[str, np.ndarray] = {}
    for name, columns in _grouped(names, where).items():
        whole = name in (*INDEX_COLUMNS, BATCH, "ids")
        array = np.empty((len(rows), len(columns)), np.int64 if whole else np.float32)
        for place, column in enumerate(columns):
            array[:, place] = _numbers([row[column] for row in rows], whole, f"{where}: column {names[column]}")
        arrays[name] = array[:, 0] if name in (*INDEX_COLUMNS, BATCH) else array
    return undescribed(lines[0].removeprefix("#"), arrays, where)


def _grouped(names: list[str], where: str) -> dict[str, list[int]]:
    """Columns by the array that they belong to."""
    arrays = {prefix: name for name, prefix in CELLS.items()}
    groups: dict[str, list[int]] = {}
    for column, name in enumerate(names):
        head, _, number = name.rpartition("_")
        if name not in (*INDEX_COLUMNS, BATCH):
            name = arrays.get(head + "_", head if head.startswith(LOOKAHEAD) else "")
            if not name or number != str(len(groups.get(name, []))):
                raise UserError(f"{where}: line 2: column {shown(names[column])} is not known, or out of order")
        elif name in groups:
            raise UserError(f"{where}: line 2: column {name} is there twice")
        groups.setdefault(name, []).append(column)
    return groups


def _numbers(cells: list[str], whole: bool, where: str) -> np.ndarray:
    """A column's numbers, one by one: an array of its texts would be as wide as the longest."""
    try:
        if whole:
            return np.array([int(cell) for cell in cells], np.int64)
        return np.array([float(cell or "nan") for cell in cells]).astype(np.float32)
    except (ValueError, OverflowError):
        number, cell = next((n, c) for n, c in enumerate(cells, 3) if not _is_number(c, whole))
        raise _no_number(cell, f"{where}, line {number}", whole) from None


def _no_number(cell: str, where: str, whole: bool = False) -> UserError:
    return UserError(f"{where}: {shown(cell)} is not a {'whole ' * whole}number")


def _is_number(cell: str, whole: bool) -> bool:
    try:
        return -(2**63) <= int(cell) < 2**63 if whole else float(cell or 0) is not None
    except ValueError:
        return False


def json_lines(trace: Trace, where: str) -> Iterator[str]:
    """The lines of a JSONL file, with their ends."""
    yield described(trace, where) + "\n"
    tables = tables_of(trace)
    tables["phase"] = np.array(PHASES)[tables["phase"]]
    lists = {name: _values(array) for name, array in tables.items()}
    for row in range(len(trace)):
        line: dict[str, Any] = {}
        for name, values in lists.items():
            if (value := values[row]) is None:
                continue
            if name.startswith(LOOKAHEAD):
                line.setdefault("lookahead", {})[name.removeprefix(LOOKAHEAD)] = value
            else:
                line[name] = value
        yield json.dumps(line) + "\n"


def _values(array: np.ndarray) -> list:
    """A value a row, None where it was not recorded; floats have as few digits as tell them apart."""
    if array.dtype.kind != "f":
        return array.tolist()
    absent = np.isnan(array[:, 0])
    exact = array.astype(np.float32).astype(str).astype(np.float64)
    return [None if gone else row for gone, row in zip(absent.tolist(), exact.tolist())]


def read_jsonl(text: str, where: str) -> Trace:
    """What `json_lines` wrote."""
    lines = whole_lines(text, where)
    facts, _ = facts_and_about(read_meta(lines[0], where), where)
    found: dict[str, dict[int, Any]] = {}  # values by array and row, so that what is absent costs nothing
    for row, line in enumerate(lines[1:]):
        for name, value in _object(line, facts.layers, f"{where}: line {row + 2}").items():
            found.setdefault(name, {})[row] = value
    if not found:
        raise UserError(f"{where}: {EMPTY}")
    rows, bytes_left = len(lines) - 1, most_bytes(len(text))
    arrays: dict[str, np.ndarray] = {}
    for name, values in found.items():
        width = next((len(value) for value in values.values() if isinstance(value, list)), 0)
        bytes_left -= 4 * rows * width
        if bytes_left < 0:
            raise UserError(f"{where}: {name}: so few lines have it that the table would be far larger than the file")
        absent = next((row for row in range(rows) if row not in values), None) if len(values) < rows else None
        row = next((r for r, v in values.items() if (len(v) if isinstance(v, list) else 0) != width), None)
        if row is None and not width:
            row = absent
        if row is not None:
            raise UserError(f"{where}: line {row + 2}: {name} is not like those of the other lines")
        try:
            kind = None if name in (*INDEX_COLUMNS, BATCH, "ids") else np.float32
            arrays[name] = array = np.array(list(values.values()), kind)
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{where}: {name}: {error}") from None
        if absent is not None:
            arrays[name] = np.full((rows, width), np.nan, array.dtype if kind else float)
            arrays[name][list(values)] = array
    return undescribed(lines[0], arrays, where)


def _object(line: str, layers: int, where: str) -> dict[str, Any]:
    """A row by the names of arrays."""
    try:
        row = json.loads(line)
        row["phase"] = PHASES.index(row["phase"])
        ahead: Mapping[str, Any] = row.pop("lookahead", {})
        if unknown := row.keys() - {*INDEX_COLUMNS, BATCH, *CELLS}:
            raise ValueError(f"{shown_name(min(unknown))} is not known")
        odd = next((d for d in ahead if not d.isdecimal() or str(int(d)) != d or not 0 < int(d) < layers), None)
        if odd is not None:
            raise ValueError(f"lookahead {shown(odd)}: a distance from 1 to {layers - 1} layers is needed")
        row |= {f"{LOOKAHEAD}{distance}": scores for distance, scores in ahead.items()}
        if not all(isinstance(value, (int, float, list)) for value in row.values()):
            raise ValueError("a value is neither a number nor a list of numbers")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{where}: not a row of a trace ({error})") from None
    return row
