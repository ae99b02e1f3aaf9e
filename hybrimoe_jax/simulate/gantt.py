"""One schedule as a picture: what each lane does when, as the cost model has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from hybrimoe_jax.decide.schedule import Problem, Schedule
from hybrimoe_jax.decide.schedule.problem import landings
from hybrimoe_jax.figures import LANE_COLOURS, LANE_HATCHES, axes_of

LANES = ("link", "device", "cpu")
"""From the bottom to the top."""


class Operation(NamedTuple):
    """Something that a lane does, in seconds from the start of the layer; `expert` is None for the shared experts."""

    lane: str
    expert: int | None
    start: float
    end: float


def operations(problem: Problem, schedule: Schedule) -> list[Operation]:
    """All that a schedule does, by when it ends.

    For the rule "paper" that is the order in which it decides: the proposal that would finish first is committed, and
    every later one ends later.
    """
    costs, loads = problem.costs, problem.loads
    found: list[Operation] = []
    now = 0.0
    for expert in schedule.cpu:
        end = now + costs.cpu(loads[expert], not now)
        found.append(Operation("cpu", expert, now, end))
        now = end
    ends = landings(problem.link_start, now, len(schedule.fetch), costs.transfer(True), costs.transfer(False))
    found += map(Operation, ["link"] * len(ends), schedule.fetch, [problem.link_start, *ends], ends)
    ready = {**problem.in_flight, **dict(zip(schedule.fetch, ends))}
    now = costs.shared(problem.tokens)
    if now:
        found.append(Operation("device", None, 0.0, now))
    for expert in schedule.device:
        start = now if expert in problem.resident else max(now, ready[expert])
        now = start + costs.device(loads[expert])
        found.append(Operation("device", expert, start, now))
    return sorted(found, key=lambda one: (one.end, ("device", "cpu", "link").index(one.lane)))


def draw_schedule(
    problem: Problem,
    schedule: Schedule,
    ax: Any = None,
    first: int | None = None,
    names: Sequence[str] | None = None,
    unit: str = "s",
) -> Any:
    """A Gantt chart; returns the axes.

    Args:
      ax: where to draw; a new figure without it.
      first: so many operations only, the last of them outlined; None for all.
      names: of experts; their numbers without them.
      unit: what the axis calls a second of the cost model, which may be in other units.
    """
    shown = operations(problem, schedule)
    until = max(one.end for one in shown)
    with axes_of(ax, height=1.2) as axes:
        for number, one in enumerate(shown[:first], 1):
            newest = number == first
            axes.barh(
                LANES.index(one.lane),
                one.end - one.start,
                left=one.start,
                height=0.8,
                color="0.85" if one.expert is None else LANE_COLOURS[one.lane],
                hatch=None if one.expert is None else LANE_HATCHES[one.lane],
                edgecolor="black" if newest else "white",
                lw=1.2 if newest else 0.4,
                zorder=3 if newest else 2,
            )
            label = "shared" if one.expert is None else names[one.expert] if names else str(one.expert)
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
            middle = (one.start + one.end) / 2
            axes.text(middle, LANES.index(one.lane), label, ha="center", va="center", fontsize=6, bbox=box, zorder=4)
        axes.set_yticks(range(len(LANES)), ("link", "device", "CPU"))
        axes.set(xlim=(0, 1.02 * until), ylim=(-0.5, 2.5))
        axes.set_xlabel(f"time [{unit}]")
    return axes
