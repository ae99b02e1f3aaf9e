"""Prefetches: which transfers are in flight, which have landed for a step to come, and what became of each.

A prefetch is *useful* if its target step runs it on the device after it landed in time, *late* if that step had to wait
for it, *wasted* otherwise. It is judged once, when its target layer is planned (or when the step ends without); one
that is still on the link then lands later and may yet take a slot. How long the link is expected to be busy, with these
and all other transfers, is kept here too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hybrimoe_jax.decide.plan import Counters


class InflightTransfer:
    """A transfer under way: when it should land (seconds, the planner's clock).

    `open` until it is judged; `seconds` that it holds the link.
    """

    __slots__ = ("landing", "open", "seconds")

    def __init__(self, landing: float, seconds: float):
        self.landing, self.open, self.seconds = landing, True, seconds


class InflightTransfers:
    """All layers' prefetches; totals go to `counters`.

    `clock` is the planner's: seconds at the start of the MoE block that is being planned; `link_free`: when the link is
    expected to be done with all that is queued.
    """

    def __init__(self, num_layers: int, counters: Counters):
        self.counters = counters
        self.in_flight: list[dict[int, InflightTransfer]] = [{} for _ in range(num_layers)]
        self.ready: list[dict[int, float]] = [{} for _ in range(num_layers)]  # landed, their step is to come: seconds
        self.num_in_flight = 0
        self.clock = self.link_free = 0.0
        self._awaited: dict[tuple[int, int], tuple[InflightTransfer, float]] = {}

    @property
    def link_left(self) -> float:
        """Seconds until the link is done with what is queued."""
        left = self.link_free - self.clock
        return left if left > 0.0 else 0.0

    def clear_link(self) -> None:
        """With nothing under way the link is free, whatever the cost model had expected."""
        if not self.num_in_flight:
            self.link_free = min(self.link_free, self.clock)

    def start(self, layer: int, expert: int, seconds: float) -> None:
        """Queues a transfer of so many seconds behind all others."""
        self.link_free = max(self.link_free, self.clock) + seconds
        self.in_flight[layer][expert] = InflightTransfer(self.link_free, seconds)
        self.num_in_flight += 1
        self.counters.prefetch_issued += 1

    def take(self, layer: int, expert: int) -> InflightTransfer:
        """Ends a transfer; ValueError where there is none."""
        if expert not in self.in_flight[layer]:
            raise ValueError(f"no prefetch of expert {expert} into layer {layer} is under way")
        self.num_in_flight -= 1
        return self.in_flight[layer].pop(expert)

    def keep(self, layer: int, expert: int, transfer: InflightTransfer) -> None:
        """A landed transfer got a slot."""
        if transfer.open:
            self.ready[layer][expert] = transfer.seconds
        else:
            self.counters.prefetch_wasted_s += transfer.seconds

    def refuse(self, transfer: InflightTransfer) -> None:
        """A landed transfer got none."""
        self.counters.prefetch_refused += 1
        self.counters.prefetch_wasted += transfer.open
        self.counters.prefetch_wasted_s += transfer.seconds

    def judge(
        self, layer: int, device: Sequence[int], awaited: Mapping[int, float]
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Closes a layer's prefetches when it is planned: (useful, late, wasted).

        Args:
          device: resident experts that the device runs.
          awaited: experts in flight that the device runs, and for how many seconds it waits; their transfers end here.
        """
        ready, in_flight, counters = self.ready[layer], self.in_flight[layer], self.counters
        self._awaited.clear()
        if not ready and not in_flight:
            return (), (), ()
        useful = tuple(sorted(ready.keys() & device))
        wasted = sorted(ready.keys() - device)
        counters.prefetch_useful_s += sum([ready[expert] for expert in useful])
        counters.prefetch_wasted_s += sum([ready[expert] for expert in wasted])
        ready.clear()
        late: list[int] = []
        for expert, wait in awaited.items():
            transfer = self.take(layer, expert)
            self._awaited[layer, expert] = transfer, wait
            if transfer.open:
                late.append(expert)
            self._count_awaited(transfer, transfer.seconds, wait)
        for expert, transfer in in_flight.items():
            if transfer.open:
                transfer.open = False
                wasted.append(expert)
        counters.prefetch_useful += len(useful)
        counters.prefetch_late += len(late)
        counters.prefetch_wasted += len(wasted)
        return useful, tuple(late), tuple(wasted)

    def waited(self, layer: int, expert: int, seconds: float, wait: float) -> None:
        """Replaces what the cost model expected of an awaited transfer by what was measured."""
        transfer, expected = self._awaited[layer, expert]
        self._count_awaited(transfer, seconds - transfer.seconds, wait - expected)

    def _count_awaited(self, transfer: InflightTransfer, seconds: float, wait: float) -> None:
        """Late, unless its own step had gone by: then it was wasted, and another step finds it on the link."""
        self.counters.prefetch_wait_s += wait
        if transfer.open:
            self.counters.prefetch_late_s += seconds
        else:
            self.counters.prefetch_wasted_s += seconds

    def abandon(self) -> None:
        """Forgets every transfer under way (call after `finish_step`, which has counted them).

        Of those that a step was broken off in the middle of counting, none was of use.
        """
        for in_flight in self.in_flight:
            self.counters.prefetch_wasted_s += sum([transfer.seconds for transfer in in_flight.values()])
            in_flight.clear()
        self.num_in_flight, counters = 0, self.counters
        counters.prefetch_wasted = counters.prefetch_issued - counters.prefetch_useful - counters.prefetch_late

    def finish_step(self) -> None:
        """Prefetches for layers that were not planned in this step are wasted."""
        counters = self.counters
        for ready, in_flight in zip(self.ready, self.in_flight):
            counters.prefetch_wasted += len(ready)
            counters.prefetch_wasted_s += sum(ready.values())
            ready.clear()
            for transfer in in_flight.values():
                counters.prefetch_wasted += transfer.open
                transfer.open = False
