"""What a scheduler is asked, what it answers, and what an answer means in time.

The device runs its queue in order and waits for an expert that has not landed; the link moves one expert after the
other; the CPU never waits. A transfer takes longer while the CPU computes, since both read the same memory: it goes at
one over `costs.transfer(True)` a second until the CPU's last expert is done and at one over `costs.transfer()` from
then on.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from hybrimoe_jax.decide.costs import Costs
from hybrimoe_jax.decide.registry import Parametric
from hybrimoe_jax.errors import UserError


@dataclasses.dataclass(slots=True)
class Problem:
    """One layer of one step.

    Attributes:
      loads: tokens of each activated expert, all above 0.
      resident: experts in device memory (others than the activated ones may be among them).
      costs: seconds for everything. The first expert of a run costs the CPU the same extra time whatever its load, and
        a transfer beside a computing CPU takes no less than one alone.
      tokens: tokens in the step; what the shared experts, which open the device lane, are charged for.
      scores: router score per expert, for ties between equal loads; None where unknown.
      in_flight: seconds until landing, for experts that a prefetch is already moving.
      link_busy: seconds until the link is free of earlier transfers; None: until the last of `in_flight` has landed.
      allow_cpu, allow_fetch: whether the CPU may compute and the link may fetch.
      allow_steal: whether the CPU may take a resident expert.
    """

    loads: Mapping[int, int]
    resident: Collection[int]
    costs: Costs
    tokens: int = 1
    scores: Sequence[float] | None = None
    in_flight: Mapping[int, float] = dataclasses.field(default_factory=dict[int, float])
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

    `device` holds resident, awaited and fetched experts as they are run; `fetch` the demand fetches in link order;
    `awaited` the experts in flight that the device runs once they land. `*_seconds` are the lanes' finish times from
    the start of the layer's MoE block; `link_seconds` is when the link is free again. `makespan` is the larger of CPU
    and device. `bound` is a lower bound on the makespan of every schedule, where the rule knows one (0: it does not).
    `uses_all_cores`: the CPU has the device's cores too (see `shared_cores`).
    """

    cpu: tuple[int, ...]
    device: tuple[int, ...]
    fetch: tuple[int, ...]
    awaited: tuple[int, ...]
    makespan: float
    cpu_seconds: float
    device_seconds: float
    link_seconds: float
    bound: float = 0.0
    uses_all_cores: bool = False

    @property
    def gap(self) -> float:
        """By what share of itself the makespan may exceed the least possible; 1 where nothing is known."""
        return 1.0 - self.bound / self.makespan if self.makespan else 0.0


class Scheduler(Parametric, ABC):
    """A rule from problems to schedules. Its `name` is that of the class where it says no other.

    `uses_cpu` and `uses_link` say which lanes it may put routed experts on, `steals` whether the CPU may get resident
    ones. `depends_on_counts_only`: with equal loads and nothing in flight its answer depends on how many experts are
    resident and absent, and on their order by score, then id (`by_id`: by id alone), so that it may be remembered (see
    `unit_load_cache`).
    """

    needs_model = False
    name: str
    uses_cpu = True
    uses_link = True
    steals = False
    depends_on_counts_only = False
    by_id = False

    def __init_subclass__(cls, **given: Any):
        super().__init_subclass__(**given)
        if "name" not in vars(cls):
            cls.name = cls.__name__

    @abstractmethod
    def schedule(self, problem: Problem) -> Schedule:
        """Assigns every activated expert; UserError where the problem's flags leave a miss no lane."""

    def forecaster(self) -> Scheduler:
        """The rule that times predicted layers, thousands of them: this one, or a quicker one in its place."""
        return self

    def link_idle_from(self, problem: Problem) -> float:
        """For equal loads and nothing in flight: seconds of a busy link from which on the rule fetches nothing.

        Its answer then no longer depends on how long exactly. Infinity where that cannot be said.
        """
        return float("inf") if problem.allow_fetch and self.uses_link else 0.0

    def keeps_residents(self, costs: Costs, tokens: int, activated: int) -> bool:
        """Whether every schedule of such a step leaves all residents to the device, whatever the routing.

        `activated`: experts in it. A rule that steals and knows better says so, see `device_is_sooner`.
        """
        return not self.steals

    def transfer_seconds(self, problem: Problem) -> float:
        """What rules decide by: the slower transfer wherever the CPU may be computing meanwhile."""
        return problem.costs.transfer(self.uses_cpu and problem.allow_cpu)


def device_is_sooner(costs: Costs, tokens: int, activated: int) -> bool:
    """Whether no rule that compares lanes takes a resident expert from the device in such a step.

    It is proven for one token, whose loads are equal, where the device is done with all of them no later than the CPU
    with the first that it might take.
    """
    return tokens == 1 and costs.shared(1) + activated * costs.device(1) <= costs.cpu(1, True)


def landings(start: float, cpu_seconds: float, count: int, beside: float, alone: float) -> list[float]:
    """When `count` transfers, one after the other from `start` on, have landed.

    Args:
      cpu_seconds: when the CPU stops computing.
      beside, alone: seconds of a transfer beside a computing CPU, and otherwise.
    """
    landed: list[float] = []
    now = start
    for _ in range(count):
        if now >= cpu_seconds:
            now += alone
        elif now + beside <= cpu_seconds:
            now += beside
        else:
            now = cpu_seconds + (1.0 - (cpu_seconds - now) / beside) * alone
        landed.append(now)
    return landed


def replay(problem: Problem, cpu: Sequence[int], device: Sequence[int], fetch: Sequence[int]) -> Schedule:
    """Times three given lane orders: the meaning of a schedule, whoever made it."""
    costs, loads, resident, in_flight = problem.costs, problem.loads, problem.resident, problem.in_flight
    cpu_of, device_of = costs.cpu, costs.device
    busy_cpu = 0.0
    for expert in cpu:
        busy_cpu += cpu_of(loads[expert], not busy_cpu)
    ready = in_flight
    link = problem.link_start
    if fetch:
        landed = landings(link, busy_cpu, len(fetch), costs.transfer(True), costs.transfer(False))
        link = landed[-1]
        ready = {**in_flight, **dict(zip(fetch, landed))}
    busy_device = costs.shared(problem.tokens)
    awaited: list[int] = []
    for expert in device:
        if ready and expert not in resident:
            landed_at = ready.get(expert, 0.0)  # one that is nowhere is for `watch` to refuse
            if busy_device < landed_at:
                busy_device = landed_at
            if expert in in_flight:
                awaited.append(expert)
        busy_device += device_of(loads[expert])
    makespan = busy_cpu if busy_cpu > busy_device else busy_device
    return Schedule(tuple(cpu), tuple(device), tuple(fetch), tuple(awaited), makespan, busy_cpu, busy_device, link)


def split(problem: Problem) -> tuple[list[int], list[int], list[int]]:
    """Activated experts that are resident, in flight and absent.

    Loads fall, then scores, then ids rise (in flight: by landing).
    """
    loads, score = problem.loads, problem.scores
    resident, in_flight = problem.resident, problem.in_flight
    if score is None:
        order = sorted(loads, key=lambda e: (-loads[e], e))
    else:
        order = sorted(loads, key=lambda e: (-loads[e], -score[e], e))
    here, moving, absent = list[int](), list[int](), list[int]()
    for expert in order:
        (here if expert in resident else moving if expert in in_flight else absent).append(expert)
    moving.sort(key=in_flight.__getitem__)
    return here, moving, absent


def cpu_seconds_of_all(problem: Problem) -> float:
    """What the CPU takes for the absent experts of a problem of equal loads, all of them."""
    costs, load = problem.costs, next(iter(problem.loads.values()))
    absent = sum([1 for expert in problem.loads if expert not in problem.resident])
    return costs.cpu(load, True) + (absent - 1) * costs.cpu(load)


def require_lane(problem: Problem, absent: Sequence[int], allowed: bool) -> None:
    """UserError where there are absent experts and nothing may run them."""
    if absent and not allowed:
        raise UserError(
            f"expert {absent[0]} is not in device memory and nothing may run it (allow_cpu={problem.allow_cpu}, "
            f"allow_fetch={problem.allow_fetch}); choose another scheduler or cache ratio 1"
        )
