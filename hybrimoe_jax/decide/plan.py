"""What the planner hands out: plans, prefetches and totals.

Plain values, so that a plan can be recorded, replayed and compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final, NamedTuple

from hybrimoe_jax.decide.schedule import Schedule


class Refused:
    """A landed prefetch that got no slot."""

    def __repr__(self) -> str:
        return "REFUSED"

    def __bool__(self) -> bool:
        return False


REFUSED: Final = Refused()


Victim = int | tuple[int, int]
"""Who makes room: an expert of the same layer, or (layer, expert) where all layers share their slots."""


class Fetch(NamedTuple):
    """An expert that reaches the device in this step.

    It takes `victim`'s slot, a free one (victim None), or, where `stream`, none: it runs from a staging slot and is not
    kept.
    """

    expert: int
    victim: Victim | None
    stream: bool


class Prefetch(NamedTuple):
    """A transfer to start: `expert` of `layer`, predicted `distance` layers before."""

    layer: int
    expert: int
    distance: int


class LayerPlan(NamedTuple):
    """What to do for one layer in one step.

    Every activated expert is in exactly one of device, fetch, awaited, double_buffered and cpu.

    Attributes:
      layer: MoE layer.
      hits, misses: activated experts found resident, and not, when the step was planned (an expert in flight is a
        miss).
      device: resident experts that the device runs, in order.
      fetch: demand fetches, in link order.
      awaited: experts that a prefetch is already moving and the device runs once they have landed; their prefetch ends
        here (no `landed`).
      cpu: experts that the CPU runs, in order.
      useful, late, wasted: this layer's prefetches, judged.
      makespan: predicted seconds from the start of the MoE block.
      schedule: the lanes in full, with finish times; `schedule.device` interleaves device, awaited, double_buffered and
        fetch as simulated.
      double_buffered: experts that the device runs from the buffer that the whole layer was streamed into (see
        `layer_stream`), in order.
      next_layer_experts: experts of the next layer to stream into the other buffer from now on.
    """

    layer: int
    hits: tuple[int, ...]
    misses: tuple[int, ...]
    device: tuple[int, ...]
    fetch: tuple[Fetch, ...]
    awaited: tuple[Fetch, ...]
    cpu: tuple[int, ...]
    useful: tuple[int, ...]
    late: tuple[int, ...]
    wasted: tuple[int, ...]
    makespan: float
    schedule: Schedule
    double_buffered: tuple[int, ...] = ()
    next_layer_experts: tuple[int, ...] = ()


@dataclasses.dataclass
class Counters:
    """Totals since the start.

    Experts are counted per (expert, layer, step); issued = useful + late + wasted + those still undecided.

    useful: run on the device by its target step after landing in time; late: used but waited for; wasted: neither;
    refused: wasted because it got no slot when it landed. `*_s` are the seconds that those transfers held the link,
    counted when they have ended, on the clock of whoever told the planner (by the cost model where nobody measured);
    `wait_s`: how long steps waited for transfers under way, likewise.

    `fetched` are demand fetches, `streamed` those of them that were not kept. `layer_streamed` are experts that crossed
    the link with their whole layer, `layer_streamed_used` those of them that were asked for.
    """

    steps: int = 0
    activated: int = 0
    hits: int = 0
    misses: int = 0
    cpu: int = 0
    device: int = 0
    fetched: int = 0
    streamed: int = 0
    layer_streamed: int = 0
    layer_streamed_used: int = 0
    prefetch_issued: int = 0
    prefetch_useful: int = 0
    prefetch_late: int = 0
    prefetch_wasted: int = 0
    prefetch_refused: int = 0
    prefetch_useful_s: float = 0.0
    prefetch_late_s: float = 0.0
    prefetch_wasted_s: float = 0.0
    prefetch_wait_s: float = 0.0

    def count(self, hits: int, misses: int, cpu: int, fetch: Sequence[Fetch]) -> None:
        """Adds one layer of one step."""
        self.steps += 1
        self.activated += hits + misses
        self.hits += hits
        self.misses += misses
        self.cpu += cpu
        self.device += hits + misses - cpu
        if fetch:
            self.fetched += len(fetch)
            self.streamed += sum([1 for f in fetch if f.stream])
