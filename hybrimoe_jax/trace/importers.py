"""Any trace file as a `Trace`: our own format, or one of the public layouts of `layouts`, told apart by their contents.

What a layout does not hold stays absent (`info.lacks` names it). Nothing is guessed: a file that is truncated, edited
or of a model whose shape is unknown is refused.
"""

from __future__ import annotations

import dataclasses
import gzip
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hybrimoe_jax import arguments
from hybrimoe_jax.encoding import decode, read_bytes
from hybrimoe_jax.errors import UserError, shown
from hybrimoe_jax.files import check_plain_file
from hybrimoe_jax.npz import most_bytes
from hybrimoe_jax.trace import layouts, rows
from hybrimoe_jax.trace.check import LARGEST
from hybrimoe_jax.trace.columns import Trace, stack_lookahead, stack_rows
from hybrimoe_jax.trace.file import check_trace, read_arrays, trace_of
from hybrimoe_jax.trace.parquet import read_parquet
from hybrimoe_jax.trace.route_csv import route_csv

MOST_BYTES = 1 << 32
"""Of a table as text: what is longer is no trace, /dev/zero for one."""
READS = (
    "a trace of ours (.npz with `meta`, or what `trace export` makes of it: .csv, .jsonl, .parquet), "
    "ESFT expert scores (a folder of expert_weights_<layer>.txt, or .npz), "
    "gpt-oss fingerprints (.json or .npz), a route_trace (.csv); text files also as .gz"
)


def open_trace(path: str | os.PathLike) -> Trace:
    """Reads a trace of any known layout and checks it; UserError naming the file and the first thing wrong in it.

    Steps are the forward passes that ran: an ESFT file is one prefill of a whole prompt per sequence.
    `tokens.one_token_steps` makes a token-by-token replay of it.
    """
    path = Path(arguments.path("trace", path))
    where = f"trace {path}"
    try:
        with np.errstate(over="raise"):
            return _opened(path, where)
    except FloatingPointError:
        raise UserError(f"{where}: a number in it is beyond what float32 holds (3.4e38)") from None


def _opened(path: Path, where: str) -> Trace:
    if path.is_dir():
        return _checked(layouts.esft_folder(path, where), where)
    check_plain_file(path, where)
    head = _head(path, where)
    if head[:2] == b"PK":
        arrays = read_arrays(path)
        if "meta" in arrays:
            return trace_of(arrays, where)
        if layouts.ESFT_ARRAYS <= arrays.keys():
            return _checked(layouts.esft_arrays(arrays, path, where), where)
        if layouts.FINGERPRINT_ARRAYS <= arrays.keys():
            return _checked(layouts.fingerprint_arrays(arrays, path, where), where)
        raise UserError(
            f"{where}: no known layout has the arrays {', '.join(sorted(arrays))}; this program reads {READS}"
        )
    if head[:4] == b"PAR1":
        return read_parquet(path.read_bytes(), where)
    return _text_layout(head, path, where)


def join_traces(traces: Sequence[Trace]) -> Trace:
    """Traces of one model behind one another, steps and sequences renumbered; UserError where the models differ.

    What only some of them hold is NaN in the others' rows, as in any trace; additions of other programs (`extra`) are
    left out.
    """
    traces = arguments.several("traces", traces, Trace)
    wrong = next((trace for trace in traces if not isinstance(trace, Trace)), None)
    if wrong is not None or not traces:
        raise UserError("no traces to join: give at least one" if not traces else f"traces: {shown(wrong)} is no trace")
    first = traces[0]
    if len(traces) == 1:
        return first
    if any(trace.facts != first.facts for trace in traces):
        raise UserError("these traces are of different models and cannot be joined")
    sizes = [len(trace) for trace in traces]
    batches = [trace.batch for trace in traces if trace.batch is not None]
    return Trace(
        first.facts,
        step=_renumbered("steps", [t.step for t in traces]),
        layer=np.concatenate([t.layer for t in traces]),
        phase=np.concatenate([t.phase for t in traces]),
        sequence=_renumbered("sequences", [t.sequence for t in traces]),
        position=np.concatenate([t.position for t in traces]),
        ids=np.concatenate([t.ids for t in traces]),
        weights=stack_rows([t.weights for t in traces], sizes, first.facts.top_k),
        scores=stack_rows([t.scores for t in traces], sizes, first.facts.experts),
        lookahead=stack_lookahead([t.lookahead for t in traces], sizes, first.facts.experts),
        about={"joined": [t.about for t in traces]},
        batch=None if len(batches) < len(traces) else _renumbered("batches", batches),
    )


def _renumbered(what: str, parts: Sequence[np.ndarray]) -> np.ndarray:
    """Numbers behind one another; UserError where they do not fit in 32 bits."""
    starts = np.cumsum([0, *(_count(part) for part in parts)], dtype=np.int64)
    if starts[-1] > LARGEST + 1:
        raise UserError(f"the traces to join have {starts[-1]} {what} together; {LARGEST + 1} fit, so join fewer")
    return np.concatenate([part + start for part, start in zip(parts, starts)]).astype(np.int32)


def _text_layout(head: bytes, path: Path, where: str) -> Trace:
    if head.startswith(rows.CSV_MARK.encode()):
        return rows.read_csv(_text(path, where), where)
    if head.startswith(rows.JSON_MARK.encode()):
        return rows.read_jsonl(_text(path, where), where)
    if not head:
        raise UserError(f"{where}: an empty file")
    if head[:1] in (b"{", b"["):
        return _checked(layouts.fingerprint_json(_text(path, where), path, where), where)
    if head[:1] == b"#" or head.startswith(b"turn,"):
        return _checked(route_csv(_text(path, where), path, where), where)
    if path.name.startswith("expert_weights_"):
        raise UserError(f"{where}: one layer of an ESFT trace; give the folder that holds all its layers")
    raise UserError(f"{where}: not a trace; this program reads {READS}")


def _count(column: np.ndarray) -> int:
    return int(column.max()) + 1 if len(column) else 0


def _checked(trace: Trace, where: str) -> Trace:
    check_trace(trace, where)
    return dataclasses.replace(trace, phase=trace.phase.astype(np.uint8), ids=trace.ids.astype(np.int32))


def _head(path: Path, where: str) -> bytes:
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror or error})") from None
    if head[:2] == b"\x1f\x8b":
        head = _unpacked(path, where, 64)
    return head.removeprefix(b"\xef\xbb\xbf").lstrip()


def _text(path: Path, where: str) -> str:
    data = read_bytes(path, where, MOST_BYTES)
    return decode(_unpacked(path, where) if data[:2] == b"\x1f\x8b" else data, where)


def _unpacked(path: Path, where: str, size: int = -1) -> bytes:
    try:
        most = most_bytes(path.stat().st_size)
        with gzip.open(path) as file:
            data = file.read(size if size >= 0 else most + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{where}: a damaged gzip file ({error})") from None
    if len(data) > most:
        raise UserError(f"{where}: it would unpack to more than {most} bytes; unpack it, look, and give the part meant")
    return data
