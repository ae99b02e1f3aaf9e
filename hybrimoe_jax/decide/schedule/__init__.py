"""Hybrid scheduling: who computes each activated expert of one MoE layer in one step, and what crosses the link for it.

Three lanes work at once: the CPU (any expert: all of them live in host memory), the device (resident experts) and the
link (host to device). The objective is the makespan, max(CPU finish, device finish) (HybriMoE, arXiv 2504.05897,
equation 2). A scheduler takes a `Problem` and returns a `Schedule`: what each lane does, in order, and when it will be
done by the cost model. Rules live in a table by name:

  paper            three lanes, each proposes, the proposal that would finish first is committed (HybriMoE, figure 5)
  released         the two-candidate rule of HybriMoE's released code
  cpu-misses       resident experts on the device, every other on the CPU; the link stays idle
  fetch-misses     every miss crosses the link, highest load first; the CPU stays idle
  device-only      the same without a scheduler: misses cross the link in the order of their ids
  bandwidth-split  link and CPU share the misses as they share the host's bandwidth (FreeToken)
  cheaper          each miss where it alone is done first (Fiddler)
  optimal          the least makespan, or how near to it
"""

from collections.abc import Mapping
from typing import Any

from hybrimoe_jax.decide.registry import Kind
from hybrimoe_jax.decide.schedule.optimal import OptimalScheduler
from hybrimoe_jax.decide.schedule.paper import PaperScheduler, ReleasedScheduler
from hybrimoe_jax.decide.schedule.problem import Problem, Schedule, Scheduler, replay
from hybrimoe_jax.decide.schedule.splits import (
    BandwidthSplitScheduler,
    CheaperScheduler,
    CpuMissesScheduler,
    DeviceOnlyScheduler,
    FetchMissesScheduler,
)
from hybrimoe_jax.decide.schedule.watched import watch_scheduler

__all__ = ["RULES", "SCHEDULERS", "Problem", "Schedule", "Scheduler", "get_scheduler", "replay"]

SCHEDULERS: dict[str, type[Scheduler]] = {
    rule.name: rule
    for rule in (
        PaperScheduler,
        ReleasedScheduler,
        CpuMissesScheduler,
        FetchMissesScheduler,
        DeviceOnlyScheduler,
        BandwidthSplitScheduler,
        CheaperScheduler,
        OptimalScheduler,
    )
}
"""The rules by name."""


def _try_out(rule: type[Scheduler], parameters: Mapping[str, Any]) -> tuple[Scheduler]:
    return (rule(**parameters),)


RULES = Kind(
    "scheduler",
    "scheduler",
    Scheduler,
    SCHEDULERS,
    {
        "schedule": ("problem",),
        "forecaster": (),
        "link_idle_from": ("problem",),
        "keeps_residents": ("costs", "tokens", "activated"),
    },
    (),
    _try_out,
)


def get_scheduler(spec: Any) -> Scheduler:
    """A new scheduler that `spec` names, see `registry`; UserError where there is none."""
    rule = RULES.resolve(spec)
    return watch_scheduler(rule.made_by(**rule.parameters))
