"""The route_trace layout (Helldez/BigMoeOnEdge, `*.route.csv`).

First `#` lines with the model's facts and each layer's expert bytes, then a row per selected expert:
`turn,phase,step,layer,slot,expert,weight,residency,expert_bytes`.

Prompt tokens are steps of their own, written layer by layer; the last layer is written for the last of them only.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.trace.check import LARGEST
from hybrimoe_jax.trace.columns import Trace
from hybrimoe_jax.trace.facts import MODELS, TraceFacts
from hybrimoe_jax.trace.layouts import PREFILL, whole_lines

ROUTE_COLUMNS = "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes"


def route_csv(text: str, path: Path, where: str) -> Trace:
    """A route_trace. `extra` keeps the engine's own `residency` [R, k] (1 was a hit) and `layer_bytes` [L]."""
    header, sizes, rows = _read(text, where)
    facts = _facts(header, sizes, where)
    about = {"source": "route_trace", "model": header.get("model", "").rpartition("/")[2], "file": path.name}
    trace = _route_rows(rows, facts, where)
    if "as-stored" in facts.expert_bytes:
        trace.extra["layer_bytes"] = np.array([sizes[layer] for layer in range(facts.layers)])
    return dataclasses.replace(trace, about=about)


def _read(text: str, where: str) -> tuple[dict[str, str], dict[int, int], list[tuple]]:
    """(facts by name, bytes of an expert by layer, rows with their line numbers first)."""
    header, sizes, rows, begun = {}, {}, [], False
    for number, line in enumerate(whole_lines(text, where), 1):
        try:
            if line.startswith("#"):
                pairs = dict(part.split("=", 1) for part in line[1:].split() if "=" in part)
                if "layer" in pairs:
                    sizes[int(pairs["layer"])] = size = int(pairs["expert_bytes"])
                    if not 0 < size <= LARGEST:
                        raise ValueError(f"expert_bytes {size} is outside 1..{LARGEST}")
                header |= pairs
            elif not begun:
                if line.strip() != ROUTE_COLUMNS:
                    raise ValueError(f"the columns must be {ROUTE_COLUMNS}")
                begun = True
            elif line.strip():
                rows.append((number, *_row(line)))
        except (ValueError, KeyError, OverflowError) as error:
            raise UserError(f"{where}: line {number}: {error}") from None
    return header, sizes, rows


def _row(line: str) -> tuple:
    """The nine values of a row; ValueError where they are not."""
    *integers, weight, residency, size = line.split(",")
    row = (*map(int, integers), float(weight), int(residency), int(size))
    if len(row) != 9:
        raise ValueError("9 values are needed")
    if max(map(abs, (*row[:6], row[8]))) > LARGEST:
        raise ValueError(f"a number beyond {LARGEST}")
    if not 0 <= row[7] <= 127:
        raise ValueError(f"residency {row[7]} is outside 0..127")
    return row


def _facts(header: dict[str, str], sizes: dict[int, int], where: str) -> TraceFacts:
    """The model's, with an expert's bytes where a known model has as many layers and experts."""
    try:
        layers, experts, top_k = (int(header[name]) for name in ("n_layer", "n_expert", "n_expert_used"))
    except (KeyError, ValueError):
        raise UserError(f"{where}: its # lines lack n_layer, n_expert and n_expert_used as numbers") from None
    try:
        facts = TraceFacts(header.get("arch", "unknown"), layers, experts, top_k)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    named = next((n for n, f in MODELS.items() if (f.layers, f.experts) == (layers, experts)), None)
    known = dict(MODELS[named].expert_bytes) if named else {}
    if sorted(sizes) == list(range(layers)):
        known["as-stored"] = round(sum(sizes.values()) / layers)
    return dataclasses.replace(facts, expert_bytes=known)


def _route_rows(rows: list[tuple], facts: TraceFacts, where: str) -> Trace:
    """A record for every k rows; refused where they are not the k slots of one layer, or a step is not whole."""
    if not rows:
        raise UserError(f"{where}: no rows; it is truncated")
    k = facts.top_k
    records = []
    for first in range(0, len(rows), k):
        group = rows[first : first + k]
        if len(group) < k or [row[5] for row in group] != list(range(k)) or len({row[1:5] for row in group}) > 1:
            raise UserError(f"{where}: line {group[0][0]}: not {k} rows, slots 0 to {k - 1}, of one layer")
        line, turn, phase, at, layer = group[0][:5]
        records.append((turn, at, layer, phase, line, group))
    records.sort(key=lambda record: record[:3])  # prompt tokens are logged layer by layer
    turn, at, layer, phase, line = (np.array([record[i] for record in records]) for i in range(5))
    step = np.cumsum(np.append(0, (np.diff(turn) != 0) | (np.diff(at) != 0)))
    _whole_steps(step, layer, phase, line, facts, where)
    first_of_turn = at[np.searchsorted(turn, turn)]

    def table(index: int, dtype) -> np.ndarray:
        return np.array([[row[index] for row in record[5]] for record in records], dtype)

    return Trace(
        facts,
        step=step.astype(np.int32),
        layer=layer.astype(np.int32),
        phase=phase,
        sequence=turn.astype(np.int32),
        position=(at - first_of_turn).astype(np.int32),
        ids=table(6, np.int64),
        weights=table(7, np.float32),
        extra={"residency": table(8, np.int8)},
    )


def _whole_steps(step, layer, phase, line, facts: TraceFacts, where: str) -> None:
    """Every layer of every step is there, but for the last one at prompt tokens, which that engine leaves out."""
    full = list(range(facts.layers))
    ends = np.append(np.flatnonzero(np.diff(step)) + 1, len(step)).tolist()
    for begin, end in itertools.pairwise([0, *ends]):
        got = layer[begin:end].tolist()
        if got != full and not (phase[begin] == PREFILL and got == full[:-1]):
            odd = next((i for i, (g, f) in enumerate(zip(got, full)) if g != f), min(len(got), len(full)))
            said = "more than once" if len(got) > len(full) or len(set(got)) < len(got) else "not whole"
            raise UserError(
                f"{where}: line {line[min(begin + odd, end - 1)]}: a layer of this step is {said}: "
                f"{len(got)} layers of {facts.layers}; the file is truncated or edited"
            )
