"""The prefetch ledger: which transfers are under way, which have landed for a step to come, and what became of each.

A prefetch is *useful* if its target step runs it on the device after it landed in time, *late* if that step had to wait for it, *wasted*
otherwise. It is judged once, when its target layer is planned (or when the step ends without); one that is still on the link then lands
later and may yet take a slot.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from hybrimoe_jax.decide.plan import Counters


class Flight:
    """A transfer under way: when it should land (seconds, the planner's clock); `open` until it is judged."""

    __slots__ = ("landing", "open")

    def __init__(self, landing: float):
        self.landing, self.open = landing, True


class Ledger:
    """All layers' prefetches; totals go to `counters`."""

    def __init__(self, num_layers: int, counters: Counters):
        self.counters = counters
        self.flying: list[dict[int, Flight]] = [{} for _ in range(num_layers)]
        self.ready: list[set[int]] = [set() for _ in range(num_layers)]  # landed, their step is to come
        self.num_flying = 0

    def start(self, layer: int, expert: int, landing: float) -> None:
        self.flying[layer][expert] = Flight(landing)
        self.num_flying += 1
        self.counters.prefetch_issued += 1

    def take(self, layer: int, expert: int) -> Flight:
        """Ends a transfer; ValueError where there is none."""
        if expert not in self.flying[layer]:
            raise ValueError(f"no prefetch of expert {expert} into layer {layer} is under way")
        self.num_flying -= 1
        return self.flying[layer].pop(expert)

    def keep(self, layer: int, expert: int, flight: Flight) -> None:
        """A landed transfer got a slot."""
        if flight.open:
            self.ready[layer].add(expert)

    def refuse(self, flight: Flight) -> None:
        """A landed transfer got none."""
        self.counters.prefetch_refused += 1
        self.counters.prefetch_wasted += flight.open

    def judge(self, layer: int, device: Sequence[int], waits: Collection[int]) -> tuple[tuple[int, ...], ...]:
        """Closes a layer's prefetches when it is planned: (useful, late, wasted).

        Args:
          device: resident experts that the device runs.
          waits: experts under way that the device runs; their transfers end here.
        """
        ready, flying = self.ready[layer], self.flying[layer]
        if not ready and not flying:
            return (), (), ()
        useful = tuple(sorted(ready.intersection(device)))
        wasted = sorted(ready.difference(device))
        ready.clear()
        late = tuple([expert for expert in waits if self.take(layer, expert).open])
        for expert, flight in flying.items():
            if flight.open:
                flight.open = False
                wasted.append(expert)
        self.counters.prefetch_useful += len(useful)
        self.counters.prefetch_late += len(late)
        self.counters.prefetch_wasted += len(wasted)
        return useful, late, tuple(wasted)

    def abandon(self) -> None:
        """Forgets every transfer under way (call after `finish_step`, which has counted them)."""
        for flying in self.flying:
            flying.clear()
        self.num_flying = 0

    def finish_step(self) -> None:
        """Prefetches for layers that were not planned in this step are wasted."""
        for ready, flying in zip(self.ready, self.flying):
            self.counters.prefetch_wasted += len(ready)
            ready.clear()
            for flight in flying.values():
                self.counters.prefetch_wasted += flight.open
                flight.open = False
