"""The planner: residency and lanes, on constructed steps."""

import dataclasses

import pytest
from planner_cases import COSTS, EXPERTS, LAYERS, fetched, one_each, planner, prefetch, prefetching, residents

from hybrimoe_jax.decide.plan import Fetch, Prefetch
from hybrimoe_jax.decide.prefetch.prediction import Prediction
from hybrimoe_jax.decide.systems import SYSTEMS, get_system
from hybrimoe_jax.errors import UserError


def test_hits_run_on_the_device_and_misses_are_placed():
    plan = planner("ktransformers").plan(0, one_each(0, 5), None, 1)
    assert (plan.hits, plan.misses, plan.device, plan.cpu) == ((0,), (5,), (0,), (5,))
    assert plan.makespan == pytest.approx(max(0.5 + 0.5, 2.0 + 0.5 + 0.5))


def test_a_kept_fetch_takes_the_victims_place_at_once():
    p = planner("on-demand")
    p.plan(0, one_each(1), None, 1)
    plan = p.plan(0, one_each(6), None, 1)
    assert plan.fetch == (Fetch(6, victim=0, stream=False),)
    assert p.resident(0) == {1, 6}


def test_a_free_slot_is_used_before_anything_is_evicted():
    p = planner("on-demand", cold=True)
    plan = p.plan(0, one_each(6, 7), None, 1)
    assert plan.fetch == (Fetch(6, None, False), Fetch(7, None, False))
    assert not p.resident(1) and not p.resident(2)


def test_a_step_larger_than_the_cache_streams_the_rest():
    p = planner("on-demand", slots=2)
    plan = p.plan(0, one_each(0, 3, 4, 5), None, 1)
    assert [f.expert for f in plan.fetch] == [3, 4, 5]
    assert plan.fetch[0].victim == 1 and not plan.fetch[0].stream
    assert all(f.stream and f.victim is None for f in plan.fetch[1:])
    assert p.resident(0) == {0, 3}


def test_device_only_never_keeps_what_it_streams():
    p = planner("device-only")
    for _ in range(3):
        plan = p.plan(0, one_each(0, 5), None, 1)
        assert plan.fetch == (Fetch(5, None, True),) and p.resident(0) == {0, 1}


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_every_system_works_with_no_slots_and_with_all(system, ratio):
    slots = get_system(system).slots_per_layer(ratio, LAYERS, EXPERTS)
    p = planner(system, slots=slots)
    plan = p.plan(0, one_each(2, 7), None, 1)
    assert sorted([*plan.device, *fetched(plan), *plan.cpu]) == [2, 7]
    if ratio == 1.0 and system != "cpu-only":
        assert plan.hits == (2, 7) and not plan.fetch
    if ratio == 0.0:
        assert all(f.stream for f in plan.fetch) and not p.resident(0)


def test_pooled_slots_go_to_whoever_was_used_last():
    """Six slots, warm with the most frequent experts of all layers.

    The oldest use of all makes room, whichever layer's.
    """
    frequencies = [[9, 8, 7, 6, 0, 0, 0, 0], [5, 4, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]
    p = planner("on-demand", scope="pooled", frequencies=frequencies)
    assert residents(p) == [{0, 1, 2, 3}, {0, 1}, set()]
    p.plan(0, one_each(0, 1), None, 1)
    assert p.plan(1, one_each(0, 7), None, 1).fetch == (Fetch(7, (0, 2), False),)
    assert p.plan(2, one_each(4, 5), None, 1).fetch == (Fetch(4, (0, 3), False), Fetch(5, (1, 1), False))
    p.finish_step()
    assert p.plan(0, one_each(6, 7), None, 1).fetch == (Fetch(6, (0, 0), False), Fetch(7, (0, 1), False))
    assert [sorted(p.resident(layer)) for layer in range(LAYERS)] == [[6, 7], [0, 7], [4, 5]]


def test_pooled_slots_keep_what_the_running_layer_needs_and_what_was_brought_for_a_coming_one():
    p = planner("hybrimoe", slots=1, scheduler="fetch-misses", cache="lru", guard="none", scope="pooled", cold=True)
    p.plan(0, one_each(0, 1), None, 1)
    assert prefetch(p, 0, [Prediction(one_each(6))]) == (Prefetch(1, 6, 1),)
    assert p.landed(1, 6) is None, "three slots, two of them used"
    p.plan(0, one_each(2, 3), None, 1)
    assert [sorted(p.resident(layer)) for layer in range(LAYERS)] == [[2, 3], [6], []]
    assert p.plan(0, one_each(2, 3, 4), None, 1).fetch == (Fetch(4, None, True),), "all three slots are spoken for"


@pytest.mark.parametrize("cache", ["slru", "s3-fifo"])
def test_policies_whose_values_do_not_compare_cannot_share_slots(cache):
    with pytest.raises(UserError, match="cannot share slots"):
        planner("hybrimoe", cache=cache, scope="pooled")


def test_doubling_the_cpu_cost_changes_the_plan():
    loads = one_each(2, 3, 4, 5)
    measured = planner().plan(0, loads, None, 1)
    slower = planner(costs=COSTS.scaled(cpu=2.0)).plan(0, loads, None, 1)
    assert len(slower.cpu) < len(measured.cpu) and len(slower.fetch) > len(measured.fetch)


def test_frequencies_choose_the_first_residents():
    frequencies = [[0, 0, 5, 0, 0, 0, 0, 9]] * LAYERS
    for system in ("ktransformers", "hybrimoe"):
        assert residents(planner(system, frequencies=frequencies)) == [{7, 2}] * LAYERS


def test_a_static_placement_is_loaded_even_from_cold():
    assert residents(planner("ktransformers", cold=True)) == [{0, 1}] * LAYERS


def test_parts_can_be_replaced_one_by_one():
    p = planner("hybrimoe", cache="lfu:decay=0.9", scheduler="cpu-misses", prefetch="none")
    assert p.policies[0].decay == 0.9
    assert p.plan(0, one_each(4), None, 1).cpu == (4,)
    assert prefetch(p, 0, [Prediction(one_each(5), None)]) == ()


def test_the_shared_experts_of_several_tokens_are_charged_for_all_of_them():
    """Even where each expert has a single one, which is remembered for steps of one token only."""
    p = planner("ktransformers", costs=dataclasses.replace(COSTS, shared_token=1.0))
    plans = [p.plan(0, one_each(0, 1), None, tokens) for tokens in (1, 2, 1)]
    assert [plan.schedule.device_seconds for plan in plans] == [1.5 + 1.0, 2.5 + 1.0, 1.5 + 1.0]


@pytest.mark.parametrize("now, link_seconds", [(None, 2.0), (6.0, 2.0), (5.0, 3.0)])
def test_a_demand_fetch_waits_for_those_of_the_layer_before(now, link_seconds):
    """Three of 2 s each from 0 s on; by the cost model the next layer starts at 10.5 s."""
    p = planner("on-demand")
    p.plan(0, one_each(2, 3, 4), None, 1)
    assert p.plan(1, one_each(5), None, 1, now=now).schedule.link_seconds == link_seconds


def test_the_next_layer_starts_when_this_one_and_what_lies_between_are_done():
    p = prefetching()
    p.plan(0, one_each(0), None, 1, now=100.0)  # 1 s, and 4 s until the next
    prefetch(p, 0, [Prediction(one_each(6))])
    p.plan(0, one_each(0), None, 1)
    assert prefetch(p, 0, [Prediction({}), Prediction(one_each(6))])
    assert [p.under_way(), p._inflight.link_left] == [[(1, 6), (2, 6)], 2.5]
    assert p.plan(2, one_each(6), None, 1, now=106.0).schedule.device_seconds == 1.5 + 0.5


def test_totals_count_every_expert_of_every_layer_once():
    p = planner("on-demand")
    p.plan(0, one_each(0, 3, 4, 5), None, 1)
    c = p.counters
    assert (c.steps, c.activated, c.hits, c.misses, c.device, c.cpu, c.fetched, c.streamed) == (1, 4, 1, 3, 4, 0, 3, 2)
    p = planner("ktransformers")
    p.plan(0, one_each(0, 1, 5), None, 1)
    assert (p.counters.hits, p.counters.device, p.counters.cpu, p.counters.fetched) == (2, 2, 1, 0)


def test_a_step_broken_off_leaves_nothing_under_way():
    p = prefetching()
    p.plan(0, one_each(0), None, 1)
    prefetch(p, 0, [Prediction(one_each(5, 6))])
    assert p.under_way() == [(1, 5), (1, 6)]
    p.abandon_step()
    assert not p.under_way() and p._inflight.link_left == 0
    p.plan(1, one_each(5), None, 1)
    assert p.accuracy.predicted[1] == 0, "what was predicted of the step broken off says nothing of another"
    p.abandon_step()
    assert p.prefetch(0, None) == (), "nothing is planned"
    p.plan(0, one_each(0), None, 1)
    assert len(prefetch(p, 0, [Prediction(one_each(5, 6))])) == 2


@pytest.mark.parametrize("host, fetched", [(2.9, 1), (3.0, 0)])
def test_nothing_is_fetched_where_issuing_takes_as_long_as_the_expert_on_the_cpu(host, fetched):
    """Load 2 takes the CPU 3 s."""
    costs = dataclasses.replace(COSTS, cpu_first=9.0, fetch_host=host)
    plan = planner("hybrimoe", costs=costs).plan(0, {5: 2}, None, 2)
    assert len(plan.fetch) == fetched
    assert len(planner("on-demand", costs=costs).plan(0, {5: 2}, None, 2).fetch) == 1, "the CPU computes nothing"


@pytest.mark.parametrize("first, kept", [(1.0, True), (0.9, False)])
def test_residents_are_kept_where_the_device_is_done_no_later_than_the_cpu_with_its_first(first, kept):
    """Two experts on the device are done at 1.5 s."""
    p = planner("hybrimoe", costs=dataclasses.replace(COSTS, cpu_expert=0.0, cpu_first=first))
    assert p.keeps_residents(1) is kept and not p.keeps_residents(2)
    assert planner("ktransformers").keeps_residents(9)


def test_arrays_are_accepted_for_scores():
    numpy = pytest.importorskip("numpy")
    scores = numpy.linspace(0, 1, EXPERTS, dtype=numpy.float32)
    a, b = planner(), planner()
    assert a.plan(0, one_each(3), scores, 1) == b.plan(0, one_each(3), [float(s) for s in scores], 1)
    prefetch(a, 0, [Prediction(one_each(4), scores)])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: planner(slots=[1, 2]), "slots for 2 layers"),
        (lambda: planner(slots=9), "9 slots"),
        (lambda: planner(frequencies=[[1] * EXPERTS]), "frequencies of 1 layers"),
        (lambda: planner(max_in_flight=-1), "max_in_flight -1"),
        (lambda: planner().plan(3, one_each(0), None, 1), "layer 3"),
        (lambda: planner().plan(0, {8: 1}, None, 1), "experts are 0..7"),
        (lambda: planner().plan(0, {1: 0}, None, 1), "loads above 0"),
        (lambda: planner().plan(0, one_each(0), [0.5], 1), "1 scores for 8"),
        (lambda: planner().plan(0, one_each(0), None, 0), "0 tokens"),
    ],
)
def test_what_cannot_be_is_one_clear_error(call, message):
    with pytest.raises(UserError, match=message):
        call()
