"""Prefetches under way: what starts, what lands, whom it may push out, and how they are counted."""

import numpy as np
import pytest
from planner_cases import COSTS, EXPERTS, one_each, planner, prefetch, prefetching

from hybrimoe_jax.decide.plan import REFUSED, Fetch, Prefetch
from hybrimoe_jax.decide.planner import Planner
from hybrimoe_jax.decide.prefetch.prediction import Prediction, RouterOutlook, predict


def test_a_prefetch_that_lands_in_time_is_useful():
    p = prefetching()
    p.plan(0, one_each(0), None, 1)
    assert prefetch(p, 0, [Prediction(one_each(6))]) == (Prefetch(layer=1, expert=6, distance=1),)
    assert p.landed(1, 6) == 0 and p.resident(1) == {1, 6}
    plan = p.plan(1, one_each(6), None, 1)
    assert (plan.hits, plan.device, plan.useful, plan.late, plan.wasted) == ((6,), (6,), (6,), (), ())
    p.finish_step()
    assert (p.counters.prefetch_issued, p.counters.prefetch_useful, p.counters.prefetch_wasted) == (1, 1, 0)


def test_a_prefetch_still_on_the_link_is_awaited_and_late():
    p = prefetching()
    p.plan(0, one_each(0), None, 1)
    prefetch(p, 0, [Prediction(one_each(6))])
    plan = p.plan(1, one_each(6), None, 1)
    assert (plan.awaited, plan.late, plan.misses, plan.cpu) == ((Fetch(6, 0, False),), (6,), (6,), ())
    assert p.resident(1) == {1, 6}
    p.finish_step()
    assert (p.counters.prefetch_late, p.counters.prefetch_wasted) == (1, 0)
    with pytest.raises(ValueError, match="no prefetch of expert 6"):
        p.landed(1, 6)


def test_a_prefetch_of_what_is_not_asked_for_is_wasted():
    p = prefetching()
    p.plan(0, one_each(0), None, 1)
    prefetch(p, 0, [Prediction(one_each(6))])
    p.landed(1, 6)
    assert p.plan(1, one_each(1), None, 1).wasted == (6,)
    p.finish_step()
    assert (p.counters.prefetch_issued, p.counters.prefetch_wasted) == (1, 1)


def test_a_wasted_prefetch_that_lands_after_its_step_may_still_take_a_slot():
    p = prefetching()
    p.plan(0, one_each(0), None, 1)
    prefetch(p, 0, [Prediction(one_each(6))])
    assert p.plan(1, one_each(1), None, 1).wasted == (6,)
    p.finish_step()
    assert p.landed(1, 6) == 0 and p.resident(1) == {1, 6}
    p.plan(1, one_each(6), None, 1)
    assert (p.counters.prefetch_wasted, p.counters.prefetch_useful) == (1, 0)  # judged once


def test_a_step_cut_short_closes_its_prefetches():
    p = prefetching()
    p.plan(0, one_each(0), None, 1)
    prefetch(p, 0, [Prediction({}), Prediction(one_each(6, 7))])
    p.landed(2, 6)
    p.finish_step()
    assert (p.counters.prefetch_issued, p.counters.prefetch_wasted) == (2, 2)


def test_prefetches_under_way_are_limited_and_never_repeated():
    p = prefetching(max_in_flight=1)
    p.plan(0, one_each(0), None, 1)
    assert len(prefetch(p, 0, [Prediction(one_each(5, 6))])) == 1
    p.plan(0, one_each(0), None, 1)
    assert prefetch(p, 0, [Prediction(one_each(5, 6))]) == ()
    p.landed(1, 5)
    assert prefetch(p, 0, [Prediction(one_each(5, 6))]) == (Prefetch(1, 6, 1),)


def test_a_landing_evicts_nothing_that_the_step_needs_or_expects():
    p = prefetching(slots=2)
    p.plan(0, one_each(0), None, 1)
    assert prefetch(p, 0, [Prediction(one_each(0, 1, 6))]) == ()  # both residents are predicted
    assert prefetch(p, 0, [Prediction(one_each(0, 6))]) == (Prefetch(1, 6, 1),)
    assert p.landed(1, 6) == 1  # 0 is expected
    p.finish_step()

    p = prefetching(slots=2)
    p.plan(0, one_each(0), None, 1)
    prefetch(p, 0, [Prediction(one_each(6))])
    p.plan(1, one_each(0, 1), None, 1)
    assert p.landed(1, 6) is REFUSED and p.resident(1) == {0, 1}
    p.finish_step()

    p = prefetching(slots=2)
    p.plan(0, one_each(0), None, 1)
    prefetch(p, 0, [Prediction(one_each(1, 6))])
    p.plan(1, one_each(0), None, 1)
    assert p.landed(1, 6) == 1  # the layer has shown that 1 was expected for nothing

    p = prefetching(slots=2)
    p.plan(0, one_each(0), None, 1)
    prefetch(p, 0, [Prediction(one_each(6))])
    p.plan(1, one_each(0, 1), None, 1)
    assert p.landed(1, 6) is REFUSED
    assert p.counters.prefetch_refused == 1 and p.counters.prefetch_wasted == 1 and not REFUSED


def test_two_landings_in_one_layer_do_not_evict_each_other():
    p = prefetching(slots=2)
    p.plan(0, one_each(0), None, 1)
    assert len(prefetch(p, 0, [Prediction(one_each(5, 6))])) == 2
    p.policies[1].heat[:2] = [0.5, 0.4]
    assert p.landed(1, 5) == 1
    assert prefetch(p, 0, [Prediction(one_each(6))]) == ()  # a newer prediction no longer has 5
    assert p.landed(1, 6) == 0 and p.resident(1) == {5, 6}


def test_no_more_is_sent_to_a_layer_than_may_leave_it():
    p = prefetching(slots=2, max_in_flight=4)
    p.plan(0, one_each(0), None, 1)
    assert len(prefetch(p, 0, [Prediction(one_each(0, 4, 5, 6))])) == 1  # 0 is expected, so only 1 may leave
    assert prefetch(p, 0, [Prediction(one_each(0, 4, 5, 6))]) == ()


def test_waiting_for_a_prefetch_of_an_earlier_step_is_not_late():
    p = prefetching()
    p.plan(0, one_each(0), None, 1)
    prefetch(p, 0, [Prediction(one_each(6))])
    p.plan(1, one_each(1), None, 1)
    p.finish_step()
    plan = p.plan(1, one_each(6), None, 1)
    assert [f.expert for f in plan.awaited] == [6] and plan.late == ()
    assert (p.counters.prefetch_wasted, p.counters.prefetch_late) == (1, 0)


def hot_residents(guard: str) -> Planner:
    p = planner("hybrimoe", scheduler="cpu-misses", guard=guard)
    scores = [0.5, 0.5, 0, 0, 0, 0, 0, 0]
    p.plan(1, one_each(0, 1), scores, 1)
    p.finish_step()
    p.plan(0, one_each(0), scores, 1)
    return p


def test_the_guard_keeps_residents_hotter_than_the_candidate():
    coming = [Prediction(one_each(6), [0, 0, 0, 0, 0, 0, 1.0, 0])]
    assert prefetch(hot_residents("value"), 0, coming) == ()
    assert prefetch(hot_residents("expected"), 0, coming) == (Prefetch(1, 6, 1),)
    assert prefetch(hot_residents("none"), 0, coming) == (Prefetch(1, 6, 1),)


@pytest.mark.parametrize("scope", ["layer", "pooled"])
@pytest.mark.parametrize(("heat", "outcome"), [(0.0, "enters"), (0.1, "is refused")])
def test_the_guard_looks_again_when_the_transfer_lands(scope, heat, outcome):
    """An expert hotter than the prefetched one stays; one that is as hot makes room."""
    p = planner("hybrimoe", scheduler="cpu-misses", guard="value", scope=scope)
    p.plan(0, one_each(0), None, 1)
    assert prefetch(p, 0, [Prediction(one_each(6))])
    for policy in p.policies:
        policy.heat = [0.5 if expert == 6 else 0.5 + heat for expert in range(EXPERTS)]
    assert (p.landed(1, 6) is REFUSED) == (outcome == "is refused")


@pytest.mark.parametrize("mode", ["impact", "next-layer"])
@pytest.mark.parametrize("scope", ["layer", "pooled"])
@pytest.mark.parametrize(("heat", "started"), [(0.0, (Prefetch(1, 6, 1),)), (0.1, ())])
def test_the_guard_starts_nothing_that_is_colder_than_all_residents(mode, scope, heat, started):
    p = planner("hybrimoe", scheduler="cpu-misses", guard="value", scope=scope, prefetch=mode)
    p.plan(0, one_each(0), None, 1)
    for policy in p.policies:
        policy.heat = [0.5 if expert == 6 else 0.5 + heat for expert in range(EXPERTS)]
    assert prefetch(p, 0, [Prediction(one_each(6))]) == started


def test_no_prefetch_into_a_layer_without_slots_or_a_static_one():
    coming = [Prediction(one_each(6))]
    for p in (prefetching(slots=[2, 0, 2]), prefetching(cache="static")):
        p.plan(0, one_each(0), None, 1)
        assert prefetch(p, 0, coming) == ()
    assert [prefetching(slots=slots).depth(1) for slots in ([2, 0, 2], 0)] == [3, 0]


def test_a_busy_link_leaves_no_room_for_a_prefetch():
    idle, busy = (planner("hybrimoe", scheduler="fetch-misses", guard="none") for _ in range(2))
    idle.plan(0, one_each(0), None, 1)
    busy.plan(0, one_each(0, 3, 4, 5, 6, 7), None, 1)
    coming = [Prediction(one_each(6))]
    assert prefetch(idle, 0, coming) == (Prefetch(1, 6, 1),)
    assert len(busy.plan(0, one_each(2, 3, 4, 5, 6, 7), None, 1).fetch) >= 4
    tight = planner("hybrimoe", costs=COSTS.scaled(layer=0.0), scheduler="fetch-misses", guard="none")
    tight.plan(0, one_each(0, 3, 4), None, 1)
    assert prefetch(tight, 0, coming) == ()


def test_adapmoe_prefetches_the_next_layers_misses_by_score():
    p = planner("adapmoe")
    p.plan(0, one_each(0), None, 1)
    coming = predict([0.05, 0.0, 0.1, 0.0, 0.3, 0.0, 0.55, 0.0], 2)
    assert prefetch(p, 0, []) == (), "nothing is known"
    assert prefetch(p, 0, [coming, coming]) == (Prefetch(1, 6, 1), Prefetch(1, 4, 1))


def test_accuracy_is_measured_where_predictions_are_made():
    p = planner("hybrimoe")
    before = p.accuracy.probability(1), p.accuracy.probability(2)
    for _ in range(5):
        p.plan(0, one_each(0), None, 1)
        prefetch(p, 0, [Prediction(one_each(1, 2)), Prediction(one_each(3, 4))])
        p.plan(1, one_each(1, 2), None, 1)
        p.plan(2, one_each(5, 6), None, 1)
        p.finish_step()
    assert p.accuracy.probability(1) > before[0] and p.accuracy.probability(2) < before[1]


@pytest.mark.parametrize("arrival, wait", [(100.5, 2.0), (101.75, 0.75), (102.25, 0.5), (103.0, 0.5)])
def test_the_callers_clock_shortens_what_is_left_of_a_transfer(arrival, wait):
    """It takes 2.5 s from 100 s on, beside the shared experts' 0.5 s."""
    p = prefetching()
    p.plan(0, one_each(0), None, 1, now=100.0)
    prefetch(p, 0, [Prediction(one_each(6))])
    assert p.plan(1, one_each(6), None, 1, now=arrival).makespan == wait + 0.5


def test_a_link_that_is_done_sooner_than_expected_is_free():
    p = planner("hybrimoe", scheduler="fetch-misses", guard="none")
    p.plan(0, one_each(0), None, 1, now=100.0)
    assert prefetch(p, 0, [Prediction(one_each(6))])
    p.landed(1, 6)
    assert p.plan(1, one_each(7), None, 1, now=100.5).schedule.link_seconds == 2.0


def test_after_a_prompt_that_brought_nothing_predicting_is_left_out_for_seven_of_its_kind():
    p = prefetching()
    p.plan(0, {0: 2, 1: 2}, None, 2)
    assert not p.backing_off(2) and prefetch(p, 0, [Prediction(one_each(0))]) == ()
    p.finish_step()
    for left in range(7, 0, -1):
        assert (p.back_off, p.backing_off(2), p.backing_off(1)) == (left, True, False)
        for tokens in (1, 2):  # steps of one token do not count
            p.plan(0, {0: tokens}, None, tokens)
            p.finish_step()
    assert p.back_off == 0 and not p.backing_off(2)
    p.plan(0, {0: 2}, None, 2)
    assert prefetch(p, 0, [Prediction({6: 2})])
    p.finish_step()
    assert p.back_off == 0, "it brought something"
    p = prefetching(max_in_flight=0)
    p.plan(0, {0: 2}, None, 2)
    p.prefetch(0, RouterOutlook(np.array([[0, 1]] * 2)))
    p.finish_step()
    assert p.back_off == 7, "no buffer was free, and so nothing was predicted"


def in_flight():
    """A planner with expert 6 on its way into layer 1; a transfer takes 2.5 s."""
    p = prefetching()
    p.plan(0, {0: 1}, None, 1)
    assert len(prefetch(p, 0, [Prediction({6: 1})])) == 1
    return p, p.counters


def test_the_links_seconds_go_where_the_prefetch_goes():
    p, counters = in_flight()
    p.landed(1, 6)
    p.plan(1, {6: 1}, None, 1)
    assert counters.prefetch_useful_s == 2.5, "nobody measured: the cost model's"

    p, counters = in_flight()
    p.landed(1, 6, 0.125)
    p.plan(1, {1: 1}, None, 1)
    assert (counters.prefetch_useful_s, counters.prefetch_wasted_s) == (0, 0.125)

    p, counters = in_flight()
    p.plan(1, {6: 1}, None, 1, now=0.0)
    assert (counters.prefetch_late_s, counters.prefetch_wait_s) == (2.5, 2.5)
    p.waited(1, 6, 9.0, 0.25)
    assert (counters.prefetch_late_s, counters.prefetch_wait_s) == (9.0, 0.25)

    p, counters = in_flight()
    p.plan(1, {1: 1}, None, 1)
    p.finish_step()
    assert counters.prefetch_wasted == 1 and counters.prefetch_wasted_s == 0, "it is still on the link"
    p.landed(1, 6, 3.0)
    assert counters.prefetch_wasted_s == 3.0

    p, counters = in_flight()
    p.abandon_step()
    assert counters.prefetch_wasted_s == 2.5
