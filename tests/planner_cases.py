"""Planners for tests: of a system with parts replaced, of a small model or any, and prefetches by given predictions."""

from __future__ import annotations

from hybrimoe_jax.decide.planner import Planner
from hybrimoe_jax.decide.prefetch.prediction import Prediction, as_list
from hybrimoe_jax.decide.systems import get_system
from hybrimoe_jax.machine.costs import CostModel

LAYERS, EXPERTS, TOP_K = 3, 8, 2

COSTS = CostModel(
    cpu_expert=2.0,
    cpu_token=0.5,
    cpu_first=0.5,
    device_expert=0.5,
    device_token=0.0,
    shared_base=0.5,
    shared_token=0.0,
    layer_base=4.0,
    layer_token=0.0,
    transfer_latency=0.0,
    bandwidth=0.5,
    bandwidth_cpu_busy=0.4,
    expert_bytes=1,
    source="a test",
)

OPTIONS = {"frequencies", "policies", "recording", "max_in_flight", "cold"}


def planner_of(system: str, num_layers, num_experts, top_k, slots, costs, **options) -> Planner:
    """`options`: the planner's own, and parts of the system to replace."""
    parts = {name: options.pop(name) for name in set(options) - OPTIONS}
    return Planner(get_system(system).override(**parts), num_layers, num_experts, top_k, slots, costs, **options)


def prefetch(planner: Planner, layer: int, predictions):
    """What `planner.prefetch` starts where its predictor says `predictions`, of the layers after `layer`."""
    reach = min(planner.system.max_distance, planner.num_layers - 1 - layer)
    predictions = [Prediction(loads, as_list(scores)) for loads, scores in predictions[:reach]]
    return planner._prefetch_planner.start(layer, predictions, planner._tokens, planner._until_next)


def planner(system="hybrimoe", slots=2, costs=COSTS, **options) -> Planner:
    return planner_of(system, LAYERS, EXPERTS, TOP_K, slots, costs, **options)


def residents(p: Planner) -> list[frozenset[int]]:
    return [p.resident(layer) for layer in range(LAYERS)]


def one_each(*experts: int) -> dict[int, int]:
    return {expert: 1 for expert in experts}


def fetched(plan) -> list[int]:
    return [f.expert for f in (*plan.fetch, *plan.awaited)]


def prefetching(**options) -> Planner:
    """CPU misses are dear and the link is idle, so that a predicted miss is worth moving."""
    return planner("hybrimoe", scheduler="cpu-misses", guard="none", **options)
