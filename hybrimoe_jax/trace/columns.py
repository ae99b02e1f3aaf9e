"""A routing trace in memory: which experts every token chose in every MoE layer, as columns with a row for each."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hybrimoe_jax import arguments, tables
from hybrimoe_jax.errors import UserError, shown
from hybrimoe_jax.trace.facts import TraceFacts

if TYPE_CHECKING:
    from hybrimoe_jax.trace.analysis import ReuseDistance
    from hybrimoe_jax.trace.plots import TracePlots

PHASES = ("prefill", "decode")
INDEX_COLUMNS = {"step": np.int32, "layer": np.int32, "phase": np.uint8, "sequence": np.int32, "position": np.int32}
BATCH = "batch"


class Record(NamedTuple):
    """One MoE layer of one step, N tokens; arrays are views of the trace's."""

    step: int
    layer: int
    phase: str
    sequence: np.ndarray  # [N]
    position: np.ndarray  # [N]
    ids: np.ndarray  # [N, k]
    weights: np.ndarray | None  # [N, k]
    scores: np.ndarray | None  # [N, E], or None where any row lacks them
    lookahead: dict[int, np.ndarray]  # distance -> [N, E], only where every row has them


@dataclasses.dataclass(repr=False)
class Trace:
    """A whole trace as columns; the docstring of `trace.file` has their types and shapes."""

    facts: TraceFacts
    step: np.ndarray
    layer: np.ndarray
    phase: np.ndarray
    sequence: np.ndarray
    position: np.ndarray
    ids: np.ndarray
    weights: np.ndarray | None = None
    scores: np.ndarray | None = None
    lookahead: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    extra: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    batch: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.step)

    def __repr__(self) -> str:
        facts, held = self.facts, [name for name in ("weights", "scores") if getattr(self, name) is not None]
        held += [f"lookahead {', '.join(map(str, sorted(self.lookahead)))}"] if self.lookahead else []
        return (
            f"<Trace of {facts.model_type}: {len(np.unique(self.sequence))} sequences, {len(np.unique(self.step))} "
            f"steps, {facts.layers} MoE layers of {facts.experts} experts, {facts.top_k} a token"
            f"{'; ' + ', '.join(held) if held else ''}>"
        )

    def records(self) -> Iterator[Record]:
        """Every (step, MoE layer) in order."""
        if not len(self):
            return
        change = np.flatnonzero((np.diff(self.step) != 0) | (np.diff(self.layer) != 0)) + 1
        bounds = [0, *change.tolist(), len(self)]
        has_scores = np.zeros(len(self), bool) if self.scores is None else ~np.isnan(self.scores[:, 0])
        has_ahead = {d: ~np.isnan(ahead[:, 0]) for d, ahead in self.lookahead.items()}
        for start, stop in itertools.pairwise(bounds):
            rows = slice(start, stop)
            yield Record(
                int(self.step[start]),
                int(self.layer[start]),
                PHASES[self.phase[start]],
                self.sequence[rows],
                self.position[rows],
                self.ids[rows],
                None if self.weights is None else self.weights[rows],
                self.scores[rows] if self.scores is not None and has_scores[rows].all() else None,
                {d: ahead[rows] for d, ahead in self.lookahead.items() if has_ahead[d][rows].all()},
            )

    def save(self, path: str | os.PathLike) -> None:
        """Writes it as `.npz`, which `open_trace` reads; see `save_trace`."""
        from hybrimoe_jax.trace.file import save_trace

        save_trace(self, path)

    def select(self, rows: np.ndarray) -> Trace:
        """The trace of these rows (a mask, or their numbers in order); additions that have a row each go with them."""
        rows = np.asarray(rows)
        rows = rows if rows.size else rows.astype(int)  # an empty list is of floats to NumPy
        fits = rows.shape == (len(self),) if rows.dtype == bool else rows.dtype.kind in "iu" and rows.ndim == 1
        if not fits or (rows.dtype != bool and rows.size and not -len(self) <= rows.min() <= rows.max() < len(self)):
            raise UserError(f"select: {shown(rows)} is neither a mask of the {len(self)} rows nor numbers of them")
        names = ("weights", "scores", BATCH)
        optional = {name: None if (a := getattr(self, name)) is None else a[rows] for name in names}
        return dataclasses.replace(
            self,
            **{name: getattr(self, name)[rows] for name in (*INDEX_COLUMNS, "ids")},
            **optional,
            lookahead={distance: ahead[rows] for distance, ahead in self.lookahead.items()},
            extra={name: a[rows] if np.shape(a)[:1] == (len(self),) else a for name, a in self.extra.items()},
        )

    def table(self) -> Any:
        """A row for each MoE layer: how its experts are used, see `analysis.layer_rows`."""
        return tables.table(_analysis().layer_rows(self))

    def frequency(self) -> np.ndarray:
        """[L, E]: the share of a layer's tokens that chose each expert; a layer's sum is k, 0 where it has no rows."""
        return _analysis().frequency(self)

    def reuse_by_rank(self) -> np.ndarray:
        """The chance that an expert is chosen again by the next token, by its rank for this one, the highest first.

        [E] where the trace holds full scores, [k] where it holds the weights of the chosen ones only; UserError where
        neither.
        """
        return _analysis().reuse_by_rank(self)

    def reuse_distance(self) -> ReuseDistance:
        """How many distinct experts of a layer were chosen between two uses of one."""
        return _analysis().reuse_distance(self)

    def recall(self, distance: int = 1) -> float:
        """The share of a layer's chosen experts that its router named from the state `distance` layers before.

        `analysis.recall` has it by layer. NaN where nothing was predicted.
        UserError where the trace holds no predictions at this distance.
        """
        return _mean(_analysis().recall(self, arguments.whole("distance", distance)))

    def similarity(self, distance: int = 1) -> float:
        """The mean cosine of a router's probabilities from its layer's own state and from `distance` layers before.

        `analysis.similarity` has it by layer. NaN where nothing was predicted.
        UserError where the trace lacks these predictions, or full scores.
        """
        return _mean(_analysis().similarity(self, arguments.whole("distance", distance)))

    @property
    def plot(self) -> TracePlots:
        """Pictures of it; matplotlib is needed."""
        from hybrimoe_jax.trace.plots import TracePlots

        return TracePlots(self)


def _mean(values: np.ndarray) -> float:
    """The mean of those that are no NaN; NaN where none is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def _analysis():
    """Its functions take a trace, so it imports this module."""
    from hybrimoe_jax.trace import analysis

    return analysis


def stack_rows(parts: Sequence[np.ndarray | None], sizes: Sequence[int], width: int) -> np.ndarray | None:
    """Parts of `sizes` rows under one another, NaN where a part is absent; None where all are."""
    if all(part is None for part in parts):
        return None
    filled = [np.full((n, width), np.nan, np.float32) if p is None else p for p, n in zip(parts, sizes, strict=True)]
    return np.concatenate(filled)


def stack_lookahead(
    parts: Sequence[Mapping[int, np.ndarray]], sizes: Sequence[int], width: int
) -> dict[int, np.ndarray]:
    """The same by distance."""
    distances = sorted({distance for part in parts for distance in part})
    found = {d: stack_rows([part.get(d) for part in parts], sizes, width) for d in distances}
    return {distance: rows for distance, rows in found.items() if rows is not None}
