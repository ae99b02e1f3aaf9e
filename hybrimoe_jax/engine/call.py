"""What one call of an engine counts while it takes turns with others. Imports no jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from hybrimoe_jax.decide.plan import Counters
from hybrimoe_jax.decide.planner import Planner
from hybrimoe_jax.engine.stats import PrefetchStats, RunStats

PREFETCH = [field.name for field in dataclasses.fields(PrefetchStats) if field.name != "accuracy"]


class Totals(NamedTuple):
    """What an engine has counted since it was made.

    Attributes: `predicted`: by distance from 1, experts predicted, and how many of them were activated. `switches`: of
    the way in which decode steps run.
    """

    counters: Counters
    predicted: list[tuple[int, int]]
    switches: Sequence[Any]

    @classmethod
    def of(cls, planner: Planner | None, switches: Sequence[Any] = ()) -> Totals:
        """As they are now; all zero without a planner."""
        if planner is None:
            return cls(Counters(), [], tuple(switches))
        accuracy = planner.accuracy
        predicted = list(zip(accuracy.predicted, accuracy.came_true))[1:]
        return cls(dataclasses.replace(planner.counters), predicted, tuple(switches))


class Call:
    """One call. Attributes: stats: filled in by `finish`; sequence: its first row's number among all of the engine."""

    def __init__(self, stats: RunStats, sequence: int = 0):
        self.stats, self.sequence, self.finished = stats, sequence, False
        self._prefetch = PrefetchStats()
        self._predicted: list[tuple[int, int]] = []

    def add(self, before: Totals, now: Totals) -> None:
        """What was counted between the two is this call's."""
        for name in PREFETCH:
            counted = getattr(now.counters, f"prefetch_{name}") - getattr(before.counters, f"prefetch_{name}")
            setattr(self._prefetch, name, getattr(self._prefetch, name) + counted)
        told = self._predicted or [(0, 0)] * len(now.predicted)
        self._predicted = [
            (tries + after[0] - then[0], hits + after[1] - then[1])
            for (tries, hits), then, after in zip(told, before.predicted, now.predicted)
        ]
        self.stats.switches += [switch._asdict() for switch in now.switches[len(before.switches) :]]

    def finish(self) -> RunStats:
        """Its statistics, with what was counted."""
        shares = {str(distance): hits / tries for distance, (tries, hits) in enumerate(self._predicted, 1) if tries > 0}
        self.stats.prefetch = dataclasses.replace(self._prefetch, accuracy=shares)
        self.finished = True
        return self.stats


class Calls:
    """Which call an engine serves. `totals`: what the engine has counted so far."""

    def __init__(self, totals: Callable[[], Totals]):
        self._totals, self._current = totals, None
        self._before: Totals | None = None

    def serve(self, call: Call) -> None:
        """What is counted from now on is this call's; what was counted since the last change is the other's."""
        if call is not self._current:
            self._change(call)

    def finish(self, call: Call) -> RunStats:
        """Its statistics; nothing more is counted for it."""
        if call is self._current:
            self._change(None)
        return call.finish()

    def _change(self, call: Call | None) -> None:
        now = self._totals()
        if self._current is not None and self._before is not None:
            self._current.add(self._before, now)
        self._current, self._before = call, now
