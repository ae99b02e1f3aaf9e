"""Planners for tests: of a system with parts replaced, and prefetches by predictions that a test gives."""

from __future__ import annotations

from hybrimoe_jax.decide.planner import Planner
from hybrimoe_jax.decide.prefetch.prediction import Prediction, as_list
from hybrimoe_jax.decide.systems import get_system

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
