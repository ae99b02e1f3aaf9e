"""How the planner gets a layer's schedule: from memory where it was asked the same before, from the rule otherwise.

Three ways, cheapest first. Where the CPU computes every expert of a token whatever the routing, the answer is known
beforehand (`all_on_cpu`, see `schedule.shared_cores`). Where all loads are 1 the rule is asked once for each pair of
numbers, residents and misses (`schedule.unit_load_cache`). Everything else is a `Problem` of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import cast

from hybrimoe_jax.decide.costs import Costs, SharedCoreCosts
from hybrimoe_jax.decide.schedule import Problem, Schedule, Scheduler
from hybrimoe_jax.decide.schedule.shared_cores import SharedCoresScheduler
from hybrimoe_jax.decide.schedule.unit_load_cache import UnitLoadCache, apply


class ScheduleCache:
    """One rule's answers for one engine.

    Args:
      rule, costs: the engine's.
    """

    def __init__(self, rule: Scheduler, costs: Costs):
        self.rule, self.costs = rule, costs
        self.all_on_cpu: Schedule | None = None
        self._unit_loads = UnitLoadCache(rule, costs, self.allow_fetch(1)) if rule.depends_on_counts_only else None

    def prove_all_on_cpu(self, top_k: int, most_resident: int) -> float | None:
        """Lets a step of one token be answered beforehand, where that is the rule's answer whatever the routing.

        `most_resident`: experts of a layer in slots at most. Returns what `costs.handover` must be for that, None where
        nothing would do.
        """
        if not (isinstance(self.rule, SharedCoresScheduler) and self.rule.depends_on_counts_only):
            return None
        needed, self.all_on_cpu = self.rule.prove_all_on_cpu(cast(SharedCoreCosts, self.costs), top_k, most_resident)
        return needed

    def schedule(
        self,
        loads: Mapping[int, int],
        scores: Sequence[float] | None,
        tokens: int,
        resident: Collection[int],
        hits: Sequence[int],
        misses: Sequence[int],
        in_flight: Mapping[int, float],
        link_busy: float,
        unit_loads: bool,
    ) -> tuple[Schedule, tuple[int, ...]]:
        """(the layer's lanes, those of the device's experts that are resident).

        Args: as of `schedule.Problem`; `hits` and `misses` are the activated experts that are resident, and not;
        `unit_loads`: all loads are 1 and so is `tokens`.
        """
        if not in_flight and tokens == 1:
            if self.all_on_cpu is not None:
                return self.all_on_cpu._replace(cpu=tuple(sorted(loads)), link_seconds=link_busy), ()
            memory = self._unit_loads
            if unit_loads and memory is not None:
                by_id = memory.by_id or scores is None
                order = _order(hits, misses, None if by_id else scores)
                if order is not None:
                    pattern = memory.find(len(hits), len(misses), by_id, link_busy)
                    if pattern is not None:
                        return apply(pattern, order, link_busy), pattern.resident(order)
        allow_fetch = self.allow_fetch(1 if unit_loads else max(loads.values(), default=1))
        problem = Problem(loads, resident, self.costs, tokens, scores, in_flight, link_busy, allow_fetch=allow_fetch)
        schedule = self.rule.schedule(problem)
        if not misses:
            return schedule, schedule.device
        return schedule, tuple([expert for expert in schedule.device if expert in resident])

    def allow_fetch(self, load: int) -> bool:
        """Whether a demand fetch may be issued beside an expert of load `load`, the heaviest.

        Not where issuing one keeps the CPU from computing for as long as it takes for that expert, or longer.
        """
        costs = self.costs
        return not (costs.fetch_host and self.rule.uses_cpu and costs.fetch_host >= costs.cpu(load))


def _order(hits: Sequence[int], misses: Sequence[int], scores: Sequence[float] | None) -> list[int] | None:
    """Hits, then misses, each by falling score, then rising id.

    None where scores are equal, which the rules settle each in its way.
    """
    if scores is None:
        return sorted(hits) + sorted(misses)
    key = scores.__getitem__
    if len(set(map(key, hits))) < len(hits) or len(set(map(key, misses))) < len(misses):
        return None
    return sorted(hits, key=key, reverse=True) + sorted(misses, key=key, reverse=True)
