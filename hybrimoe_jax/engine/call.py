"""What one call of an engine counts while it takes turns with others. Imports no jax."""

from __future__ import annotations

import dataclasses
from typing import Any

from hybrimoe_jax.engine.stats import PrefetchStats, RunStats

PREFETCH = [field.name for field in dataclasses.fields(PrefetchStats) if field.name != "accuracy"]


class Call:
    """Between `resume` and `pause` the engine's counters are this call's.

    Attributes: stats: filled in by `finish`; sequence: the first row's number among all sequences of the engine.
    """

    def __init__(self, stats: RunStats, sequence: int):
        self.stats, self.sequence, self.finished = stats, sequence, False
        self._prefetch = PrefetchStats()
        self._predicted: list[tuple[int, int]] = []
        self._before: tuple[Any, list[tuple[int, int]], int] | None = None

    def resume(self, parts: Any, forward: Any) -> None:
        """It is served from now on."""
        self._before = parts.counters(), parts.predicted(), len(forward.switches)

    def pause(self, parts: Any, forward: Any) -> None:
        """Another one is."""
        assert self._before is not None
        counters, predicted, switches = self._before
        after = parts.counters()
        for name in PREFETCH:
            counted = getattr(after, f"prefetch_{name}") - getattr(counters, f"prefetch_{name}")
            setattr(self._prefetch, name, getattr(self._prefetch, name) + counted)
        told = self._predicted or [(0, 0)] * len(predicted)
        self._predicted = [
            (tries + now[0] - then[0], hits + now[1] - then[1])
            for (tries, hits), then, now in zip(told, predicted, parts.predicted())
        ]
        self.stats.switches += [switch._asdict() for switch in forward.switches[switches:]]

    def finish(self) -> RunStats:
        """Its statistics, with what was counted."""
        shares = {str(distance): hits / tries for distance, (tries, hits) in enumerate(self._predicted, 1) if tries > 0}
        self.stats.prefetch = dataclasses.replace(self._prefetch, accuracy=shares)
        self.finished = True
        return self.stats
