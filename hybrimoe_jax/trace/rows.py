"""A trace as a table for other programs: CSV, and JSON lines. Both hold all that the `.npz` file holds, exactly.

A line is a row of the trace: one token in one MoE layer of one step. The first line says what the `.npz` file's `meta`
says; additions (`x_<name>`) stand there too, as `extra`.

* **CSV**: the first line is `# ` and that JSON, the second the columns: those of the trace, with `expert_<i>`,
  `weight_<i>`, `score_<expert>` and `lookahead_<distance>_<expert>`. What was not recorded is an empty cell.
* **JSONL**: the first line is that JSON; every other one an object: `step`, `layer`, `phase` ("prefill" or "decode"),
  `sequence`, `position`, `batch`, `ids`, `weights`, `scores`, `lookahead` (by distance), each where it was recorded.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hybrimoe_jax.errors import UserError, shown, shown_name
from hybrimoe_jax.files import replacing
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
PLAIN = "biufU"
"""Kinds of additions that a text can hold: numbers, yes and no, and text."""
LONGEST_CELL, DIGITS = 64, frozenset("0123456789+-.einfaEINFA")
"""Of a number as a text: Python reads other alphabets' digits too, and underlines."""
CELLS = {"ids": "expert_", "weights": "weight_", "scores": "score_"}
"""Columns of the arrays that have several numbers a row."""


def described(trace: Trace, where: str) -> str:
    """The first line: a trace's `meta`, with its additions. UserError for an unsound trace, and where JSON cannot."""
    check_trace(trace, where)
    for name, array in trace.extra.items():
        if array.dtype.kind not in PLAIN or (array.dtype.kind == "f" and not np.isfinite(array).all()):
            raise UserError(f"{where}: {EXTRA}{name} ({array.dtype}) holds what JSON cannot; leave it out, or use .npz")
    extra = {name: {"dtype": str(array.dtype), "values": array.tolist()} for name, array in trace.extra.items()}
    return describe(trace, where, extra=extra) if extra else describe(trace, where)


def undescribed(line: str, arrays: dict[str, np.ndarray], where: str) -> Trace:
    """The trace of arrays by their names in the `.npz` file, and of the first line."""
    read = read_meta(line, where)
    try:
        for name, entry in read.get("extra", {}).items():
            dtype, values = np.dtype(entry["dtype"]), np.array(entry["values"])
            if dtype.kind not in PLAIN or values.size * dtype.itemsize > 1000 + 100 * len(line):
                raise ValueError(f"{shown(name)} is of type {shown(entry['dtype'])}")
            arrays[EXTRA + name] = values.astype(dtype)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise UserError(f"{where}: its `extra` is damaged ({error})") from None
    return trace_from(arrays, *facts_and_about(read, where), where)


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
        if len(max(row, key=len)) > LONGEST_CELL:
            raise UserError(f"{where}: line {number}: {shown(max(row, key=len))} is not a number")
    arrays: dict[str, np.ndarray] = {}
    for name, columns in _grouped(names, where).items():
        whole = name in (*INDEX_COLUMNS, BATCH, "ids")
        cells = [[row[column] for column in columns] for row in rows]
        array = _numbers(cells, whole, f"{where}: column {names[columns[0]]}", 3)
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
            if not name or not number.isdecimal() or int(number) != len(groups.get(name, [])):
                raise UserError(f"{where}: line 2: column {shown(names[column])} is not known, or out of order")
        elif name in groups:
            raise UserError(f"{where}: line 2: column {name} is there twice")
        groups.setdefault(name, []).append(column)
    return groups


def _numbers(cells: list[list[str]], whole: bool, where: str, first: int) -> np.ndarray:
    try:
        if not all(set("".join(row)) <= DIGITS for row in cells):
            raise ValueError
        if whole:
            return np.array(cells).astype(np.int64)
        return np.array([[cell or "nan" for cell in row] for row in cells]).astype(np.float32)
    except (ValueError, OverflowError):
        number, cell = next((n, c) for n, row in enumerate(cells, first) for c in row if not _is_number(c, whole))
        raise UserError(f"{where}, line {number}: {shown(cell)} is not a {'whole ' * whole}number") from None


def _is_number(cell: str, whole: bool) -> bool:
    try:
        if not set(cell) <= DIGITS:
            return False
        return abs(int(cell) if whole else float(cell or 0)) < 2**63 or not whole
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
    if len(lines) < 2:
        raise UserError(f"{where}: {EMPTY}")
    layers = facts_and_about(read_meta(lines[0], where), where)[0].layers
    rows = [_object(line, layers, f"{where}: line {number}") for number, line in enumerate(lines[1:], 2)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    arrays: dict[str, np.ndarray] = {}
    for name in names:
        values = [row.get(name) for row in rows]
        width = next((len(value) for value in values if isinstance(value, list)), 0)
        filled = [[np.nan] * width if value is None else value for value in values] if width else values
        for number, value in enumerate(filled, 2):
            if not (len(value) == width if isinstance(value, list) else not width and value is not None):
                raise UserError(f"{where}: line {number}: {name} is not like those of the other lines")
        try:
            arrays[name] = np.array(filled, None if name in (*INDEX_COLUMNS, BATCH, "ids") else np.float32)
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{where}: {name}: {error}") from None
    return undescribed(lines[0], arrays, where)


def _object(line: str, layers: int, where: str) -> dict[str, Any]:
    """A row by the names of arrays. No router looks ahead farther than there are layers."""
    try:
        row = json.loads(line)
        row["phase"] = PHASES.index(row["phase"])
        ahead: Mapping[str, Any] = row.pop("lookahead", {})
        if unknown := row.keys() - {*INDEX_COLUMNS, BATCH, *CELLS}:
            raise ValueError(f"{shown_name(min(unknown))} is not known")
        if far := [distance for distance in ahead if not (distance.isdecimal() and 0 < int(distance) < layers)]:
            raise ValueError(f"lookahead {shown_name(far[0])} is no distance between {layers} layers")
        row |= {f"{LOOKAHEAD}{distance}": scores for distance, scores in ahead.items()}
        if not all(isinstance(value, (int, float, list)) for value in row.values()):
            raise ValueError("a value is neither a number nor a list of numbers")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{where}: not a row of a trace ({error})") from None
    return row
