"""The policies on real routing, against the hit counts of an independent event-atomic replay.

And what a decision costs.
"""

import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
from grids import few
from planner_cases import planner_of, prefetch

from hybrimoe_jax.decide.cache import policy_class
from hybrimoe_jax.decide.planner import Planner
from hybrimoe_jax.decide.prefetch.prediction import predict
from hybrimoe_jax.decide.schedule import Problem, get_scheduler
from hybrimoe_jax.machine.costs import CostModel

DATA = Path(os.environ.get("HYBRIMOE_DATA", Path(__file__).parents[2] / "shared" / "data"))
TRACES = DATA / "trace-deepseek-v2-lite-esft"

MACHINE = CostModel(
    cpu_expert=1.5e-4,
    cpu_token=1e-5,
    cpu_first=1e-5,
    device_expert=2e-5,
    device_token=1e-7,
    shared_base=3e-5,
    shared_token=0.0,
    layer_base=1e-4,
    layer_token=0.0,
    transfer_latency=1e-5,
    bandwidth=1e10,
    bandwidth_cpu_busy=8e9,
    expert_bytes=4_000_000,
    source="round figures for a test",
)


def trace(task: str) -> tuple[np.ndarray, np.ndarray]:
    """ids [tokens, layers, 6] and router weights of DeepSeek-V2-Lite."""
    path = TRACES / f"{task}.npz"
    if not path.exists():
        pytest.skip(f"the public trace {path.name} is not here; point HYBRIMOE_DATA at the data folder")
    with np.load(path) as data:
        return data["expert_ids"], data["weights_e4"] / 1e4


def scores_of(ids, weights) -> list[float]:
    scores = np.zeros(64)
    scores[ids] = weights
    return scores.tolist()


RATES = [
    ("law", "lru", {}, 0.401),
    ("law", "lfu", {"decay": 0.999}, 0.422),
    ("law", "mrs", {"alpha": 0.3, "p": 6}, 0.413),
    ("intent", "lru", {}, 0.453),
    ("intent", "lfu", {"decay": 0.999}, 0.523),
    ("intent", "mrs", {"alpha": 0.3, "p": 6}, 0.460),
]


@pytest.mark.parametrize(
    ("task", "name", "params", "hit_rate"),
    few(RATES[3:], RATES),
)
def test_hit_rates_on_real_routing(task, name, params, hit_rate):
    """First six layers, 16 slots of 64, one token a step, every miss admitted, cold start."""
    ids, weights = trace(task)
    hits = 0
    for layer in range(6):
        policy, resident = policy_class(name)(64, 16, 6, **params), set()
        for step in range(len(ids)):
            loads = dict.fromkeys(ids[step, layer].tolist(), 1)
            policy.observe(scores_of(ids[step, layer], weights[step, layer]), loads)
            for expert in loads:
                if expert in resident:
                    hits += 1
                    continue
                if len(resident) == 16:
                    resident.remove(policy.victim(resident, loads))
                resident.add(expert)
    assert hits / (len(ids) * 6 * 6) == pytest.approx(hit_rate, abs=0.003)


def decode(planner: Planner, ids, weights, recall: float) -> float:
    """Predicted seconds per token.

    Each expert of a coming layer is foreseen with probability `recall`, else another is.
    """
    generator, total, under_way = random.Random(0), 0.0, ()
    steps, layers = ids.shape[:2]
    for step in range(steps):
        rows = [scores_of(ids[step, layer], weights[step, layer]) for layer in range(layers)]
        for layer in range(layers):
            for p in under_way:
                planner.landed(p.layer, p.expert)
            plan = planner.plan(layer, dict.fromkeys(ids[step, layer].tolist(), 1), rows[layer], 1)
            total += plan.makespan + planner.costs.layer(1)
            ahead = []
            for later in rows[layer + 1 : layer + 4]:
                seen = [score if generator.random() < recall else 0.0 for score in later]
                for score in later:
                    if score and generator.random() >= recall:
                        seen[generator.randrange(64)] = score
                ahead.append(predict(seen, 6))
            under_way = prefetch(planner, layer, ahead)
        planner.finish_step()
    return total / steps


def test_on_real_routing_each_idea_of_the_paper_saves_predicted_time():
    ids, weights = (array[:120, :8] for array in trace("intent"))
    seconds = {
        name: decode(planner_of(system, 8, 64, 6, 16, MACHINE, **options), ids, weights, recall=0.85)
        for name, system, options in [
            ("ktransformers", "ktransformers", {}),
            ("on-demand", "on-demand", {}),
            ("hybrimoe without prefetch", "hybrimoe", {"prefetch": "none"}),
            ("hybrimoe", "hybrimoe", {}),
        ]
    }
    assert seconds["hybrimoe"] < seconds["hybrimoe without prefetch"] < seconds["ktransformers"]
    assert seconds["hybrimoe without prefetch"] < seconds["on-demand"]


def fastest(call, repeats: int = 60) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def plain() -> int:
    """A hundred rounds of plain Python: what the core, and whatever watches it, takes for them."""
    total = 0
    for number in range(100):
        total += number
        if total > 10:
            total -= 3
    return total


@pytest.mark.alone
def test_decisions_cost_microseconds():
    """Bounds of several times what they take (10, 4 and 5 times `plain`), so that only a change of kind trips them."""
    unit = fastest(plain)
    generator = random.Random(0)
    scores = [generator.random() for _ in range(64)]
    loads = dict.fromkeys(generator.sample(range(64), 8), 1)
    problem = Problem(loads, set(range(16)), MACHINE, 1, scores)
    assert fastest(lambda: get_scheduler("paper").schedule(problem)) < 40 * unit
    planner = Planner("hybrimoe", 8, 64, 8, 16, MACHINE)
    assert fastest(lambda: planner.plan(0, loads, scores, 1)) < 20 * unit
    ahead = [predict(generator.sample(scores, 64), 8) for _ in range(3)]

    def start_prefetches():
        for p in prefetch(planner, 0, ahead):
            planner.landed(p.layer, p.expert)

    assert fastest(start_prefetches) < 30 * unit
