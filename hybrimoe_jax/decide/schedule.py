"""Hybrid scheduling: who computes each activated expert of one MoE layer in one step, and what crosses the link for it.

Three lanes work at once: the CPU (any expert: all of them live in host memory), the device (resident experts) and the link (host to
device). The objective is the makespan, max(CPU finish, device finish) (HybriMoE, arXiv 2504.05897, equation 2). A scheduler takes a
`Problem` and returns a `Schedule`: what each lane does, in order, and when it will be done by the cost model. Rules live in a table by name:

  paper         three lanes, each proposes, the proposal that would finish first is committed (HybriMoE, figure 5)
  released      the two-candidate rule of HybriMoE's released code
  cpu-misses    resident experts on the device, every other on the CPU; the link stays idle
  fetch-misses  every miss crosses the link, highest load first; the CPU stays idle
  device-only   the same without a scheduler: misses cross the link in the order of their ids

Costs may be any object with the methods of `costs.CostModel`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from bisect import insort
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from hybrimoe_jax.errors import UserError

_NEVER = float("inf")


@dataclasses.dataclass(slots=True)
class Problem:
    """One layer of one step.

    Attributes:
      loads: tokens of each activated expert, all above 0.
      resident: experts in device memory (others than the activated ones may be among them).
      costs: seconds for everything, see `costs.CostModel`.
      tokens: tokens in the step; what the shared experts, which open the device lane, are charged for.
      scores: router score per expert, for ties between equal loads; None where unknown.
      in_flight: seconds until landing, for experts that a prefetch is already moving.
      link_busy: seconds until the link is free of earlier transfers; None: until the last of `in_flight` has landed.
      allow_cpu, allow_fetch: whether the CPU may compute and the link may fetch.
      allow_steal: whether the CPU may take a resident expert.
    """

    loads: Mapping[int, int]
    resident: Collection[int]
    costs: Any
    tokens: int = 1
    scores: Sequence[float] | None = None
    in_flight: Mapping[int, float] = dataclasses.field(default_factory=dict)
    link_busy: float | None = None
    allow_cpu: bool = True
    allow_fetch: bool = True
    allow_steal: bool = True

    @property
    def link_start(self) -> float:
        if self.link_busy is not None:
            return self.link_busy
        return max(self.in_flight.values(), default=0.0)


class Schedule(NamedTuple):
    """What each lane does, in order; every activated expert is in exactly one of `cpu` and `device`.

    `device` holds resident, awaited and fetched experts as they are run; `fetch` the demand loads in link order; `waits` the experts in
    flight that the device runs once they land. `*_seconds` are the lanes' finish times from the start of the layer's MoE block;
    `link_seconds` is when the link is free again. `makespan` is the larger of CPU and device.
    """

    cpu: tuple[int, ...]
    device: tuple[int, ...]
    fetch: tuple[int, ...]
    waits: tuple[int, ...]
    makespan: float
    cpu_seconds: float
    device_seconds: float
    link_seconds: float


class Scheduler(ABC):
    """A rule from problems to schedules. `uses_cpu` and `uses_link` say which lanes it may put routed experts on."""

    name: str
    uses_cpu = True
    uses_link = True

    @abstractmethod
    def schedule(self, problem: Problem) -> Schedule:
        """Assigns every activated expert; UserError where the problem's flags leave a miss no lane."""

    def transfer_seconds(self, problem: Problem) -> float:
        """One constant per step: the slower bandwidth wherever the CPU may be computing meanwhile."""
        return problem.costs.transfer(self.uses_cpu and problem.allow_cpu)


def replay(
    problem: Problem, cpu: Sequence[int], device: Sequence[int], fetch: Sequence[int], transfer: float
) -> Schedule:
    """Times three given lane orders: the meaning of a schedule, and what the simple rules are timed by.

    The device runs its queue in order and waits for an expert that has not landed; the link moves one expert after the other.
    """
    costs, loads = problem.costs, problem.loads
    ready = dict(problem.in_flight)
    link = problem.link_start
    for expert in fetch:
        link += transfer
        ready[expert] = link
    busy_cpu, first = 0.0, True
    for expert in cpu:
        busy_cpu += costs.cpu(loads[expert], first)
        first = False
    busy_device = costs.shared(problem.tokens)
    waits = []
    for expert in device:
        if expert not in problem.resident:
            busy_device = max(busy_device, ready[expert])
            if expert in problem.in_flight:
                waits.append(expert)
        busy_device += costs.device(loads[expert])
    makespan = max(busy_cpu, busy_device)
    return Schedule(tuple(cpu), tuple(device), tuple(fetch), tuple(waits), makespan, busy_cpu, busy_device, link)


class PaperScheduler(Scheduler):
    """HybriMoE's greedy simulation. Queues: device by falling load, CPU by rising load over the non-resident experts.

    Until every expert is assigned each lane proposes its next operation: the CPU the head of its queue, or where that is empty the
    smallest-load resident expert; the device its highest-load expert, waiting for its transfer if need be; the link the highest load of the
    CPU queue, which then joins the device queue. The proposal that would finish first is committed (ties: device, CPU, link), the others
    are made again. Between equal loads the CPU takes the lower score and the link the higher, then the lower id; the device what is ready
    first. Experts in flight stand in both queues, so that a layer never waits for a prefetch that the CPU beats.
    """

    name = "paper"

    def schedule(self, problem: Problem) -> Schedule:
        loads, resident, costs, in_flight = problem.loads, problem.resident, problem.costs, problem.in_flight
        allow_cpu, allow_fetch = problem.allow_cpu, problem.allow_fetch
        transfer = self.transfer_seconds(problem)
        score = problem.scores if problem.scores is not None else _Zeros()
        here = [expert for expert in loads if expert in resident]
        absent = [expert for expert in loads if expert not in resident]
        if not (allow_cpu or allow_fetch):
            _require_lane(problem, [e for e in absent if e not in in_flight], False)
        # Queues are sorted so that the next expert stands last, and popped; `done` experts met on the way are dropped.
        to_cpu = to_link = steal = ()
        if allow_cpu:
            to_cpu = sorted([(-loads[e], e not in in_flight, -score[e], -e) for e in absent])
            if problem.allow_steal:
                steal = sorted([(-loads[e], -score[e], -e) for e in here])
        if allow_fetch:
            to_link = sorted([(loads[e], score[e], -e) for e in absent if e not in in_flight])
        to_device = [(loads[e], 0.0, score[e], -e) for e in here]
        to_device += [(loads[e], -in_flight[e], score[e], -e) for e in absent if e in in_flight]
        to_device.sort()

        cpu_of, device_of = costs.cpu, costs.device
        t_cpu, t_device, t_link = 0.0, costs.shared(problem.tokens), problem.link_start
        cpu, device, fetch, waits = [], [], [], []
        done: set[int] = set()
        left = len(loads)
        while left:
            finish = cpu_finish = link_finish = _NEVER
            while to_device and -to_device[-1][-1] in done:
                to_device.pop()
            if to_device:
                load, negative_ready, _, minus = to_device[-1]
                finish = (t_device if t_device > -negative_ready else -negative_ready) + device_of(load)
            while to_cpu and -to_cpu[-1][-1] in done:
                to_cpu.pop()
            cpu_queue = to_cpu
            if not to_cpu:
                while steal and -steal[-1][-1] in done:
                    steal.pop()
                cpu_queue = steal
            if cpu_queue:
                cpu_finish = t_cpu + cpu_of(-cpu_queue[-1][0], not cpu)
            while to_link and -to_link[-1][-1] in done:
                to_link.pop()
            if to_link:
                link_finish = t_link + transfer

            if finish <= cpu_finish and finish <= link_finish:
                expert = -minus
                to_device.pop()
                device.append(expert)
                if expert in in_flight and expert not in resident:
                    waits.append(expert)
                t_device = finish
                done.add(expert)
                left -= 1
            elif cpu_finish <= link_finish:
                expert = -cpu_queue.pop()[-1]
                cpu.append(expert)
                t_cpu = cpu_finish
                done.add(expert)
                left -= 1
            else:
                load, tie, minus = to_link.pop()
                fetch.append(-minus)
                t_link = link_finish
                insort(to_device, (load, -link_finish, tie, minus))
                if allow_cpu:
                    to_cpu.remove((-load, True, -tie, minus))
        makespan = t_cpu if t_cpu > t_device else t_device
        return Schedule(
            tuple(cpu), tuple(device), tuple(fetch), tuple(waits), makespan, t_cpu if cpu else 0.0, t_device, t_link
        )


class ReleasedScheduler(Scheduler):
    """The rule of the released code (PKU-SEC-Lab/HybriMoE): resident experts by falling load, then the others by falling load; of the first
    and the last, the first goes to the device if it would be done there no later than the last on the CPU, else the last goes to the CPU.

    Experts in flight stand between the two groups and are always the device's: their transfer is paid for.
    """

    name = "released"

    def schedule(self, problem: Problem) -> Schedule:
        loads, resident, costs, in_flight = problem.loads, problem.resident, problem.costs, problem.in_flight
        transfer = self.transfer_seconds(problem)
        here, flying, absent = _split(problem)
        _require_lane(problem, absent, problem.allow_cpu or problem.allow_fetch)
        order = here + flying + absent
        device_end = len(order) if problem.allow_fetch else len(here) + len(flying)
        cpu_start = len(order) if not problem.allow_cpu else 0 if problem.allow_steal else len(here) + len(flying)
        t_cpu, t_device, t_link = 0.0, costs.shared(problem.tokens), problem.link_start
        cpu, device, fetch = [], [], []
        i, j = 0, len(order)  # order[i:j] is unassigned
        while i < j:
            first, last = order[i], order[j - 1]
            landed = t_device
            if first not in resident:
                landed = max(t_device, in_flight[first] if first in in_flight else t_link + transfer)
            finish = landed + costs.device(loads[first])
            cpu_finish = t_cpu + costs.cpu(loads[last], not cpu)
            may_device, may_cpu = i < device_end, j > cpu_start and last not in in_flight
            if may_device and (finish <= cpu_finish or not may_cpu):
                if i >= len(here) + len(flying):
                    fetch.append(first)
                    t_link += transfer
                device.append(first)
                t_device = finish
                i += 1
            else:
                cpu.append(last)
                t_cpu = cpu_finish
                j -= 1
        return replay(problem, cpu, device, fetch, transfer)


class CpuMissesScheduler(Scheduler):
    """Resident experts on the device, every miss on the CPU, as in kTransformers and llama.cpp; what is in flight is awaited."""

    name = "cpu-misses"
    uses_link = False

    def schedule(self, problem: Problem) -> Schedule:
        here, flying, absent = _split(problem)
        _require_lane(problem, absent, problem.allow_cpu)
        return replay(problem, absent[::-1], here + flying, (), self.transfer_seconds(problem))


class FetchMissesScheduler(Scheduler):
    """Every expert on the device: resident ones by falling load while the misses cross the link, highest load (then score) first."""

    name = "fetch-misses"
    uses_cpu = False

    def schedule(self, problem: Problem) -> Schedule:
        here, flying, absent = _split(problem)
        _require_lane(problem, absent, problem.allow_fetch)
        return replay(problem, (), here + flying + absent, absent, self.transfer_seconds(problem))


class DeviceOnlyScheduler(Scheduler):
    """Every expert on the device as a system without a scheduler has it: experts and their transfers in the order of their ids."""

    name = "device-only"
    uses_cpu = False

    def schedule(self, problem: Problem) -> Schedule:
        here, flying, absent = (sorted(group) for group in _split(problem))
        _require_lane(problem, absent, problem.allow_fetch)
        return replay(problem, (), here + flying + absent, absent, self.transfer_seconds(problem))


class _Zeros:
    """Scores where there are none."""

    def __getitem__(self, expert: int) -> float:
        return 0.0


def _split(problem: Problem) -> tuple[list[int], list[int], list[int]]:
    """Activated experts that are resident, in flight and absent; loads fall, then scores, then ids rise (in flight: by landing)."""
    loads, score = problem.loads, problem.scores
    if score is None:
        order = sorted(loads, key=lambda e: (-loads[e], e))
    else:
        order = sorted(loads, key=lambda e: (-loads[e], -score[e], e))
    here, flying, absent = [], [], []
    for expert in order:
        (here if expert in problem.resident else flying if expert in problem.in_flight else absent).append(expert)
    flying.sort(key=problem.in_flight.__getitem__)
    return here, flying, absent


def _require_lane(problem: Problem, absent: Sequence[int], allowed: bool) -> None:
    if absent and not allowed:
        raise UserError(
            f"expert {absent[0]} is not in device memory and nothing may run it (allow_cpu={problem.allow_cpu}, "
            f"allow_fetch={problem.allow_fetch}); choose another scheduler or cache ratio 1"
        )


SCHEDULERS: dict[str, type[Scheduler]] = {
    rule.name: rule
    for rule in (PaperScheduler, ReleasedScheduler, CpuMissesScheduler, FetchMissesScheduler, DeviceOnlyScheduler)
}


def get_scheduler(name: str) -> Scheduler:
    """The rule called `name`; UserError listing the names."""
    if name not in SCHEDULERS:
        raise UserError(f"scheduler {name!r} is unknown (known: {', '.join(SCHEDULERS)})")
    return SCHEDULERS[name]()
