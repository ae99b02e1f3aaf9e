"""The rules of HybriMoE: the paper's three-lane simulation and the two-candidate rule of its released code."""

from __future__ import annotations

from bisect import insort
from typing import Any

from hybrimoe_jax.decide.costs import Costs
from hybrimoe_jax.decide.schedule.problem import (
    Problem,
    Schedule,
    Scheduler,
    cpu_seconds_of_all,
    device_is_sooner,
    replay,
    require_lane,
    split,
)

_NEVER = float("inf")
_Queue = list[tuple[Any, ...]]
"""Entries (load, what breaks ties, ..., negated expert), the next one last."""


class PaperScheduler(Scheduler):
    """HybriMoE's greedy simulation. Queues: device by falling load, CPU by rising load over the non-resident experts.

    Until every expert is assigned each lane proposes its next operation: the CPU the head of its queue, or where that
    is empty the smallest-load resident expert; the device its highest-load expert, waiting for its transfer if need be;
    the link the highest load of the CPU queue, which then joins the device queue. The proposal that would finish first
    is committed (ties: device, CPU, link), the others are made again. Between equal loads the CPU takes the lower score
    and the link the higher, then the lower id; the device what is ready first, then as the link. Experts in flight
    stand in both queues, so that a layer never waits for a prefetch that the CPU beats; of equal loads the CPU takes
    them last.
    """

    name = "paper"
    steals = True
    depends_on_counts_only = True

    def keeps_residents(self, costs: Costs, tokens: int, activated: int) -> bool:
        return device_is_sooner(costs, tokens, activated)

    def link_idle_from(self, problem: Problem) -> float:
        """The time from which on the link's proposal loses against the CPU's.

        It loses as long as the CPU has an absent expert left that would be done before it.
        """
        if not (problem.allow_cpu and problem.allow_fetch):
            return super().link_idle_from(problem)
        return cpu_seconds_of_all(problem) - self.transfer_seconds(problem)

    def schedule(self, problem: Problem) -> Schedule:
        to_cpu, steal, to_link, to_device = self._queues(problem)
        cpu_of, device_of, transfer = problem.costs.cpu, problem.costs.device, self.transfer_seconds(problem)
        t_cpu, t_device, t_link = 0.0, problem.costs.shared(problem.tokens), problem.link_start
        cpu, device, fetch = list[int](), list[int](), list[int]()
        done: set[int] = set()
        while len(done) < len(problem.loads):
            finish = cpu_finish = link_finish = _NEVER
            while to_device and -to_device[-1][-1] in done:
                to_device.pop()
            if to_device:
                load, negative_ready, _, _ = to_device[-1]
                finish = (t_device if t_device > -negative_ready else -negative_ready) + device_of(load)
            cpu_queue = to_cpu
            if not to_cpu or -to_cpu[-1][-1] in done:
                cpu_queue = _drop_done(to_cpu, done) or _drop_done(steal, done)
            if cpu_queue:
                cpu_finish = t_cpu + cpu_of(-cpu_queue[-1][0], not cpu)
            while to_link and -to_link[-1][-1] in done:
                to_link.pop()
            if to_link:
                link_finish = t_link + transfer

            if finish <= cpu_finish and finish <= link_finish:
                expert = -to_device.pop()[-1]
                device.append(expert)
                done.add(expert)
                t_device = finish
            elif cpu_finish <= link_finish:
                expert = -cpu_queue.pop()[-1]
                cpu.append(expert)
                done.add(expert)
                t_cpu = cpu_finish
            else:
                load, score, minus = to_link.pop()
                fetch.append(-minus)
                insort(to_device, (load, -link_finish, score, minus))
                if to_cpu:
                    to_cpu.remove((-load, True, -score, minus))
                t_link = link_finish
        if fetch and t_link > t_cpu:
            return replay(problem, cpu, device, fetch)  # the last transfers go faster once the CPU is done
        awaited = tuple([e for e in device if e in problem.in_flight and e not in problem.resident])
        lanes = tuple(cpu), tuple(device), tuple(fetch), awaited
        return Schedule(*lanes, max(t_cpu, t_device), t_cpu, t_device, t_link)

    def _queues(self, problem: Problem) -> tuple[_Queue, _Queue, _Queue, _Queue]:
        """What the CPU may compute, what it may take from the device, what the link may fetch, and the device's own.

        The next expert stands last; its id, negated, ends its entry.
        """
        loads, resident, in_flight = problem.loads, problem.resident, problem.in_flight
        score = problem.scores if problem.scores is not None else _Zeros()
        here = [expert for expert in loads if expert in resident]
        absent = [expert for expert in loads if expert not in resident]
        if not (problem.allow_cpu or problem.allow_fetch):
            require_lane(problem, [e for e in absent if e not in in_flight], False)
        to_cpu, steal, to_link = _Queue(), _Queue(), _Queue()
        if problem.allow_cpu:
            to_cpu = sorted([(-loads[e], e not in in_flight, -score[e], -e) for e in absent])
            if problem.allow_steal:
                steal = sorted([(-loads[e], -score[e], -e) for e in here])
        if problem.allow_fetch:
            to_link = sorted([(loads[e], score[e], -e) for e in absent if e not in in_flight])
        to_device: _Queue = [(loads[e], 0.0, score[e], -e) for e in here]
        to_device += [(loads[e], -in_flight[e], score[e], -e) for e in absent if e in in_flight]
        to_device.sort()
        return to_cpu, steal, to_link, to_device


class ReleasedScheduler(Scheduler):
    """The rule of the released code (PKU-SEC-Lab/HybriMoE).

    Resident experts by falling load, then the others by falling load; of the first and the last, the first goes to the
    device if it would be done there no later than the last on the CPU, else the last goes to the CPU.

    Experts in flight stand between the two groups and are always the device's: their transfer is paid for.
    """

    name = "released"
    steals = True
    depends_on_counts_only = True

    def keeps_residents(self, costs: Costs, tokens: int, activated: int) -> bool:
        return device_is_sooner(costs, tokens, activated)

    def link_idle_from(self, problem: Problem) -> float:
        """An absent expert goes to the device only if it is done there no later than the last one on the CPU."""
        if not (problem.allow_cpu and problem.allow_fetch):
            return super().link_idle_from(problem)
        device = problem.costs.device(next(iter(problem.loads.values())))
        return cpu_seconds_of_all(problem) - self.transfer_seconds(problem) - device

    def schedule(self, problem: Problem) -> Schedule:
        loads, resident, costs, in_flight = problem.loads, problem.resident, problem.costs, problem.in_flight
        transfer = self.transfer_seconds(problem)
        here, moving, absent = split(problem)
        require_lane(problem, absent, problem.allow_cpu or problem.allow_fetch)
        order = here + moving + absent
        device_end = len(order) if problem.allow_fetch else len(here) + len(moving)
        cpu_start = len(order) if not problem.allow_cpu else 0 if problem.allow_steal else len(here) + len(moving)
        t_cpu, t_device, t_link = 0.0, costs.shared(problem.tokens), problem.link_start
        cpu, device, fetch = list[int](), list[int](), list[int]()
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
                if i >= len(here) + len(moving):
                    fetch.append(first)
                    t_link += transfer
                device.append(first)
                t_device = finish
                i += 1
            else:
                cpu.append(last)
                t_cpu = cpu_finish
                j -= 1
        return replay(problem, cpu, device, fetch)


def _drop_done(queue: _Queue, done: set[int]) -> _Queue:
    """The queue without those at its end that another lane has taken."""
    while queue and -queue[-1][-1] in done:
        queue.pop()
    return queue


class _Zeros:
    """Scores where there are none."""

    def __getitem__(self, expert: int) -> float:
        return 0.0
