"""A problem in numbers, as the searches for the best schedule use it.

Experts by group, their seconds on each lane, and the limits.

Groups: *here* (resident), *in flight* and *absent*. In each, loads fall, then scores, then ids rise; experts in flight
stand by landing. A *choice* is what the searches return: the positions in each group that the device runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from hybrimoe_jax.decide.schedule.problem import Problem, Schedule, landings, replay, require_lane, split


class Choice(NamedTuple):
    """Positions of the experts that the device runs; the CPU runs all others."""

    here: Sequence[int]
    in_flight: Sequence[int]
    absent: Sequence[int]


@dataclasses.dataclass(slots=True)
class Instance:
    """One problem, all times in seconds.

    Attributes:
      here, in_flight, absent: expert ids.
      cpu_*, device_*: seconds of each on either lane; `ready` when those in flight land.
      first: what the CPU's first expert takes longer.
      shared: when the device is done with the shared experts; `link` when the link is free.
      beside, alone: a transfer while the CPU computes, and otherwise.
      steals: residents the CPU may take, at most; `fetches` the fewest and the most demand fetches.
      awaits: whether every expert in flight must be awaited.
    """

    here: list[int]
    in_flight: list[int]
    absent: list[int]
    cpu_here: list[float]
    cpu_in_flight: list[float]
    cpu_absent: list[float]
    device_here: list[float]
    device_in_flight: list[float]
    device_absent: list[float]
    ready: list[float]
    first: float
    shared: float
    link: float
    beside: float
    alone: float
    steals: int
    fetches: tuple[int, int]
    awaits: bool
    constant: bool

    @classmethod
    def of(cls, problem: Problem) -> Instance:
        """UserError where the problem's flags leave a miss no lane."""
        loads, costs, allow_cpu = problem.loads, problem.costs, problem.allow_cpu
        here, in_flight, absent = split(problem)
        require_lane(problem, absent, allow_cpu or problem.allow_fetch)
        distinct = set(loads.values())
        cpu = {load: costs.cpu(load) for load in distinct}
        device = {load: costs.device(load) for load in distinct}
        one = min(distinct, default=1)
        return cls(
            here,
            in_flight,
            absent,
            [cpu[loads[e]] for e in here],
            [cpu[loads[e]] for e in in_flight],
            [cpu[loads[e]] for e in absent],
            [device[loads[e]] for e in here],
            [device[loads[e]] for e in in_flight],
            [device[loads[e]] for e in absent],
            [problem.in_flight[e] for e in in_flight],
            costs.cpu(one, True) - costs.cpu(one),
            costs.shared(problem.tokens),
            problem.link_start,
            costs.transfer(True),
            costs.transfer(False),
            len(here) if allow_cpu and problem.allow_steal else 0,
            (0 if allow_cpu else len(absent), len(absent) if problem.allow_fetch else 0),
            not allow_cpu,
            len(set(device.values())) <= 1,
        )

    def cpu_seconds(self, choice: Choice) -> float:
        """The CPU lane's time under a choice."""
        total, some = 0.0, False
        groups = (self.cpu_here, choice.here), (self.cpu_in_flight, choice.in_flight), (self.cpu_absent, choice.absent)
        for seconds, on_device in groups:
            if len(on_device) < len(seconds):
                some = True
                total += sum(seconds) - sum([seconds[i] for i in on_device])
        return total + self.first if some else 0.0

    def landing(self, count: int, cpu_seconds: float) -> float:
        """When the last of `count` transfers has landed: `problem.landings` in closed form."""
        if cpu_seconds <= self.link:
            return self.link + count * self.alone
        if cpu_seconds >= self.link + count * self.beside:
            return self.link + count * self.beside
        return cpu_seconds + (count - (cpu_seconds - self.link) / self.beside) * self.alone

    def device_seconds(self, work: float, in_flight: Sequence[int], absent: Sequence[int], cpu_seconds: float) -> float:
        """When the device is done.

        It has `work` seconds of shared and resident experts, then the others in the order in which they land.

        `absent` is in link order. Running jobs by release time gives the earliest end.
        """
        arrivals = []
        if absent:
            landed = landings(self.link, cpu_seconds, len(absent), self.beside, self.alone)
            arrivals = list(zip(landed, [self.device_absent[i] for i in absent]))
        if in_flight:
            arrivals += [(self.ready[i], self.device_in_flight[i]) for i in in_flight]
            arrivals.sort()
        for ready, seconds in arrivals:
            work = (work if work > ready else ready) + seconds
        return work

    def link_order(self, absent: Sequence[int]) -> list[int]:
        """The best order of demand fetches: what keeps the device longest comes first.

        It is Johnson's rule for equal transfers.
        """
        if self.constant:
            return list(absent)
        return sorted(absent, key=lambda i: -self.device_absent[i])

    def makespan(self, choice: Choice) -> float:
        """What `build` would be timed at."""
        cpu = self.cpu_seconds(choice)
        work = self.shared + sum([self.device_here[i] for i in choice.here])
        return max(cpu, self.device_seconds(work, choice.in_flight, self.link_order(choice.absent), cpu))

    def build(self, problem: Problem, choice: Choice) -> Schedule:
        """The schedule of a choice: CPU by rising load, device as experts are ready, link by `link_order`."""
        here, in_flight, absent = set(choice.here), set(choice.in_flight), set(choice.absent)
        cpu = [e for i, e in enumerate(self.absent) if i not in absent]
        cpu += [e for i, e in enumerate(self.in_flight) if i not in in_flight]
        cpu += [e for i, e in enumerate(self.here) if i not in here]
        if len(cpu) > 1:
            loads, order = problem.loads, {e: -i for i, e in enumerate(cpu)}
            cpu.sort(key=lambda e: (loads[e], order[e]))
        fetch = [self.absent[i] for i in self.link_order(choice.absent)]
        device = [self.here[i] for i in choice.here]
        if in_flight and fetch:
            landed = landings(self.link, self.cpu_seconds(choice), len(fetch), self.beside, self.alone)
            arrivals = list(zip(landed, fetch)) + [(self.ready[i], self.in_flight[i]) for i in choice.in_flight]
            device += [e for _, e in sorted(arrivals)]
        else:
            device += [self.in_flight[i] for i in choice.in_flight] + fetch
        return replay(problem, cpu, device, fetch)
