"""What a scheduler that looks ahead is shown: rates, stays, fills and the next layer."""

import pytest
from schedule_cases import costs

from hybrimoe_jax.decide.planner import Planner
from hybrimoe_jax.decide.prefetch.impact import Prediction
from hybrimoe_jax.decide.schedule.lookahead import LookaheadOptimalScheduler
from hybrimoe_jax.decide.view import Fills


def test_rates_are_shares_of_recent_tokens_and_old_ones_fade():
    fills = Fills([4], decay=0.5)
    fills.observe(0, {1: 8, 2: 2}, tokens=8, admitted=0)
    assert (fills.rate(0, 1), fills.rate(0, 2), fills.rate(0, 3)) == (1.0, 0.25, 0.0)
    fills.observe(0, {3: 1}, tokens=1, admitted=0)
    assert fills.rate(0, 1) == pytest.approx(1 / 3) and fills.rate(0, 3) == pytest.approx(2 / 3)
    for _ in range(2000):  # far past where the growing unit is rescaled
        fills.observe(0, {3: 1}, tokens=1, admitted=0)
    assert fills.rate(0, 3) == pytest.approx(1.0) and fills.rate(0, 1) == pytest.approx(0.0)


def test_a_stay_is_slots_over_turnover_and_a_fill_counts_one_reuse():
    fills = Fills([4, 4], decay=0.9)
    assert fills.stay(0) == pytest.approx(10.0)  # nothing was evicted yet: as long as is believed in
    for _ in range(5):
        fills.observe(0, {1: 1}, tokens=1, admitted=2)
    assert fills.stay(0) == pytest.approx(2.0)
    fills.observe(0, {6: 1}, tokens=2, admitted=2)
    rate = fills.rate(0, 6)
    assert 0 < rate < 0.5
    found = fills.fills(0, [6, 5], victim=None, saving=3.0)
    assert found == pytest.approx({6: 3.0 * (1 - (1 - rate) ** 2), 5: 0.0})  # asked for at least once in two steps
    assert fills.fills(0, [5], victim=(0, 6), saving=3.0) == pytest.approx({5: -found[6]})
    assert fills.rate(1, 1) == 0.0


class Spy(LookaheadOptimalScheduler):
    def __init__(self):
        super().__init__()
        self.seen = []

    def schedule(self, problem):
        self.seen.append(problem)
        return super().schedule(problem)


def test_the_planner_shows_the_newest_prediction_and_fills_of_misses():
    spy = Spy()
    model = costs(cpu=(4.0, 0.0, 0.0), device=(0.1, 0.0), shared=0.0, transfer=1.0)
    planner = Planner("hybrimoe", 3, 8, 2, 2, model, scheduler=spy, cache="lru", cold=True)
    for _ in range(4):
        for layer in range(3):
            planner.plan(layer, {0: 1, 1: 1}, None, 1)
        planner.finish_step()
    assert all(problem.coming is None for problem in spy.seen)
    assert planner.resident(1) == {0, 1}
    spy.seen.clear()
    planner.plan(0, {2: 1, 0: 1}, None, 1)
    planner.plan_prefetch(0, [Prediction({0: 1, 5: 1}), Prediction({6: 1, 7: 1})])
    planner.plan(1, {0: 1, 1: 1}, None, 1)
    first, second = spy.seen
    assert set(first.fill) == {2} and first.fill[2] < 0  # it would push out an expert that every step asks for
    assert second.fill is None  # no miss
    assert len(second.coming.resident) + len(second.coming.absent) == 2 and second.coming.gap == model.layer(1)
    assert second.coming.chance == planner.accuracy.probability(2) and second.coming.room <= 2
