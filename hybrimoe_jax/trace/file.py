"""Routing traces: which experts every token chose in every MoE layer, as one columnar, versioned `.npz` file.

Row = one token in one MoE layer of one step. R rows, at least one, E experts, k experts per token. Arrays of version 2:

| array | type, shape | holds |
| --- | --- | --- |
| `meta` | JSON text | `format` "hybrimoe-trace", `version`, `facts` (below), `about` (clock, system, source: free) |
| `step` | int32 [R] | forward pass, from 0, in the order they ran |
| `layer` | int32 [R] | MoE layer, counted from 0 over MoE layers only (a leading dense layer has no number) |
| `phase` | uint8 [R] | 0 prefill, 1 decode; one value within a step |
| `sequence` | int32 [R] | which sequence the token belongs to |
| `position` | int32 [R] | its position in that sequence, from 0 |
| `batch` | int32 [R], optional | which batch its sequence ran in: sequences of one batch ran side by side |
| `ids` | int32 [R, k] | the selected experts, distinct |
| `weights` | float32 [R, k], optional | what multiplied their outputs |
| `scores` | float32 [R, E], optional | the router's probability of every expert |
| `lookahead_<d>` | float32 [R, E], optional | prediction of layer + d's probabilities from this layer's state |
| `x_landed` | int32 [n, 4], optional | prefetches when committed: (step, layer to be planned, their layer, expert) |
| `x_<name>` | any, optional | additions by other programs: kept by `load_trace`, not interpreted |

Rows are ordered by (step, layer). A row whose scores or prediction were not recorded is NaN throughout; predictions
past the last layer are always so. What is absent is absent: nothing is filled in. Version 1 had no `batch`; it is read
as ever, and so will this one be.

Facts: `model_type`, `layers` (MoE layers), `experts`, `top_k`, `expert_bytes` (bytes of one expert per weight format).
Integers are stored compressed, floats plainly (they hardly shrink). Reading needs NumPy only and never unpickles.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from hybrimoe_jax import arguments
from hybrimoe_jax.errors import UserError, is_name, shown
from hybrimoe_jax.files import check_plain_file, replacing
from hybrimoe_jax.npz import read_npz
from hybrimoe_jax.trace.check import check_rows
from hybrimoe_jax.trace.columns import BATCH, INDEX_COLUMNS, Trace
from hybrimoe_jax.trace.facts import TraceFacts

FORMAT, VERSION = "hybrimoe-trace", 2
OLDER_VERSIONS = (1,)
LOOKAHEAD, EXTRA = "lookahead_", "x_"
EMPTY = "it is empty: no token was recorded"


def save_trace(trace: Trace, path: str | os.PathLike) -> None:
    """Checks a trace and writes it, whole or not at all. UserError where it is malformed or cannot be written."""
    path, arrays = arguments.path("path", path), arrays_of(trace)
    check_arrays(arrays, trace.facts, f"trace for {path}")
    meta = describe(trace, f"trace for {path}")
    with replacing(path, "wb") as file, zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        for name, array in {"meta": np.array(meta), **arrays}.items():
            floats = array.dtype.kind == "f"
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_STORED if floats else zipfile.ZIP_DEFLATED
            with archive.open(entry, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array, order="C"), allow_pickle=False)


def describe(trace: Trace, where: str, **more: Any) -> str:
    """The JSON that says what a file of ours is; `more` keys go with it. UserError where JSON cannot hold `about`."""
    facts = {**dataclasses.asdict(trace.facts), "expert_bytes": dict(trace.facts.expert_bytes)}
    meta = {"format": FORMAT, "version": VERSION, "facts": facts, "about": trace.about, **more}
    try:
        return json.dumps(meta, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: `about` holds something that JSON cannot ({error})") from None


def load_trace(path: str | os.PathLike) -> Trace:
    """Reads and checks a trace. Raises UserError naming the file and the first thing wrong, down to the record."""
    return trace_of(read_arrays(arguments.path("trace", path)), f"trace {path}")


def read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """All arrays of an `.npz` archive; UserError where it is not a whole one."""
    where = f"trace {path}"
    check_plain_file(path, where)
    try:
        return read_npz(path)
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # a damaged archive fails in zipfile, zlib, struct, numpy or not at all
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{where}: not a readable .npz file ({said})") from None


def trace_of(arrays: Mapping[str, np.ndarray], where: str) -> Trace:
    """The trace that a file's arrays hold; UserError, beginning with `where`, for the first thing wrong."""
    arrays = dict(arrays)
    meta = arrays.pop("meta", None)
    if meta is None or meta.ndim or meta.dtype.kind != "U":
        raise UserError(f"{where}: no `meta` text, so not a {FORMAT} file (`generate --trace FILE` writes one)")
    read = read_meta(str(meta), where)
    return trace_from(arrays, *facts_and_about(read, where), where)


def trace_from(arrays: Mapping[str, np.ndarray], facts: TraceFacts, about: dict, where: str) -> Trace:
    """A trace from its arrays by their names in the file, checked."""
    arrays = dict(arrays)
    check_arrays(arrays, facts, where)
    extra = {name[len(EXTRA) :]: arrays.pop(name) for name in list(arrays) if name.startswith(EXTRA)}
    columns = {name: arrays[name].astype(dtype, copy=False) for name, dtype in INDEX_COLUMNS.items()}
    ids = arrays["ids"].astype(np.int32, copy=False)
    batch = arrays.pop(BATCH).astype(np.int32, copy=False) if BATCH in arrays else None
    floats = {name: a.astype(np.float32, copy=False) for name, a in arrays.items() if name not in (*columns, "ids")}
    weights, scores = floats.pop("weights", None), floats.pop("scores", None)
    ahead = {int(name[len(LOOKAHEAD) :]): a for name, a in floats.items()}
    more = {"lookahead": ahead, "about": about, "extra": extra, "batch": batch}
    return Trace(facts, **columns, ids=ids, weights=weights, scores=scores, **more)


def check_trace(trace: Trace, where: str) -> None:
    """Raises UserError, beginning with `where`, for the first malformed column or row."""
    check_arrays(arrays_of(trace), trace.facts, where)


def check_arrays(arrays: Mapping[str, np.ndarray], facts: TraceFacts, where: str) -> None:
    """Raises UserError naming the first malformed array, or the first malformed row of well-formed ones."""
    needed = (*INDEX_COLUMNS, "ids")
    missing = [name for name in needed if name not in arrays]
    if missing:
        raise UserError(f"{where}: lacks the array{'s' * (len(missing) > 1)} {', '.join(missing)}")
    rows = len(arrays["step"]) if arrays["step"].ndim else 0
    for name, array in arrays.items():
        if name in (*needed, BATCH):
            kinds, words = "iu", "integers"
            shape = (rows, facts.top_k) if name == "ids" else (rows,)
        elif name in ("weights", "scores") or re.fullmatch(LOOKAHEAD + "[1-9][0-9]{0,5}", name):
            kinds, words = "f", "floats"
            shape = (rows, facts.top_k if name == "weights" else facts.experts)
        elif name.startswith(EXTRA):
            _check_addition(name, array, where)
            continue
        else:
            raise UserError(f"{where}: unknown array {shown(name)}; additions are named {EXTRA}<name>")
        if array.shape != shape:
            raise UserError(f"{where}: array {name} has shape {list(array.shape)}; {list(shape)} is needed")
        if array.dtype.kind not in kinds:
            raise UserError(f"{where}: array {name} holds {array.dtype}; {words} are needed")
    if not rows:
        raise UserError(f"{where}: {EMPTY}")
    check_rows(arrays, facts, where)


def _check_addition(name: str, array: Any, where: str) -> None:
    """UserError where no `.npz` file could hold it."""
    if not is_name(name):
        raise UserError(f"{where}: an addition is named {shown(name)}; give it a short, printable name")
    if not isinstance(array, np.ndarray) or array.dtype.hasobject:
        found = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise UserError(f"{where}: array {name} holds {found}; a NumPy array of numbers or texts is needed")


def arrays_of(trace: Trace) -> dict[str, np.ndarray]:
    """A trace's arrays by their names in the file."""
    arrays = {name: getattr(trace, name) for name in (*INDEX_COLUMNS, BATCH, "ids", "weights", "scores")}
    arrays |= {f"{LOOKAHEAD}{d}": ahead for d, ahead in sorted(trace.lookahead.items())}
    arrays |= {f"{EXTRA}{name}": array for name, array in trace.extra.items()}
    return {name: array for name, array in arrays.items() if array is not None}


def _finite(text: str) -> float:
    """A number of the file's JSON; ValueError for one that JSON has no word for."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not finite")
    return value


def read_meta(text: str, where: str) -> dict[str, Any]:
    """What `describe` wrote; UserError where it did not, and for a version that is not known."""
    try:
        read = json.loads(text, parse_constant=_finite, parse_float=_finite)
        kind, version = read["format"], read["version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{where}: its `meta` is not the JSON of a trace") from None
    if kind != FORMAT:
        raise UserError(f"{where}: its format is {shown(kind)}; {FORMAT!r} is needed")
    if version not in (VERSION, *OLDER_VERSIONS) or isinstance(version, bool):
        known = ", ".join(map(str, sorted((VERSION, *OLDER_VERSIONS))))
        raise UserError(f"{where}: version {shown(version)} is not supported (this program reads {known})")
    return read


def facts_and_about(read: dict[str, Any], where: str) -> tuple[TraceFacts, dict[str, Any]]:
    """Of the model, and of the trace's origin."""
    try:
        facts = TraceFacts(**read["facts"])
    except (KeyError, TypeError):
        names = ", ".join(f.name for f in dataclasses.fields(TraceFacts))
        raise UserError(f"{where}: its facts must be {names}") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    about = read.get("about") or {}
    return facts, about if isinstance(about, dict) else {"about": about}
