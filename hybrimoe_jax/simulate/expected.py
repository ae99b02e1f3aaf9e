"""Which system a machine's costs promise most, on a routing that the model itself has chosen.

A trace's decode steps are replayed by each system. A device of its own computes beside the CPU: the virtual machine
tells. Where the device works on the CPU's cores the lanes only take turns, and a transfer is a copy by the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hybrimoe_jax.decide.plan import LayerPlan
from hybrimoe_jax.decide.planner import Planner
from hybrimoe_jax.decide.systems import SYSTEMS, get_system
from hybrimoe_jax.machine.virtual import VirtualMachine
from hybrimoe_jax.simulate.replay import Machine, replay
from hybrimoe_jax.simulate.workload import TokenSteps
from hybrimoe_jax.trace.columns import Trace

STEPS = 32
"""Of each half of the sequences, at most."""


class Expected(NamedTuple):
    """One system: seconds a token, and the share of activated experts found resident."""

    system: str
    seconds: float
    hit_rate: float


class TakingTurns:
    """A machine whose lanes share cores: whatever is computed or copied takes its time alone.

    Prefetches have landed by the next layer. Attributes as of `VirtualMachine`.
    """

    def __init__(self, costs: Any):
        self.costs = costs
        self.now = self.cpu = self.device = self.link = self.attention = 0.0
        self._landed: list[tuple[int, int]] = []

    def step(self, tokens: int, stream: Sequence[int] = ()) -> None:
        self._spend("device", self.costs.step(tokens))
        self._spend("link", len(stream) * self.costs.transfer(True))

    def front(self, layer: int, tokens: int, context: int, looked: bool) -> None:
        seconds = self.costs.layer(tokens, context) + (self.costs.look if looked else 0.0)
        self._spend("device", seconds)
        self.attention += seconds

    def landed(self) -> list[tuple[int, int]]:
        ready, self._landed = self._landed, []
        return ready

    def run(self, plan: LayerPlan, loads: Mapping[int, int], tokens: int) -> None:
        costs, on_device = self.costs, plan.schedule.device
        called = bool(on_device or plan.double_buffered)
        self._spend("device", costs.shared(tokens) - (0.0 if called else costs.device_block))
        self._spend("device", sum([costs.device(loads[expert]) for expert in on_device]))
        if plan.cpu:
            self._spend("cpu", costs.alone_first + sum([costs.alone(loads[expert]) for expert in plan.cpu]))
        self._spend("link", (len(plan.fetch) + len(plan.next_layer_experts)) * costs.transfer(True))

    def prefetch(self, layer: int, expert: int) -> None:
        self._spend("link", self.costs.transfer(True))
        self._landed.append((layer, expert))

    def _spend(self, lane: str, seconds: float) -> None:
        self.now += seconds
        setattr(self, lane, getattr(self, lane) + seconds)


def expected(trace: Trace, costs: Any, ratio: float, systems: Sequence[str] = tuple(SYSTEMS)) -> list[Expected]:
    """What each system takes a token on the trace's decode steps, the fastest first.

    Args:
      costs: of the model that the trace was recorded from.
      ratio: the share of experts that the device holds.
    """
    tokens, found = TokenSteps(trace), []
    first, second = tokens.sequences[::2], tokens.sequences[1::2]
    halves = [(first, second), (second, first)] if second else [(first, first)]
    for name in systems:
        seconds, steps, hits, asked = 0.0, 0, 0, 0
        for sequences, others in halves:
            planner = _planner(name, tokens, costs, ratio, tokens.frequencies(others))
            machine: Machine = TakingTurns(costs) if costs.shares_cores else VirtualMachine(costs)
            result = replay(planner, machine, tokens.steps(sequences, STEPS))
            seconds, steps = seconds + result.seconds, steps + len(result.steps)
            hits, asked = hits + result.counters.hits, asked + result.counters.hits + result.counters.misses
        found.append(Expected(name, seconds / steps, hits / asked if asked else 0.0))
    return sorted(found, key=lambda each: each.seconds)


def _planner(name: str, tokens: TokenSteps, costs: Any, ratio: float, frequencies: list[list[int]]) -> Planner:
    facts, system = tokens.facts, get_system(name)
    slots = system.slots_per_layer(ratio, facts.layers, facts.experts, frequencies)
    shape = (facts.layers, facts.experts, facts.top_k)
    return Planner(system, *shape, slots, costs, frequencies=frequencies)
