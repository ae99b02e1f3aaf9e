"""How far sequences that run side by side ask for the same experts: what a batch saves a cache and a link.

E experts, k experts per token. Only decode steps are looked at, in which a sequence has one token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.trace.analysis import frequency
from hybrimoe_jax.trace.columns import Trace
from hybrimoe_jax.trace.layouts import DECODE


class SideBySide(NamedTuple):
    """Decode steps of so many sequences at once, by layer and step, on average.

    Attributes:
      sequences: how many ran side by side. records: (step, layer) pairs.
      asked: experts that the sequences chose, each counted for itself. distinct: different ones among them.
      shared: 1 - distinct / asked.
      uniform: distinct ones to be expected if every sequence chose among all experts by chance.
      popularity: the same if an expert is as likely for each as the trace's tokens choose it in that layer.
    """

    sequences: int
    records: int
    asked: float
    distinct: float
    shared: float
    uniform: float
    popularity: float


def side_by_side(trace: Trace) -> list[SideBySide]:
    """By how many sequences ran at once. UserError where none did."""
    layers, counts, distinct = _records(trace)
    likely, k, experts = frequency(trace), trace.facts.top_k, trace.facts.experts
    found = []
    for count in np.unique(counts).tolist():
        mine = counts == count
        by_chance = experts * (1 - (1 - k / experts) ** count)
        by_popularity = (1 - (1 - np.minimum(likely, 1)) ** count).sum(axis=1)[layers[mine]].mean()
        mean = float(distinct[mine].mean())
        shared = 1 - mean / (count * k)
        found.append(SideBySide(count, int(mine.sum()), count * k, mean, shared, by_chance, float(by_popularity)))
    return found


def shared_by_layer(trace: Trace) -> list[float | None]:
    """[L]: of the experts chosen side by side in a layer, the share that another sequence had chosen already."""
    layers, counts, distinct = _records(trace)
    asked = np.bincount(layers, counts * trace.facts.top_k, minlength=trace.facts.layers)
    different = np.bincount(layers, distinct, minlength=trace.facts.layers)
    return [float(1 - d / a) if a else None for d, a in zip(different, asked)]


def as_record(trace: Trace) -> dict[str, Any]:
    """JSON-ready: what `trace overlap` prints."""
    return {
        "side_by_side": [row._asdict() for row in side_by_side(trace)],
        "shared_by_layer": shared_by_layer(trace),
        "marked": trace.batch is not None,
    }


def _records(trace: Trace) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each layer of each decode step with several sequences: the layer, how many they are, distinct experts."""
    rows = np.flatnonzero(trace.phase == DECODE)
    record = trace.step[rows].astype(np.int64) * trace.facts.layers + trace.layer[rows]
    _, first, group, counts = np.unique(record, return_index=True, return_inverse=True, return_counts=True)
    several = counts > 1
    if not several.any():
        raise UserError(
            "overlap: no decode step has several sequences, none ran side by side; `trace record --batch 4` records it"
        )
    chosen = np.unique(group[:, None].astype(np.int64) * trace.facts.experts + trace.ids[rows])
    distinct = np.bincount(chosen // trace.facts.experts, minlength=len(counts))
    return trace.layer[rows][first][several], counts[several], distinct[several]
