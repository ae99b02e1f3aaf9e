"""The warm-up: what things take on this machine, so that the cost model holds no literals.

At load it takes a second or two, most of it compiling what decoding needs anyway. `calibrate` asks for more places, and
more often. Either times the engine's own lanes (`engine.probes`). A point is the median of its repeats.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from hybrimoe_jax.engine.probes import Run
from hybrimoe_jax.machine.costs import CostModel
from hybrimoe_jax.machine.fit import Point, Samples, fit


class Lanes(Protocol):
    """What is timed, see `engine.probes.EngineLanes`."""

    expert_bytes: int
    shares_cores: bool
    moves_parts: bool
    now: Callable[[], float]

    @property
    def part_bytes(self) -> int: ...

    def prepare(self) -> None: ...
    def cpu(self, load: int, experts: int, wide: bool = False) -> Run: ...
    def opens(self, tokens: int) -> bool: ...
    def most_experts(self, tokens: int) -> int | None: ...
    def device(self, tokens: int, experts: int) -> Run: ...
    def dispatch(self, tokens: int, experts: int) -> float: ...
    def layer_front(self, tokens: int, context: int) -> Run: ...
    def transfer(self, size: int) -> Run: ...
    def prefetch(self, size: int) -> Run: ...
    def beside_cpu(self) -> AbstractContextManager[None]: ...
    def beside_link(self) -> AbstractContextManager[None]: ...
    def fetch_host(self) -> float: ...
    def look(self) -> float: ...
    def handover(self, context: int) -> float: ...


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which points are taken, and how often.

    Attributes:
      cpu, alone: (load, experts) on the CPU with its usual workers, and with the device's cores too.
      device: (tokens, experts) of blocks; without experts only where that runs anything.
      layer: (tokens, context) of fronts.
      shares: of an expert's bytes, moved besides a whole one; None: its down matrix, and beside a computing CPU nothing
        else.
      repeats: at least and at most; `point_s`: no more once they took so long together.
      dear_s: where one run takes longer, more tokens or experts of its kind are left out.
    """

    cpu: tuple[tuple[int, int], ...]
    alone: tuple[tuple[int, int], ...]
    device: tuple[tuple[int, int], ...]
    layer: tuple[tuple[int, int], ...]
    shares: tuple[float, ...] | None = None
    repeats: tuple[int, int] = (7, 7)
    point_s: float = 0.0
    dear_s: float = float("inf")


def grid(loads: tuple[int, ...], experts: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Every load with every count of experts."""
    return tuple((load, count) for load in loads for count in experts)


_LOADS = (1, 16, 64)
CONTEXT = 256
AT_LOAD = Plan(
    cpu=grid(_LOADS, (1, 4)),
    alone=grid(_LOADS, (2, 8)),
    device=grid(_LOADS, (0, 1, 4)),
    layer=grid((1, 16), (CONTEXT,)),
)


def measure(lanes: Lanes, inline_s: float, distances: int, fusible: bool = False) -> CostModel:
    """The costs of a warm-up at load.

    Args:
      inline_s: host experts shorter than this are run by the thread that dispatches the device's.
      distances: lookahead depth, whose price is measured too.
      fusible: whether a decode step can be one program, so that leaving it has a price.
    """
    samples = Samples(lanes.expert_bytes)
    for _ in sample(lanes, samples, AT_LOAD, inline_s, distances, fusible):
        pass
    return fit(samples, source="warm-up on this machine")


def sample(lanes: Lanes, samples: Samples, plan: Plan, inline_s: float, distances: int, fusible: bool) -> Iterator[str]:
    """Takes the plan's points, see `measure`; yields the kind of work before each."""
    lanes.prepare()
    taker = Taker(lanes, samples, plan)
    yield from taker.take("cpu", plan.cpu, lanes.cpu)
    if lanes.shares_cores:
        yield from taker.take("alone", plan.alone, lambda load, experts: lanes.cpu(load, experts, wide=True))
    inline = taker.inline(inline_s)
    blocks = list(
        dict.fromkeys((tokens, _within(experts, lanes.most_experts(tokens))) for tokens, experts in plan.device)
    )
    blocks = [(tokens, experts) for tokens, experts in blocks if experts or lanes.opens(tokens)]
    # Where the host's thread runs experts itself, dispatching the device's holds it up: a lane of its own cannot show
    # that, so it is added to theirs.
    yield from taker.take("device", blocks, lanes.device, lanes.dispatch if inline else None)
    yield from taker.take("layer", plan.layer, lanes.layer_front)
    whole = lanes.expert_bytes
    parts = [(max(3, int(share * whole)),) for share in plan.shares or () if lanes.moves_parts]
    least = [(lanes.part_bytes,)] if plan.shares is None else []
    yield from taker.take("transfer", [*least, *parts, (whole,)], lanes.transfer)
    with lanes.beside_cpu():
        yield from taker.take("transfer_cpu_busy", [*parts, (whole,)], lanes.prefetch)
    yield "look"
    samples.look = distances * lanes.look()
    if inline:
        samples.fetch_host = lanes.fetch_host()
    if fusible:
        samples.handover = lanes.handover(CONTEXT)


def _within(experts: int, most: int | None) -> int:
    return experts if most is None else min(experts, most)


class Taker:
    """Times points of one plan, into `samples`."""

    def __init__(self, lanes: Lanes, samples: Samples, plan: Plan):
        self.lanes, self.samples, self.plan = lanes, samples, plan

    def take(self, kind: str, places, run_of, more=None) -> Iterator[str]:
        """One point at each place; `more`: seconds that are added to it."""
        dear: tuple[int, ...] | None = None
        for at in places:
            if dear is not None and all(new >= old for new, old in zip(at, dear)):
                continue
            yield kind
            times = self.times(run_of(*at))
            extra = more(*at) if more else 0.0
            low, middle, high = (extra + part for part in quartiles(times))
            self.samples.points.append(Point(kind, tuple(at), middle, low, high, len(times)))
            if middle > self.plan.dear_s:
                dear = tuple(at)

    def times(self, run: Run) -> list[float]:
        """Seconds of each repeat; the first of all, which may compile, is left out."""
        now, (least, most) = self.lanes.now, self.plan.repeats
        run()
        times: list[float] = []
        while len(times) < most and (len(times) < least or sum(times) < self.plan.point_s):
            start = now()
            run()
            times.append(now() - start)
        return times

    def inline(self, inline_s: float) -> bool:
        """Whether host experts of load 1, behind the first of a run, are short enough to be run inline."""
        each = [seconds / at[1] for at, seconds in self.samples.medians("cpu") if at[0] == 1]
        return statistics.median(each) < inline_s


def quartiles(times: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(times) < 2:
        return times[0], times[0], times[0]
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, middle, high
