"""Who is resident: transfers under way and what became of them, shared slots, and values that settle who makes room."""

from __future__ import annotations

import pytest

from hybrimoe_jax.decide.cache import LRU, Belady
from hybrimoe_jax.decide.plan import Counters, Fetch
from hybrimoe_jax.decide.prefetch.prediction import Prediction
from hybrimoe_jax.decide.residency.inflight import InflightTransfers
from hybrimoe_jax.decide.residency.pool import VictimCandidate, capacity_of, initial
from hybrimoe_jax.decide.residency.residency import Residency

FREE = float("-inf")
SCOPES = [pytest.param({}, id="layer"), pytest.param({"pooled": True}, id="pooled")]


def residency(heats, slots=2, guard="value", **options) -> Residency:
    """Of layers with four experts that have these heats; the first `slots` experts of each are resident."""
    policies = LRU.for_layers(4, [slots] * len(heats), 2)
    for policy, heat in zip(policies, heats):
        policy.heat = list(heat)
    return Residency([slots] * len(heats), policies, InflightTransfers(len(heats), Counters()), guard, **options)


def test_the_link_is_busy_with_all_that_is_queued():
    transfers = InflightTransfers(2, Counters())
    transfers.clock = 10.0
    assert transfers.link_left == 0.0
    transfers.start(0, 3, 2.0), transfers.start(1, 4, 2.5)
    assert [transfers.in_flight[0][3].landing, transfers.in_flight[1][4].landing] == [12.0, 14.5]
    transfers.clock = 13.0
    transfers.clear_link()
    assert (transfers.link_left, transfers.num_in_flight) == (1.5, 2)
    transfers.clock = 14.0
    assert transfers.link_left == 0.5
    transfers.take(0, 3), transfers.take(1, 4)
    transfers.clear_link()
    assert (transfers.link_free, transfers.link_left, transfers.num_in_flight) == (14.0, 0.0, 0)
    transfers.clock = 20.0
    transfers.clear_link()
    assert transfers.link_free == 14.0
    transfers.start(0, 1, 1.0)
    assert (transfers.link_free, transfers.counters.prefetch_issued) == (21.0, 3)


def test_each_prefetch_is_judged_once_and_its_seconds_are_counted_when_it_ends():
    transfers = InflightTransfers(1, Counters())
    for expert in range(5):
        transfers.start(0, expert, 2.0**expert)
    for expert in (0, 1):
        transfers.keep(0, expert, transfers.take(0, expert))
    assert transfers.judge(0, (0, 7), {2: 0.5}) == ((0,), (2,), (1, 3, 4))
    transfers.keep(0, 3, transfers.take(0, 3))
    transfers.refuse(transfers.take(0, 4))
    transfers.finish_step()
    counters = transfers.counters
    assert (counters.prefetch_useful, counters.prefetch_late, counters.prefetch_wasted) == (1, 1, 3)
    assert (counters.prefetch_useful_s, counters.prefetch_late_s, counters.prefetch_wasted_s) == (1, 4, 2 + 8 + 16)
    assert (counters.prefetch_refused, counters.prefetch_wait_s, transfers.num_in_flight) == (1, 0.5, 0)
    assert transfers.judge(0, (), {}) == ((), (), ())
    transfers.start(0, 5, 1.0)
    transfers.refuse(transfers.take(0, 5))
    assert (counters.prefetch_refused, counters.prefetch_wasted) == (2, 4)


def test_a_step_that_ends_wastes_what_was_brought_for_it_and_what_is_abandoned():
    transfers = InflightTransfers(2, Counters())
    for layer, seconds in ((0, 1.0), (1, 2.0)):
        transfers.start(layer, 0, seconds)
    transfers.keep(0, 0, transfers.take(0, 0))
    transfers.finish_step()
    assert (transfers.counters.prefetch_wasted, transfers.counters.prefetch_wasted_s) == (2, 1.0)
    transfers.finish_step(), transfers.abandon()
    assert (transfers.counters.prefetch_wasted, transfers.counters.prefetch_wasted_s) == (2, 3.0)
    assert (transfers.num_in_flight, transfers.in_flight) == (0, [{}, {}])


def test_a_transfer_that_a_later_step_waits_for_was_wasted_and_what_is_measured_takes_the_model_s_place():
    transfers = InflightTransfers(1, Counters())
    transfers.start(0, 6, 2.0)
    assert transfers.judge(0, (), {}) == ((), (), (6,))
    assert transfers.judge(0, (), {6: 0.5}) == ((), (), ())
    counters = transfers.counters
    assert (counters.prefetch_wasted_s, counters.prefetch_late_s, counters.prefetch_wait_s) == (2.0, 0.0, 0.5)
    transfers.waited(0, 6, 3.0, 0.25)
    assert (counters.prefetch_wasted_s, counters.prefetch_late_s, counters.prefetch_wait_s) == (3.0, 0.0, 0.25)


def test_a_layer_s_victim_is_remembered_until_it_runs_or_its_residents_change():
    pooled = residency([[9.0] * 4, [0.3, 0.4, 0.0, 0.0]], pooled=True)
    of = pooled.pool._candidates.of
    assert [of(1).expert, of(1, {0}).expert, of(1).expert, of(1, {0, 1})] == [0, 1, 0, None]
    pooled.policies[1].observe(None, {0: 1})
    assert [of(1).expert, of(1, {1}).expert, of(1).expert] == [1, 0, 1]
    pooled.replace([{0, 1}, {0}])
    assert of(1).expert == 0
    pooled.pool.move(1, 3, None)
    assert of(1).expert == 3
    pooled.pool.move(0, 2, of(1))
    assert of(1).expert == 0 and pooled.pool.used == 4


def test_a_step_broken_off_while_it_was_judged_wastes_whatever_was_of_no_use():
    transfers = InflightTransfers(1, Counters())
    for expert in range(4):
        transfers.start(0, expert, 1.0)
    transfers.counters.prefetch_useful, transfers.counters.prefetch_late = 1, 1
    transfers.abandon()
    assert transfers.counters.prefetch_wasted == 2


@pytest.mark.parametrize("arguments, slots", [((5, 3, 8), 2), ((6, 3, 8), 2), ((99, 3, 8), 8), ((0, 0, 8), 0)])
def test_a_layer_s_share_of_the_pool_is_rounded_up(arguments, slots):
    assert capacity_of(*arguments) == slots


def test_the_pool_begins_with_the_most_frequent_of_all_layers_then_the_earliest_layer_and_the_lowest_id():
    known = LRU.for_layers(3, [2, 2], 1, frequencies=[[1, 5, 5], [5, 9, 5]])
    assert initial(known, 4) == [[1, 2], [1, 0]]
    assert initial(LRU.for_layers(3, [3, 3], 1), 3) == [[0, 1], [0]]


def test_the_least_valuable_of_all_layers_makes_room_and_of_equals_the_earliest_layer_s():
    assert min(VictimCandidate(1.0, 1, 0), VictimCandidate(1.0, 0, 9)).layer == 0
    pooled = residency([[0.5] * 4, [0.3, 0.4, 0, 0], [0.3] * 4], pooled=True)
    assert [pooled.admit(2, expert) for expert in (2, 3)] == [Fetch(2, (1, 0), False), Fetch(3, (2, 0), False)]
    assert pooled.resident == [{0, 1}, {1}, {1, 2, 3}]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("value, streamed", [(0.5, False), (0.4, True)])
def test_where_values_decide_a_miss_worth_as_much_as_the_victim_is_kept(scope, value, streamed):
    layers = residency([[0.6, 0.5, value, 0.0]], bypass=True, **scope)
    assert layers.admit(0, 2).stream is streamed


@pytest.mark.parametrize("guard, wanted", [("value", [0.2, 0.5]), ("expected", [0.2, 0.5]), ("none", [FREE, FREE])])
def test_openings_are_the_values_of_who_may_leave_smallest_first(guard, wanted):
    layers = residency([[0.5, 0.2, 0.9, 0.0]], guard=guard)
    assert layers._openings(0, Prediction({2: 1})) == wanted
    assert layers._openings(0, Prediction({1: 1, 2: 1})) == wanted[1:]
    layers.inflight.start(0, 3, 1.0)
    assert layers._openings(0, Prediction({2: 1})) == wanted[1:]
    assert residency([[0.5] * 4], slots=3, cold=True)._openings(0, Prediction({})) == [FREE] * 3


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("coming", [True, False])
def test_a_prefetch_is_weighed_by_the_step_that_it_was_for_only_as_long_as_that_is_to_come(scope, coming):
    layers = residency([[0.5, 0.4, 0.0, 0.0]], guard="expected", **scope)
    layers.predictions[0].append((1, Prediction({2: 1})))
    assert layers.admit_landed(0, 2, coming)[0] is coming


def test_a_coming_layer_has_what_is_resident_or_on_its_way():
    layers = residency([[0.0] * 4])
    assert layers.target(0, 1, Prediction({})).present == {0, 1}
    layers.inflight.start(0, 3, 1.0)
    assert layers.target(0, 1, Prediction({})).present == {0, 1, 3}


class Told(LRU):
    """Notes what it is told of."""

    def moved(self, entered, left):
        self.__dict__.setdefault("moves", []).append((entered, left))


def test_policies_are_told_who_entered_and_who_left():
    policies = Told.for_layers(4, [1, 1], 1)
    pooled = Residency([1, 1], policies, InflightTransfers(2, Counters()), "none", cold=True, pooled=True)
    for layer, expert in ((0, 3), (0, 2), (0, 1), (1, 0)):
        pooled.policies[layer].observe(None, {expert: 1})
        pooled.admit(layer, expert)
    assert [policy.moves for policy in policies] == [[(3, None), (2, None), (1, 3), (None, 2)], [(0, None)]]


@pytest.mark.parametrize("scope", SCOPES)
def test_others_residents_fit_the_slots_or_are_refused(scope):
    layers = residency([[0.0] * 4] * 2, **scope)
    layers.replace([{3, 2}, {1}])
    assert layers.resident == [{2, 3}, {1}]
    assert layers.admit(1, 0) == Fetch(0, None, False), "one slot is free"
    layers.replace([{0, 1}, {2, 3}])
    for others in ([{2}], [{2}, {3}, {1}], [], [{0, 1, 2}, {1, 2}], *([] if scope else [[{0, 1, 2}, set()]])):
        with pytest.raises(ValueError, match="residents"):
            layers.replace(others)
        assert layers.resident == [{0, 1}, {2, 3}], "a refused state changes nothing"


def test_a_miss_needed_as_soon_as_the_victim_is_kept_by_belady():
    policy = Belady(4, 2, 1, future=[[0], [1, 2]])
    assert policy.admits(1, 2) and not policy.admits(3, 1) and policy.admits(1, 3)
