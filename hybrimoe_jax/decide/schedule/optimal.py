"""The minimum makespan: which experts the CPU runs, resident ones included, which are fetched and in what order.

*Order.* On the device, by the time at which experts are there, since one machine with release times and the last
completion as the objective wants nothing else; on the link, by falling device time (Johnson's rule with equal first
stages); on the CPU any.

*Assignment, device time the same for every load* (as in the paper, and in every step whose loads are equal). Of q
demand fetches and s residents on the CPU only the numbers matter to device and link, and less CPU work also makes
transfers land sooner; so for each (q, s) the CPU takes the lightest experts. For given q the CPU's end and the last
landing rise with s while the device's work falls, so the best s is found by bisection: O(n log n) in the number of
experts, times the sets of experts in flight that are worth awaiting (few: a prefetcher has few buffers; where loads are
equal, only their number counts). Exact.

*Assignment, device time by load.* Balancing two lanes is then as hard as partitioning numbers. The same scan gives a
schedule, `search.refine` improves it and bounds what is left; `Schedule.bound` states it. Small problems are solved to
the end.
"""

from __future__ import annotations

import dataclasses
from itertools import accumulate, combinations
from typing import Any

from hybrimoe_jax import arguments
from hybrimoe_jax.decide.costs import Costs
from hybrimoe_jax.decide.schedule.instance import Choice, Instance
from hybrimoe_jax.decide.schedule.problem import Problem, Schedule, Scheduler, device_is_sooner
from hybrimoe_jax.decide.schedule.search import refine

NODES = 400
MOST_SETS = 4
"""Experts in flight of whose sets each is tried; of more, those that land first."""
_MEMO_LIMIT = 4096
_INF = float("inf")


class OptimalScheduler(Scheduler):
    """The least makespan, with fewest demand fetches among equals.

    `nodes` bounds the search where device time depends on the load; without any there is no search and no bound either.
    `Schedule.bound` is a lower bound on every schedule's makespan, equal to the makespan (to rounding) where the
    optimum is proven.
    """

    name = "optimal"
    steals = True
    depends_on_counts_only = True

    def __init__(self, nodes: int = NODES):
        self.nodes = arguments.whole("scheduler optimal: nodes", nodes, 0)
        self._costs: Costs | None = None
        self._memo: dict[tuple[Any, ...], tuple[Choice, float]] = {}

    def schedule(self, problem: Problem) -> Schedule:
        instance = Instance.of(problem)
        choice, bound = self._equal(problem, instance) or self.choose(instance)
        schedule = instance.build(problem, choice)
        return schedule._replace(bound=min(bound, schedule.makespan))

    def forecaster(self) -> Scheduler:
        return OptimalScheduler(nodes=0)

    def keeps_residents(self, costs: Costs, tokens: int, activated: int) -> bool:
        return device_is_sooner(costs, tokens, activated)

    def link_idle_from(self, problem: Problem) -> float:
        """A demand fetch that cannot be computed before all is done without any gains nothing."""
        if not (problem.allow_cpu and problem.allow_fetch):
            return super().link_idle_from(problem)
        without = self.schedule(dataclasses.replace(problem, allow_fetch=False)).makespan
        costs, load = problem.costs, next(iter(problem.loads.values()))
        return without - costs.transfer(False) - costs.device(load)

    def choose(self, instance: Instance) -> tuple[Choice, float]:
        """-> the choice, and a bound on the makespan: infinity where it is the optimum, 0 where nothing is known."""
        choice, _ = scan(instance)
        if instance.constant and len(instance.in_flight) <= MOST_SETS:
            return choice, _INF
        if not self.nodes:
            return choice, 0.0
        return refine(instance, choice, self.nodes)

    def _equal(self, problem: Problem, instance: Instance) -> tuple[Choice, float] | None:
        """Where all loads are equal and nothing is in flight only numbers matter, and answers are remembered."""
        loads = problem.loads
        if instance.in_flight or not loads or len(set(loads.values())) > 1:
            return None
        if problem.costs is not self._costs or len(self._memo) > _MEMO_LIMIT:
            self._costs = problem.costs
            self._memo.clear()
        key = (
            len(instance.here),
            len(instance.absent),
            next(iter(loads.values())),
            problem.tokens,
            instance.link,
            instance.steals,
            instance.fetches,
        )
        known = self._memo.get(key)
        if known is None:
            known = self._memo[key] = self.choose(instance)
        return known


def scan(instance: Instance) -> tuple[Choice, float]:
    """The best choice in which the CPU runs the lightest absent and the lightest resident experts, and its makespan."""
    cpu_absent = [0.0, *accumulate(reversed(instance.cpu_absent))]
    cpu_here = [0.0, *accumulate(reversed(instance.cpu_here))]
    device_absent = [0.0, *accumulate(instance.device_absent)]
    device_here = [0.0, *accumulate(instance.device_here)]
    absent, here, first, shared = len(instance.absent), len(instance.here), instance.first, instance.shared
    fewest, most = instance.fetches
    # Where no expert takes the device longer than a transfer, each one fetched is done before the next lands.
    link_bound = max(instance.device_absent, default=0.0) <= instance.alone
    landing, device_seconds, last = instance.landing, instance.device_seconds, instance.device_absent
    least = min(last, default=0.0)
    top = list(range(absent))
    best, found = _INF, (0, 0, ())
    for in_flight in awaited(instance):
        on_cpu = len(instance.in_flight) - len(in_flight)
        cpu_in_flight = (
            sum(instance.cpu_in_flight) - sum([instance.cpu_in_flight[i] for i in in_flight]) if on_cpu else 0.0
        )
        work_in_flight = sum([instance.device_in_flight[i] for i in in_flight])
        closed = link_bound and not in_flight
        for fetched in range(fewest, most + 1):
            if fetched and instance.link + fetched * instance.alone + least >= best:
                break
            cpu_least = cpu_in_flight + cpu_absent[absent - fetched]
            if on_cpu or fetched < absent:
                cpu_least += first
            if cpu_least >= best:
                continue
            work_other = work_in_flight + device_absent[fetched]
            extra = 0.0 if on_cpu or fetched < absent else first
            low, high = 0, instance.steals
            while True:  # the least number stolen from which on the device's work is not the longest
                stolen = (low + high) // 2
                cpu = cpu_least + cpu_here[stolen] + extra if stolen else cpu_least
                work = shared + device_here[here - stolen]
                if not fetched and not in_flight:
                    rising = cpu
                elif closed:
                    rising = landing(fetched, cpu) + last[fetched - 1]
                    rising = rising if rising > cpu else cpu
                else:
                    rising = max(cpu, device_seconds(0.0, in_flight, top[:fetched], cpu))
                falling = work + work_other
                value = rising if rising > falling else falling
                if value < best:
                    best, found = value, (fetched, stolen, in_flight)
                if low >= high:
                    break
                if rising >= falling:
                    high = stolen
                else:
                    low = stolen + 1
    fetched, stolen, in_flight = found
    return Choice(range(here - stolen), in_flight, range(fetched)), best


def awaited(instance: Instance) -> list[tuple[int, ...]]:
    """Sets of experts in flight for the device to await; of those that cost the CPU the same, the first to land."""
    number = len(instance.in_flight)
    if instance.awaits or not number:
        return [tuple(range(number))]
    if number > MOST_SETS or len(set(instance.cpu_in_flight)) == 1:
        return [tuple(range(count)) for count in range(number + 1)]
    return [chosen for count in range(number + 1) for chosen in combinations(range(number), count)]
