"""Rules on a machine whose "device" has no cores of its own, as where XLA's CPU backend stands in for a GPU.

Three lanes are then two that take each other's cores and a link that is a copy. A rule which believes in three splits the work where
one lane with all cores would be done sooner (measured: prefill of 512 tokens 1.2 times). So one more schedule is weighed: the device does
what only it can, then the CPU takes every expert with all cores. What the rule found is charged for the work of both lanes, since neither
can work for nothing beside the other: no sooner done than the device's seconds and the CPU's, each with all cores, one after the other.
"""

from __future__ import annotations

from typing import Any

from hybrimoe_jax.decide.schedule.problem import Problem, Schedule, Scheduler


class SharedCoresScheduler(Scheduler):
    """`rule`, or all experts on the CPU with the device's cores too where the costs say that this is sooner.

    Resident experts are taken from the device only by rules that would steal them, and only with `Problem.allow_steal`.
    """

    def __init__(self, rule: Scheduler):
        self.rule, self.name = rule, rule.name
        self.uses_cpu, self.uses_link = rule.uses_cpu, rule.uses_link
        self.steals, self.looks_ahead = rule.steals, rule.looks_ahead
        self.by_numbers, self.by_id = rule.by_numbers, rule.by_id

    def forecaster(self) -> Scheduler:
        return SharedCoresScheduler(self.rule.forecaster())

    def link_idle_from(self, problem: Problem) -> float:
        return self.rule.link_idle_from(problem)

    def schedule(self, problem: Problem) -> Schedule:
        found = self.rule.schedule(problem)
        loads, costs = problem.loads, problem.costs
        if not problem.allow_cpu or not loads or (found.device and not (self.steals and problem.allow_steal)):
            return found
        shared = costs.shared(problem.tokens)
        finish = shared + costs.alone_first + sum([costs.alone(load) for load in loads.values()])
        both = found.device_seconds + (costs.alone_first if found.cpu else 0.0)
        both += sum([costs.alone(loads[expert]) for expert in found.cpu])
        if finish >= max(found.makespan, both):
            return found
        order = tuple(sorted(loads, key=lambda expert: (loads[expert], expert)))
        bound = min(found.bound, finish)
        return Schedule(order, (), (), (), finish, finish, shared, problem.link_start, bound, alone=True)


def with_shared_cores(rule: Scheduler, costs: Any) -> Scheduler:
    """`rule` as it should be used with these costs; rules that leave the CPU idle stay as they are."""
    return SharedCoresScheduler(rule) if costs.shares_cores and rule.uses_cpu else rule
