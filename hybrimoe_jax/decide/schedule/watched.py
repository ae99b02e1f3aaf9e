"""Schedulers watched: every activated expert in exactly one lane, the device's where it can be, times as they are."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, cast

from hybrimoe_jax.decide.costs import Costs
from hybrimoe_jax.decide.schedule.problem import Problem, Schedule, Scheduler, replay
from hybrimoe_jax.decide.watch import Watch, listed, trusted

_NEAR = 1e-6
"""By what share of itself a time may differ from `replay`'s: sums in another order."""


class SchedulerWatch(Watch):
    """One rule. Every method is the contract's, see `Scheduler`."""

    methods = ("schedule", "forecaster", "link_idle_from", "keeps_residents")
    rule: Scheduler

    def schedule(self, problem: Problem) -> Schedule:
        """The rule's lanes, checked, with the times that `replay` gives them."""
        loads, here, moving = dict(problem.loads), frozenset(problem.resident), dict(problem.in_flight)
        found: Any = self.ask(
            "schedule", dataclasses.replace(problem, loads=dict(loads), resident=here, in_flight=dict(moving))
        )
        if not isinstance(found, Schedule):
            self.fault("schedule", f"gave {found!r:.80}, which is no Schedule (`replay` makes one of three lanes)")
        cpu, device, fetch = (self._lane(name, getattr(found, name)) for name in ("cpu", "device", "fetch"))
        problem = dataclasses.replace(problem, loads=loads, resident=here, in_flight=moving)
        self._check_lanes(problem, cpu, device)
        self._check_link(problem, device, fetch)
        self._check_flags(problem, cpu, fetch)
        return self._timed(problem, found, cpu, device, fetch)

    def forecaster(self) -> Scheduler:
        found: Any = self.ask("forecaster")
        if not isinstance(found, Scheduler):
            self.fault("forecaster", f"gave {found!r:.80}, which is no scheduler")
        return watch_scheduler(found)

    def link_idle_from(self, problem: Problem) -> float:
        found = self.ask("link_idle_from", problem)
        return found if found == math.inf else self.number("link_idle_from", found)

    def keeps_residents(self, costs: Costs, tokens: int, activated: int) -> bool:
        return bool(self.ask("keeps_residents", costs, tokens, activated))

    def _lane(self, name: str, experts: Any) -> tuple[int, ...]:
        what = f"gave the {name}"
        if not isinstance(experts, Sequence):
            self.fault("schedule", f"{what} {experts!r:.80}, which is no sequence of experts")
        given = cast(Sequence[Any], experts)
        return tuple([e if type(e) is int else self.whole("schedule", what, e) for e in given])

    def _check_lanes(self, problem: Problem, cpu: Sequence[int], device: Sequence[int]) -> None:
        placed, lanes = set[int](), f"cpu: {listed(cpu)}; device: {listed(device)}"
        for lane, experts in (("CPU", cpu), ("device", device)):
            for expert in experts:
                if expert not in problem.loads:
                    self.fault("schedule", f"gave the {lane} expert {expert}, which no token chose ({lanes})")
                if expert in placed:
                    self.fault("schedule", f"ran expert {expert} twice ({lanes})")
                placed.add(expert)
        missing = [expert for expert in problem.loads if expert not in placed]
        if missing:
            chosen = listed(list(problem.loads))
            self.fault("schedule", f"left out expert {missing[0]} (activated: {chosen}; {lanes})")

    def _check_link(self, problem: Problem, device: Sequence[int], fetch: Sequence[int]) -> None:
        on_link = set[int]()
        for expert in fetch:
            if expert in on_link:
                self.fault("schedule", f"fetched expert {expert} twice")
            for where, known in (("resident", problem.resident), ("in flight", problem.in_flight)):
                if expert in known:
                    self.fault("schedule", f"fetched expert {expert}, which is {where}")
            if expert not in device:
                self.fault("schedule", f"fetched expert {expert}, which the device does not run")
            on_link.add(expert)
        for expert in device:
            if not (expert in problem.resident or expert in problem.in_flight or expert in on_link):
                self.fault(
                    "schedule",
                    f"gave the device expert {expert}, which is neither resident nor in flight nor fetched "
                    f"(resident: {listed(sorted(problem.resident))}; fetched: {listed(fetch)})",
                )

    def _check_flags(self, problem: Problem, cpu: Sequence[int], fetch: Sequence[int]) -> None:
        """What the rule says of itself is relied on."""
        rule = self.rule
        if cpu and not (rule.uses_cpu and problem.allow_cpu):
            said = "allow_cpu" if rule.uses_cpu else "uses_cpu"
            self.fault("schedule", f"gave the CPU expert {cpu[0]}, but `{said}` is False")
        if fetch and not rule.uses_link:
            self.fault("schedule", f"fetched expert {fetch[0]}, but `uses_link` is False")
        stolen = [expert for expert in cpu if expert in problem.resident]
        if stolen and not rule.steals:
            self.fault("schedule", f"gave the CPU the resident expert {stolen[0]}, but `steals` is False")
        if stolen and self.keeps_residents(problem.costs, problem.tokens, len(problem.loads)):
            self.fault("schedule", f"gave the CPU the resident expert {stolen[0]}, but `keeps_residents` says none is")

    def _timed(
        self, problem: Problem, found: Schedule, cpu: Sequence[int], device: Sequence[int], fetch: Sequence[int]
    ) -> Schedule:
        timed = replay(problem, cpu, device, fetch)
        if set(found.awaited) != set(timed.awaited):
            said, true = listed(list(found.awaited)), listed(timed.awaited)
            self.fault("schedule", f"awaited {said}; of those in flight the device runs {true}")
        for name in ("makespan", "cpu_seconds", "device_seconds", "link_seconds"):
            said, true = self.number("schedule", getattr(found, name)), getattr(timed, name)
            if abs(said - true) > _NEAR * abs(true):
                self.fault("schedule", f"gave {name} {said:.6g}, but its lanes take {true:.6g} s (`replay` times them)")
        if not self.number("schedule", found.bound) <= timed.makespan * (1 + _NEAR):
            self.fault("schedule", f"gave the bound {found.bound:.6g}, but a makespan of {timed.makespan:.6g} s")
        if found.uses_all_cores:
            self.fault("schedule", "gave `uses_all_cores`, which only SharedCoresScheduler's plans do")
        return timed._replace(bound=found.bound)


def watch_scheduler(rule: Scheduler, every: bool = False) -> Scheduler:
    """The same object; `every`: one of the package's own, too."""
    mine = trusted(rule, SchedulerWatch.methods)
    if (every or not mine) and "_watched" not in rule.__dict__:
        SchedulerWatch("scheduler", rule)
    return rule
