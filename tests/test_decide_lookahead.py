"""How many layers ahead a planner looks, and when it applies their routers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from planner_cases import COSTS, planner_of

from hybrimoe_jax.decide.planner import Planner
from hybrimoe_jax.decide.prefetch.prediction import RouterOutlook

LAYERS, EXPERTS, TOP_K = 4, 6, 2


@pytest.mark.parametrize(
    "transfer, depth, slots",
    [(1.0, 1, 1), (6.5, 1, 1), (6.6, 2, 1), (20.0, 4, 1), (38.9, 6, 1), (39.1, 0, 1), (4.0, 1, 4), (4.1, 2, 4)],
)
def test_an_adaptive_depth_is_the_smallest_that_hides_a_transfer(transfer, depth, slots):
    """A layer takes 6.5 s: two misses on the CPU at 2.5, 0.5 more for the first, and 1 for the rest.

    With slots for half of the experts one of the two is taken to be there. Six layers are the limit.
    """
    costs = dataclasses.replace(COSTS, layer_base=1.0, bandwidth=1 / transfer, bandwidth_cpu_busy=1 / transfer)
    planner = planner_of("hybrimoe", 12, 8, 2, slots, costs, scheduler="cpu-misses", lookahead="adaptive")
    assert planner.depth(1) == planner.routers_wanted(1) == depth
    fixed = planner_of("hybrimoe", 12, 8, 2, slots, costs, scheduler="cpu-misses", lookahead=6)
    assert fixed.depth(1) == (6 if depth else 0)


@pytest.mark.parametrize("transfer, depth", [(16.0, 1), (16.1, 0)])
def test_the_depth_for_several_tokens_is_that_of_equal_loads_rounded_up(transfer, depth):
    """Five tokens ask eight experts for 1.25 tokens each; of load 2, all of them take the CPU 16 s."""
    costs = dataclasses.replace(
        COSTS, cpu_expert=0.0, cpu_token=1.0, cpu_first=0.0, layer_base=0.0, bandwidth=1 / transfer,
        bandwidth_cpu_busy=1 / transfer,
    )  # fmt: skip
    planner = planner_of("hybrimoe", 12, 8, 2, 1, costs, scheduler="cpu-misses", lookahead=1)
    assert planner.depth(5) == depth


@pytest.mark.parametrize(
    "name, look, depth", [("router-reuse", 2.4, 3), ("router-reuse", 2.5, 0), ("previous", 9.0, 3)]
)
def test_routers_are_applied_where_a_prefetch_saves_more_than_they_take(name, look, depth):
    """A layer with two misses on the CPU gets faster by 2.5 s where one of them is there."""
    costs = dataclasses.replace(COSTS, look=look)
    planner = planner_of("hybrimoe", LAYERS, EXPERTS, TOP_K, 2, costs, scheduler="cpu-misses", predictor=name)
    assert planner.depth(1) == depth


@pytest.mark.parametrize("name", ["co-activation", "previous"])
def test_a_predictor_without_gates_asks_for_none_and_prefetches_all_the_same(name):
    planner = planner_of("hybrimoe", LAYERS, EXPERTS, TOP_K, 2, COSTS, predictor=name)
    assert planner.depth(1) == 3 and planner.routers_wanted(1) == 0
    assert Planner("hybrimoe", LAYERS, EXPERTS, TOP_K, 2, COSTS).routers_wanted(1) == 3
    for _ in range(6):
        in_flight = []
        for layer in range(LAYERS):
            for p in in_flight:
                planner.landed(p.layer, p.expert)
            ids = np.array([[4, 5]]) if layer % 2 else np.array([[2, 3]])
            planner.plan(layer, {e: 1 for e in ids[0].tolist()}, None, 1)
            in_flight = planner.prefetch(layer, RouterOutlook(ids))
        planner.finish_step()
    counters = planner.counters
    assert counters.prefetch_useful > 0 and planner.accuracy.came_true[1] > 0


@pytest.mark.parametrize("transfer, asked", [(20.0, 3), (20.1, 0)])
def test_nothing_is_predicted_that_cannot_land_within_the_lookahead(transfer, asked):
    """A transfer has 1 s until the next layer and two layers more: 4 s each, and 5.5 s at most for their experts.

    That is one token's two misses on the CPU. Both of the device's experts take 4.5 s.
    """
    costs = dataclasses.replace(COSTS, shared_token=3.0, bandwidth=1 / transfer, bandwidth_cpu_busy=1 / transfer)
    planner = planner_of("hybrimoe", LAYERS, EXPERTS, TOP_K, 2, costs, scheduler="cpu-misses", predictor="previous")
    part, depths = planner._prefetch_planner, []
    part.predictor.predict = lambda layer, shown, depth: depths.append(depth) or []
    part.prefetch(0, RouterOutlook(np.array([[2, 3]])), 1, until_next=1.0)
    assert depths == [asked]
