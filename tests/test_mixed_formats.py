"""Experts of two sizes in one budget: against a replay of the same rule told apart, and what each rule prefers."""

import random

import numpy as np
import pytest

from hybrimoe_jax.decide.prefetch.prediction import RouterOutlook
from hybrimoe_jax.reproduce.mixed_formats import RULES, reloads
from hybrimoe_jax.simulate.workload import Asked, Step
from hybrimoe_jax.trace.facts import facts_of

LAYERS, EXPERTS, TOP_K = 2, 6, 2
FACTS = facts_of("toy", LAYERS, EXPERTS, TOP_K, 8, 8)


def random_steps(seed: int, count: int = 60) -> list[Step]:
    generator, steps = random.Random(seed), []
    for _ in range(count):
        layers = []
        for layer in range(LAYERS):
            scores = [generator.random() ** 3 for _ in range(EXPERTS)]
            chosen = sorted(range(EXPERTS), key=scores.__getitem__)[-TOP_K:]
            layers.append(Asked(layer, dict.fromkeys(chosen, 1), scores, RouterOutlook(np.array([chosen]))))
        steps.append(Step("decode", 1, 1, 0, layers))
    return steps


def told_apart(steps, sizes, seconds, ratio, rule) -> tuple[int, float]:
    """(hits, link seconds): scores kept as a table, victims found by sorting everything."""
    score = [[0.0] * EXPERTS for _ in range(LAYERS)]
    budget = int(ratio * EXPERTS * sum(sizes[layer % 2] for layer in range(LAYERS)))
    held, used, hits, link = set(), {}, 0, 0.0
    for now, step in enumerate(steps):
        for layer, loads, scores, _ in step.layers:
            top = sorted(range(EXPERTS), key=lambda e: (-scores[e], e))[: 2 * TOP_K]
            for e in range(EXPERTS):
                score[layer][e] = 0.5 * (scores[e] if e in top else 0.0) + 0.5 * score[layer][e]
            missing = [(layer, e) for e in loads if (layer, e) not in held]
            hits += len(loads) - len(missing)
            link += len(missing) * seconds[layer % 2]
            spared = {(layer, e) for e in loads}
            filled = sum(sizes[i % 2] for i, _ in held | spared)

            def worth(key, used=used):
                i = key[0] % 2
                factor = {"plain": 1.0, "cost": seconds[i], "cost per byte": seconds[i] / sizes[i]}[rule]
                return score[key[0]][key[1]] * factor, used[key], key

            for key in sorted(held - spared, key=worth):
                if filled > budget:
                    filled -= sizes[key[0] % 2]
                    held.remove(key)
            held |= spared
            used |= dict.fromkeys(spared, now)
    return hits, link


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(4))
def test_the_same_as_a_replay_told_apart(rule, seed):
    steps, sizes, seconds = random_steps(seed), (2, 1), (2.5, 1.0)
    found = reloads(steps, FACTS, sizes, seconds, 0.5, rule)
    hits, link = told_apart(steps, sizes, seconds, 0.5, rule)
    assert found.hit_rate == pytest.approx(hits / (len(steps) * LAYERS * TOP_K))
    assert found.seconds_per_step == pytest.approx(link / len(steps))


def test_of_one_size_all_rules_are_one_and_weighing_by_cost_keeps_what_is_dear():
    steps = random_steps(7, 200)
    same = [reloads(steps, FACTS, (1, 1), (1.0, 1.0), 0.5, rule) for rule in RULES]
    assert same[0][1:] == same[1][1:] == same[2][1:]
    plain, cost = (reloads(steps, FACTS, (1, 1), (5.0, 1.0), 0.5, rule) for rule in ("plain", "cost"))
    assert cost.seconds_per_step < plain.seconds_per_step, "same room, dearer transfers: those are worth keeping"
