"""What a planner is made of, worked out from names: the system with its parts replaced, its rule, its predictor and every layer's cache policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hybrimoe_jax.decide.cache import CachePolicy, parse_policy
from hybrimoe_jax.decide.prefetch.prediction import Predictor
from hybrimoe_jax.decide.prefetch.predictors import build_predictor
from hybrimoe_jax.decide.residency.pool import capacity_of
from hybrimoe_jax.decide.schedule import Scheduler, get_scheduler
from hybrimoe_jax.decide.schedule.shared_cores import with_shared_cores
from hybrimoe_jax.decide.systems import System, get_system
from hybrimoe_jax.errors import UserError


class Setup(NamedTuple):
    """The parts. `slots`: of each layer; `rule`: as it is to be used with the costs at hand; `fixed`: a placement that never changes."""

    system: System
    slots: list[int]
    rule: Scheduler
    predictor: Predictor
    policies: list[CachePolicy]
    pooled: bool
    fixed: bool

    @property
    def most_resident(self) -> int:
        """Experts of one layer in slots at most."""
        experts = self.policies[0].num_experts if self.policies else 0
        return min(experts, sum(self.slots)) if self.pooled else max(self.slots, default=0)


def set_up(
    system: System | str,
    num_layers: int,
    num_experts: int,
    top_k: int,
    slots_per_layer: Sequence[int] | int,
    costs: Any,
    frequencies: Sequence[Sequence[float]] | None,
    *,
    cache: str | type[CachePolicy] | None,
    cache_params: Mapping[str, Any] | None,
    scheduler: str | Scheduler | None,
    predictor: str | Predictor | None,
    **replaced: Any,
) -> Setup:
    """Args as of `Planner`; `replaced`: further parts of the system. UserError for an unknown name and for what does not fit the model."""
    system = get_system(system) if isinstance(system, str) else system
    system = system.override(
        cache=cache if isinstance(cache, str) else None,
        scheduler=scheduler if isinstance(scheduler, str) else None,
        predictor=predictor if isinstance(predictor, str) else None,
        **replaced,
    )
    slots = [slots_per_layer] * num_layers if isinstance(slots_per_layer, int) else list(slots_per_layer)
    if len(slots) != num_layers:
        raise UserError(f"planner: slots for {len(slots)} layers, but the model has {num_layers} MoE layers")
    if frequencies is not None and len(frequencies) != num_layers:
        raise UserError(f"planner: frequencies of {len(frequencies)} layers, but the model has {num_layers} MoE layers")
    rule = scheduler if isinstance(scheduler, Scheduler) else get_scheduler(system.scheduler)
    if not isinstance(predictor, Predictor):
        predictor = build_predictor(system.predictor, num_layers, num_experts, top_k, system.max_distance)
    policy, parameters = (cache, {}) if isinstance(cache, type) else parse_policy(system.cache)
    pooled = system.scope == "pooled"
    capacities = [capacity_of(sum(slots), num_layers, num_experts)] * num_layers if pooled else slots
    parameters = {**parameters, **(cache_params or {})}
    policies = policy.for_layers(num_experts, capacities, top_k, frequencies=frequencies, **parameters)
    return Setup(system, slots, with_shared_cores(rule, costs), predictor, policies, pooled, policy.fixed)
