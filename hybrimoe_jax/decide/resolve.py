"""What a planner is made of, from a system's names: its scheduler, its predictor and every layer's cache policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from hybrimoe_jax.decide.cache import CachePolicy, build_policies
from hybrimoe_jax.decide.cache.watched import watch_policies
from hybrimoe_jax.decide.costs import Costs
from hybrimoe_jax.decide.prefetch.prediction import Predictor
from hybrimoe_jax.decide.prefetch.predictors import build_predictor
from hybrimoe_jax.decide.residency.pool import capacity_of
from hybrimoe_jax.decide.schedule import Scheduler, get_scheduler
from hybrimoe_jax.decide.schedule.shared_cores import with_shared_cores
from hybrimoe_jax.decide.systems import System, get_system
from hybrimoe_jax.errors import UserError


class Resolved(NamedTuple):
    """The parts. `slots`: of each layer; `scheduler`: as it is to be used with the costs at hand."""

    system: System
    slots: list[int]
    scheduler: Scheduler
    predictor: Predictor
    policies: Sequence[CachePolicy]

    @property
    def pooled(self) -> bool:
        """Whether all layers share their slots."""
        return self.system.scope == "pooled"

    @property
    def fixed(self) -> bool:
        """Whether the placement never changes."""
        return all(policy.fixed for policy in self.policies)

    @property
    def most_resident(self) -> int:
        """Experts of one layer in slots at most."""
        return min(self.predictor.num_experts, sum(self.slots) if self.pooled else max(self.slots, default=0))


def resolve_system(
    system: System | str,
    num_layers: int,
    num_experts: int,
    top_k: int,
    slots_per_layer: Sequence[int] | int,
    costs: Costs,
    frequencies: Sequence[Sequence[float]] | None = None,
    policies: Sequence[CachePolicy] | None = None,
    recording: Any = None,
) -> Resolved:
    """Args as of `Planner`. UserError for an unknown name and for what does not fit the model."""
    system = get_system(system)
    slots = [slots_per_layer] * num_layers if isinstance(slots_per_layer, int) else list(slots_per_layer)
    if len(slots) != num_layers:
        raise UserError(f"planner: slots for {len(slots)} layers, but the model has {num_layers} MoE layers")
    if frequencies is not None and len(frequencies) != num_layers:
        raise UserError(f"planner: frequencies of {len(frequencies)} layers, but the model has {num_layers} MoE layers")
    if policies is None:
        pooled = system.scope == "pooled"
        capacities = [capacity_of(sum(slots), num_layers, num_experts)] * num_layers if pooled else slots
        policies = build_policies(system.cache, num_experts, capacities, top_k, frequencies=frequencies)
    else:
        policies = watch_policies(policies)
    scheduler = with_shared_cores(get_scheduler(system.scheduler), costs)
    model = (num_layers, num_experts, top_k)
    predictor = build_predictor(system.predictor, *model, system.max_distance, recording)
    return Resolved(system, slots, scheduler, predictor, policies)
