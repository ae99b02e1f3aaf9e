"""Rules on a machine whose "device" has no cores of its own, as where XLA's CPU backend stands in for a GPU.

Three lanes are then two that take each other's cores and a link that is a copy. A rule which believes in three splits
the work where one lane with all cores would be done sooner (measured: prefill of 512 tokens 1.2 times). So one more
schedule is weighed: the device does what only it can, then the CPU takes every expert with all cores. What the rule
found is charged for the work of both lanes, each with all cores, one after the other.

Where the CPU takes every expert of every layer whatever the routing, nothing has to be decided between two layers, and
a step can be one program (`prove_all_on_cpu`).
"""

from __future__ import annotations

from typing import cast

from hybrimoe_jax.decide.costs import Costs, SharedCoreCosts
from hybrimoe_jax.decide.schedule.problem import Problem, Schedule, Scheduler


class SharedCoresScheduler(Scheduler):
    """`rule`, or all experts on the CPU with the device's cores too where the costs say that this is sooner.

    Resident experts are taken from the device only by rules that would steal them, and only with `Problem.allow_steal`.
    """

    def __init__(self, rule: Scheduler):
        self.rule, self.name = rule, rule.name
        self.uses_cpu, self.uses_link = rule.uses_cpu, rule.uses_link
        self.steals = rule.steals
        self.depends_on_counts_only, self.by_id = rule.depends_on_counts_only, rule.by_id

    def forecaster(self) -> Scheduler:
        return SharedCoresScheduler(self.rule.forecaster())

    def link_idle_from(self, problem: Problem) -> float:
        return self.rule.link_idle_from(problem)

    def schedule(self, problem: Problem) -> Schedule:
        found = self.rule.schedule(problem)
        if not problem.loads or not self.may_take_all(problem, found):
            return found
        on_cpu = self.all_on_cpu(problem)
        if on_cpu.makespan >= self.charged(problem, found):
            return found
        return on_cpu._replace(bound=min(found.bound, on_cpu.makespan))

    def may_take_all(self, problem: Problem, found: Schedule) -> bool:
        """Whether the CPU may have every expert that `found`, this rule's schedule, gives to the device."""
        return problem.allow_cpu and (not found.device or (self.steals and problem.allow_steal))

    def all_on_cpu(self, problem: Problem) -> Schedule:
        """Every expert on the CPU with all cores, behind the shared ones; the device is not called for any expert."""
        loads, costs = problem.loads, cast(SharedCoreCosts, problem.costs)
        shared = costs.shared(problem.tokens) - costs.device_block
        finish = shared + costs.alone_first + sum([costs.alone(load) for load in loads.values()])
        order = tuple(sorted(loads, key=lambda expert: (loads[expert], expert)))
        return Schedule(order, (), (), (), finish, finish, shared, problem.link_start, uses_all_cores=True)

    def charged(self, problem: Problem, found: Schedule) -> float:
        """Seconds of the rule's schedule on a machine whose lanes share cores."""
        costs = cast(SharedCoreCosts, problem.costs)
        both = found.device_seconds + (costs.alone_first if found.cpu else 0.0)
        if not found.device:
            both -= costs.device_block
        both += sum([costs.alone(problem.loads[expert]) for expert in found.cpu])
        return max(found.makespan, both)

    def prove_all_on_cpu(
        self, costs: SharedCoreCosts, top_k: int, most_resident: int
    ) -> tuple[float | None, Schedule | None]:
        """What `costs.handover` must be for a step of one token to be all on the CPU whatever the routing.

        It is what the rule's own schedule saves at most, however many experts are resident; None where the CPU may not
        have them all. Where it is that much, also the schedule of each layer, experts called 0 .. top_k-1.
        """
        loads, needed = dict.fromkeys(range(top_k), 1), 0.0
        on_cpu = self.all_on_cpu(Problem(loads, (), costs))
        for hits in range(min(top_k, most_resident) + 1):
            problem = Problem(loads, range(hits), costs)
            found = self.rule.schedule(problem)
            if not self.may_take_all(problem, found):
                return None, None
            needed = max(needed, on_cpu.makespan - self.charged(problem, found))
        return needed, on_cpu if costs.handover and needed <= costs.handover else None


def with_shared_cores(rule: Scheduler, costs: Costs) -> Scheduler:
    """`rule` as it should be used with these costs; rules that leave the CPU idle stay as they are."""
    return SharedCoresScheduler(rule) if costs.shares_cores and rule.uses_cpu else rule
