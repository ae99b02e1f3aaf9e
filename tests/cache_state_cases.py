"""A short trace, planners for it, and costs: what the tests of cache states share."""

from __future__ import annotations

import tiny
from test_trace_command import recorded

from hybrimoe_jax.decide.planner import Planner
from hybrimoe_jax.trace.file import Trace

STEPS = [(3, 2), *[(1, 1)] * 30]


def costs():
    return tiny.costs(tiny.weights("qwen2_moe")[0], transfer=0.6)


def planner_for(system, facts, **more) -> Planner:
    return Planner(system, facts.layers, facts.experts, facts.top_k, 5, costs(), **more)


def short_trace() -> Trace:
    return recorded(STEPS, layers=4, experts=16, top_k=3, seed=5)
