"""The policy echo: a slow form of its formula, what it recalls and ignores, and what a step takes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from routing_cases import random_routing, visits_of

from hybrimoe_jax.decide.cache import Echo, echo


def nearest_of(likeness):
    """The steps most like this one, and 1.0; NaN where another was as like as the last of them."""
    ranked = sorted(likeness.items(), key=lambda one: -one[1])
    kept, others = ranked[: echo.NEAREST], ranked[echo.NEAREST :]
    return dict(kept), math.nan if others and kept[-1][1] - others[0][1] < 1e-6 else 1.0


def echo_by_definition(rows, num_experts, k, capacity, window):
    """Values of every expert after every visit, from the formulas alone: O(steps^2). NaN where equals are cut."""
    constant = echo.HORIZON * max(1.0, capacity / k)
    discounts = [math.exp(-h / constant) for h in range(math.ceil(3 * constant))]
    layers, values = len(rows[0]), []
    sets = [[set(ids) for ids in step] for step in rows]

    def shared(t, m, upto):
        return 0 if m < 0 else sum(len(sets[t][i] & sets[m][i]) for i in range(upto))

    for t, step in enumerate(sets):
        for layer, ids in enumerate(step):
            usual = np.zeros(num_experts)
            for scale in echo.TIME_SCALES:
                keep = 1 - 1 / scale
                weights = [keep ** (t - m) for m in range(t + 1)]
                for e in range(num_experts):
                    usual[e] += sum(w for m, w in enumerate(weights) if e in sets[m][layer]) / sum(weights)
            usual *= sum(discounts) / len(echo.TIME_SCALES)
            whole = k * (layer + 1) + k * (echo.OWN + layers * echo.PAST / (1 - echo.PAST_DECAY))
            likeness = {}
            for m in range(max(0, t - window), t):
                past = sum(
                    echo.PAST * echo.PAST_DECAY ** (d - 1) * shared(t - d, m - d, layers)
                    for d in range(1, m + 1)
                    if m - d >= max(0, t - d - window)
                )
                here = shared(t, m, layer + 1) + echo.OWN * len(ids & sets[m][layer])
                if here + past > 0:
                    likeness[m] = (here + past) / whole
            if not likeness:
                values.append(usual)
                continue
            best = max(likeness.values())
            likeness, certain = nearest_of(likeness)
            total, value = 0.0, np.zeros(num_experts)
            for m, f in likeness.items():
                if f > best - echo.CUT / echo.SHARPNESS:
                    w = math.exp(echo.SHARPNESS * (f - best))
                    total += w
                    for h, discount in enumerate(discounts[: t - m], 1):
                        value[list(sets[m + h][layer])] += w * discount
            floor = math.exp(echo.SHARPNESS * (echo.FLOOR - best))
            values.append(certain * (value + floor * usual) / (total + floor))
    return values


@pytest.mark.parametrize(
    ("num_experts", "layers", "window", "nearest"),
    [(10, 3, 200, 64), (70, 2, 200, 64), (10, 1, 8, 64), (10, 2, 1, 64), (130, 1, 200, 64), (10, 2, 200, 2)],
)
def test_echo_is_its_formula(num_experts, layers, window, nearest, monkeypatch):
    """Also beyond 64 experts, where masks take several words, and in a window that wraps around."""
    monkeypatch.setattr(echo, "NEAREST", nearest)
    rows = random_routing(60, layers, num_experts, 3)
    alone = [Echo(num_experts, 6, 3, window=window)]
    policies = alone if layers == 1 else Echo.for_layers(num_experts, [6] * layers, 3, window=window)
    expected = echo_by_definition(rows, num_experts, 3, 6, window)
    assert np.isfinite(expected).sum() > 40 * layers * num_experts
    for visit, want in zip(visits_of(rows), expected, strict=True):
        policies[visit.layer].observe(None, dict.fromkeys(visit.experts, 1))
        have = np.array([policies[visit.layer].value(e) for e in range(num_experts)])
        np.testing.assert_allclose(np.where(np.isnan(want), np.nan, have), want, rtol=3e-3, atol=3e-3)


def test_frequencies_stay_in_range_and_forget_at_their_pace():
    """Scale 2: each step weighs half of the next one. After 333 steps all are scaled down."""
    frequencies, used = echo.Frequencies(4, 2.0), {1: 330, 2: 398}
    for step in range(400):
        frequencies.add([0, *(expert for expert, last in used.items() if last == step)])
        shares = [count / frequencies.steps for count in frequencies.counts]
        known = [0.5 ** (1 + step - used[e]) if step >= used[e] else 0 for e in used]
        assert shares == pytest.approx([1, *known, 0], rel=1e-3 if step > 20 else 1)
    assert frequencies.steps < 1e100


@pytest.mark.parametrize("loads", [{}, dict.fromkeys(range(4), 1), dict.fromkeys(range(5), 1)], ids=len)
def test_echo_asks_for_what_is_usual_where_a_step_says_nothing(loads):
    """Of no expert, or of more than twice top-k; with twice top-k it looks for earlier steps like this one."""
    policies = Echo.for_layers(8, [4, 4], 2)
    for first, then in [(3, 7), (2, 6)] * 3 + [(3, 7)]:
        policies[0].observe(None, {first: 1, 0: 1})
        policies[1].observe(None, {then: 1, 1: 1})
    policies[0].observe(None, {2: 1, 0: 1})
    policies[1].observe(None, loads)
    uses = [sum(f.counts[e] / f.steps for f in policies[1]._usual) / 2 for e in range(8)]
    usual = [share * policies[1].discounts.sum() for share in uses]
    assert (policies[1].heat == pytest.approx(usual)) is (len(loads) != 4)


def test_echo_recalls_what_followed():
    """A, B, noise ..., A: what followed A before is worth more than what is frequent."""
    policy = Echo(16, 4, 2)
    for experts in ((0, 1), (2, 3), *[(8, 9)] * 3, (10, 11), (8, 9), (0, 1)):
        policy.observe(None, dict.fromkeys(experts, 1))
    assert min(policy.value(2), policy.value(3)) > 2 * policy.value(10)


def test_echo_ignores_steps_of_many_tokens():
    """A prompt activates nearly all experts: a step alike to all others, which would drown them."""
    rows = random_routing(40, 1, 12, 2)
    quiet, told = (Echo(12, 4, 2) for _ in range(2))
    for (ids,) in rows:
        quiet.observe(None, dict.fromkeys(ids, 1))
        told.observe(None, dict.fromkeys(ids, 1))
    told.observe(None, dict.fromkeys(range(12), 9))
    for policy in (quiet, told):
        for (ids,) in rows[:3]:
            policy.observe(None, dict.fromkeys(ids, 1))
    order = [sorted(range(12), key=policy.value, reverse=True)[:3] for policy in (quiet, told)]
    assert order[0] == order[1]


def test_echo_takes_the_same_work_at_every_step():
    policies = Echo.for_layers(16, [4, 4], 2, window=32)
    memory = policies[0].memory
    sizes = set()
    for visit in visits_of(random_routing(200, 2, 16, 2)):
        policies[visit.layer].observe(None, dict.fromkeys(visit.experts, 1))
        sizes.add((memory.masks.nbytes, len(memory._here), len(memory._past)))
    assert len(sizes) == 1 and policies[1].memory is memory
