"""Answers for loads of 1, remembered: decoding asks the same few questions over and over.

Where every load is 1 and no expert is in flight, a rule's answer depends on how many experts are resident and how many
are not. Which of them does what follows from their order (by falling score, then rising id). So a rule is asked once
for each pair of numbers, with positions in place of experts, and afterwards the positions are filled in.

A link that is still busy adds a number that is never twice the same. But a rule that would not use the link, busy as it
is, answers as if it were busy for ever. `Scheduler.link_idle_from` says from when on that holds; what lies between goes
the long way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import NamedTuple

from hybrimoe_jax.decide.costs import Costs
from hybrimoe_jax.decide.schedule.problem import Problem, Schedule, Scheduler

Pick = Callable[[Sequence[int]], tuple[int, ...]]
_CAREFUL = 1e-9
"""Margin on the time from which on the link is left idle, so that no rounding decides."""


class Pattern(NamedTuple):
    """A schedule of positions.

    Each `pick` takes the experts in order, resident ones first, and gives a lane's experts; `resident` those of the
    device's that were there; `times` is the schedule that the positions had.
    """

    cpu: Pick
    device: Pick
    resident: Pick
    fetch: Pick
    times: Schedule


class UnitLoadCache:
    """One rule's answers for load 1 and one token a step.

    Args:
      rule, costs: the engine's. allow_fetch: see `Problem`.
    """

    def __init__(self, rule: Scheduler, costs: Costs, allow_fetch: bool = True):
        self.rule, self.costs, self.allow_fetch = rule, costs, allow_fetch
        self.by_id = rule.by_id
        self._known: dict[tuple[int, int, bool], tuple[float, Pattern, Pattern | None]] = {}

    def find(self, resident: int, absent: int, by_id: bool, link_busy: float) -> Pattern | None:
        """The pattern for so many experts; None where it depends on how long exactly the link is busy.

        `by_id`: the experts' order is that of their ids alone (no scores are known).
        """
        known = self._known.get((resident, absent, by_id))
        if known is None:
            known = self._known[resident, absent, by_id] = self._ask(resident, absent, by_id)
        idle_from, free, busy = known
        if link_busy <= 0.0:
            return free
        return busy if link_busy >= idle_from else None

    def _ask(self, resident: int, absent: int, by_id: bool) -> tuple[float, Pattern, Pattern | None]:
        count = resident + absent
        scores = None if by_id else [float(count - i) for i in range(count)]
        loads = dict.fromkeys(range(count), 1)
        problem = Problem(loads, range(resident), self.costs, 1, scores, {}, 0.0, allow_fetch=self.allow_fetch)
        free = _pattern(self.rule.schedule(problem), resident)
        idle_from = self.rule.link_idle_from(problem) if absent else 0.0
        if idle_from == float("inf"):
            return idle_from, free, None
        idle_from = max(0.0, idle_from) + _CAREFUL * (abs(idle_from) + free.times.makespan)
        problem.link_busy = idle_from
        return idle_from, free, _pattern(self.rule.schedule(problem), resident)


def apply(pattern: Pattern, order: Sequence[int], link_busy: float) -> Schedule:
    """The pattern's schedule with experts in place of positions."""
    times, fetch = pattern.times, pattern.fetch(order)
    return Schedule(
        pattern.cpu(order),
        pattern.device(order),
        fetch,
        (),
        times.makespan,
        times.cpu_seconds,
        times.device_seconds,
        times.link_seconds if fetch else link_busy,
        times.bound,
        times.uses_all_cores,
    )


def _pattern(found: Schedule, resident: int) -> Pattern:
    here = [position for position in found.device if position < resident]
    # With all cores for the CPU experts run by id, whatever their order by score.
    cpu = _by_id if found.uses_all_cores else _pick(found.cpu)
    return Pattern(cpu, _pick(found.device), _pick(here), _pick(found.fetch), found)


def _by_id(order: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(order))


def _pick(positions: Sequence[int]) -> Pick:
    if len(positions) > 1:
        return itemgetter(*positions)
    if not positions:
        return lambda order: ()
    (only,) = positions
    return lambda order: (order[only],)
