"""Planner and virtual machine over the steps of a trace: the same calls in the same order as the live engine makes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from hybrimoe_jax.decide.plan import Counters, LayerPlan
from hybrimoe_jax.decide.planner import Planner
from hybrimoe_jax.decide.prefetch.predictors import Perfect
from hybrimoe_jax.simulate.workload import Step


class StepResult(NamedTuple):
    """One step on the virtual clock: seconds, and activated experts found resident, and not."""

    phase: str
    sequence: int
    seconds: float
    hits: int
    misses: int


@dataclasses.dataclass
class Result:
    """What a replay gave. `counters` are the planner's totals; lane times are busy seconds."""

    steps: list[StepResult]
    counters: Counters
    seconds: float
    cpu: float
    device: float
    link: float
    attention: float

    def __add__(self, other: Result) -> Result:
        totals = {f.name: getattr(self.counters, f.name) + getattr(other.counters, f.name) for f in _FIELDS}
        lanes = (
            getattr(self, name) + getattr(other, name) for name in ("seconds", "cpu", "device", "link", "attention")
        )
        return Result(self.steps + other.steps, Counters(**totals), *lanes)


_FIELDS = dataclasses.fields(Counters)


class Machine(Protocol):
    """What carries out the plans: `machine.virtual.VirtualMachine`, or what stands in for it (`now` None: no clock)."""

    @property
    def now(self) -> float | None: ...
    @property
    def cpu(self) -> float: ...
    @property
    def device(self) -> float: ...
    @property
    def link(self) -> float: ...
    @property
    def attention(self) -> float: ...
    def step(self, tokens: int, stream: Sequence[int] = ()) -> None: ...
    def front(self, layer: int, tokens: int, context: int, looked: bool) -> None: ...
    def landed(self) -> list[tuple[int, int]]: ...
    def run(self, plan: LayerPlan, loads: Mapping[int, int], tokens: int) -> None: ...
    def prefetch(self, layer: int, expert: int) -> None: ...


class Settling(Protocol):
    """A machine that tells, after the latest step, what lands of that which is under way: (layer, expert)."""

    def settle(self) -> list[tuple[int, int]]: ...


def replay(planner: Planner, machine: Machine, steps: Iterable[Step]) -> Result:
    """Runs every step. The planner's clock is the machine's."""
    results, counters = [], planner.counters
    for step in steps:
        begin, hits, misses = machine.now or 0.0, counters.hits, counters.misses
        tokens = step.tokens
        stream = planner.begin_step(step.phase, machine.now)
        looks = planner.should_predict(tokens)
        prefetches = looks and not planner.backing_off(tokens)
        looked = planner.routers_wanted(tokens) > 0
        if isinstance(planner.predictor, Perfect):
            planner.predictor.foresee({asked.layer: asked.shown.ids for asked in step.layers})
        machine.step(tokens, stream)
        for asked in step.layers:
            layer = asked.layer
            machine.front(layer, tokens, step.context, looked)
            for landed in machine.landed():
                planner.landed(*landed)
            plan = planner.plan(layer, asked.loads, asked.scores, tokens, machine.now)
            machine.run(plan, asked.loads, tokens)
            if prefetches:
                for wanted in planner.prefetch(layer, asked.shown):
                    machine.prefetch(wanted.layer, wanted.expert)
        planner.finish_step()
        results.append(
            StepResult(
                step.phase, step.sequence, (machine.now or 0.0) - begin, counters.hits - hits, counters.misses - misses
            )
        )
    return Result(results, counters, machine.now or 0.0, machine.cpu, machine.device, machine.link, machine.attention)


def settle(planner: Planner, machine: Settling) -> None:
    """Waits for what is under way after the latest step and gives it slots, as an engine that saves its state does."""
    for landed in machine.settle():
        planner.landed(*landed)
    for landed in planner.under_way():  # where no machine tells
        planner.landed(*landed)
