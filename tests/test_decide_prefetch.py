"""Prefetch: prediction, measured accuracy, impact, and the guards on what is moved and when."""

import dataclasses
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrimoe_jax.decide.prefetch.impact import TRIALS, Forecast, Target, choose_by_impact, choose_next_layer
from hybrimoe_jax.decide.prefetch.prediction import Accuracy, Prediction, predict
from hybrimoe_jax.decide.schedule import Problem, get_scheduler
from hybrimoe_jax.machine.costs import CostModel

FREE = float("-inf")


def costs(cpu=4.0, device=1.0, transfer=3.0, layer=10.0, cpu_token=0.0) -> CostModel:
    return CostModel(
        cpu_expert=cpu,
        cpu_token=cpu_token,
        cpu_first=0.0,
        device_expert=device,
        device_token=0.0,
        shared_base=0.0,
        shared_token=0.0,
        layer_base=layer,
        layer_token=0.0,
        transfer_latency=0.0,
        bandwidth=1.0 / transfer,
        bandwidth_cpu_busy=1.0 / transfer,
        expert_bytes=1,
    )


def target(distance, loads, present=(), scores=None, openings=(FREE,) * 8, worth=lambda e: 0.0) -> Target:
    return Target(distance, distance, Prediction(loads, scores), set(present), lambda: list(openings), worth)


def choose(targets, *, model=None, rule="paper", accuracy=None, until_next=10.0, link_free=0.0, room=8):
    forecast = Forecast(get_scheduler(rule), model or costs())
    accuracy = accuracy or Accuracy(3)
    chosen = choose_by_impact(
        targets, forecast, accuracy, tokens=1, until_next=until_next, link_free=link_free, room=room
    )
    return [(t.distance, expert) for t, expert in chosen]


def test_predict_takes_the_top_k_of_each_token_and_the_mean_score():
    loads, scores = predict([[0.5, 0.3, 0.1, 0.1], [0.1, 0.4, 0.1, 0.4]], top_k=2)
    assert loads == {0: 1, 1: 2, 3: 1}
    assert scores == pytest.approx([0.3, 0.35, 0.1, 0.25])


def test_predict_takes_one_token_and_arrays_too():
    numpy = pytest.importorskip("numpy")
    rows = numpy.array([[0.1, 0.2, 0.7]], dtype=numpy.float32)
    assert predict(rows, 1).loads == predict(rows[0], 1).loads == predict([0.1, 0.2, 0.7], 1).loads == {2: 1}
    assert predict([], 2).loads == {}


def test_predict_prefers_the_lower_id_between_equals():
    assert set(predict([0.25] * 4, 2).loads) == {0, 1}
    assert set(predict([[0.1, 0.2, 0.3, 0.2]], 2).loads) == {1, 2}


def test_candidates_come_by_load_then_score_then_id():
    loads, scores = {7: 1, 2: 1, 5: 1, 3: 2, 6: 1, 1: 1}, [0.0, 0.0, 0.1, 0.0, 0.0, 0.1, 0.3, 0.1]
    assert target(1, loads, present={1}, scores=scores).candidates() == [3, 6, 2, 5, 7]
    assert target(1, loads, present={1}).candidates() == [3, 2, 5, 6, 7]
    assert target(1, {5: 1, 2: 3}).candidates() == [2, 5]
    assert [e for _, e in choose_next_layer(target(1, loads, scores=scores), room=9)] == [6, 2, 5, 7, 1, 3]


def test_accuracy_starts_at_a_half_and_follows_the_measurements():
    accuracy = Accuracy(2)
    assert accuracy.probability(1) == 0.5
    accuracy.update(1, {1, 2, 3, 4}, {1, 2, 3, 9})
    assert (accuracy.predicted[1], accuracy.came_true[1], accuracy.probability(1)) == (4, 3, 4 / 6)
    accuracy.update(1, {5}, {5})
    assert accuracy.probability(1) == (0.99 * 3 + 1 + 1) / (0.99 * 4 + 1 + 2)
    for _ in range(200):
        accuracy.update(1, {1, 2, 3, 4}, {1, 2, 3})
        accuracy.update(2, {1, 2}, {7})
    assert accuracy.probability(1) == pytest.approx(0.75, abs=0.01)
    assert accuracy.probability(2) < 0.02


def test_accuracy_forgets():
    accuracy = Accuracy(1, decay=0.9)
    for _ in range(100):
        accuracy.update(1, {1}, {1})
    for _ in range(50):
        accuracy.update(1, {1}, {2})
    assert accuracy.probability(1) < 0.15


loads_lists = st.lists(st.integers(1, 20), max_size=6)


@given(loads_lists, loads_lists, st.sampled_from(["paper", "released", "cpu-misses", "fetch-misses"]))
def test_an_outlook_is_what_the_scheduler_says_whatever_the_ids(here, absent, rule):
    model = costs(cpu_token=0.37)
    forecast = Forecast(get_scheduler(rule), model)
    loads = {30 - i: load for i, load in enumerate(absent)} | {i: load for i, load in enumerate(here)}
    schedule = get_scheduler(rule).schedule(Problem(loads, set(range(len(here))), model, 4))
    for _ in range(2):  # computed, then remembered
        outlook = forecast.outlook(here[::-1], absent, 4)
        assert (outlook.makespan, outlook.link) == pytest.approx((schedule.makespan, schedule.link_seconds))


def test_an_outlook_depends_on_the_tokens_through_the_shared_experts():
    forecast = Forecast(get_scheduler("cpu-misses"), dataclasses.replace(costs(), shared_token=1.0))
    assert [forecast.outlook([1], [], tokens).makespan for tokens in (1, 5)] == [2.0, 6.0]


def test_the_misses_that_gain_most_are_chosen():
    """CPU time grows with the load, so moving the heavy miss shortens the layer and moving the light one does not."""
    model = costs(cpu=0.0, cpu_token=1.0, transfer=6.0)
    assert choose([target(1, {0: 5, 1: 1})], model=model, room=1) == [(1, 0)]


def test_nothing_is_chosen_without_a_gain():
    slow_device = costs(device=50.0)
    assert choose([target(1, {0: 1, 1: 1}, present={0})], model=slow_device, rule="cpu-misses") == []
    assert choose([target(1, {0: 1, 1: 1}, present={0, 1})]) == []
    assert choose([target(1, {})]) == []


@pytest.mark.parametrize("loads, sent", [((12, 11, 1), [(1, 2)]), ((12, 12, 11, 1), [(1, 3)]), ((12, 11, 10, 1), [])])
def test_a_candidate_of_each_of_the_three_highest_loads_is_tried(loads, sent):
    """The CPU takes 10 s for any; the device 4 s a token, so that only the light expert is worth moving."""
    model = dataclasses.replace(costs(cpu=10.0, device=0.0), device_token=4.0)
    assert choose([target(1, dict(enumerate(loads)))], model=model, rule="cpu-misses", room=1) == sent


def chosen_by_definition(targets, model, rule, accuracy, tokens, until_next, link_free, room):
    """One after the other whatever shortens its layer most, weighed by how often predictions at its distance come true.

    Between equals the nearer layer, then the higher load, then the lower id. A layer begins when those before it are
    done, its transfers must land by then, and before any nearer layer begins that fetches by itself.
    """

    def times(target, there):
        loads, there = target.prediction.loads, target.present | there
        found = get_scheduler(rule).schedule(Problem(loads, there, model, tokens))
        return found.makespan, found.fetch

    starts, quiet, deadlines = until_next, float("inf"), {}
    for each in targets:
        deadlines[each.distance] = min(starts, quiet)
        makespan, fetches = times(each, set())
        quiet = min(quiet, starts) if fetches else quiet
        starts += makespan + model.layer(tokens)
    chosen, closed = {each.distance: [] for each in targets}, set()
    while sum(map(len, chosen.values())) < room:
        options = []
        for each in targets:
            loads, mine = each.prediction.loads, chosen[each.distance]
            places = each.openings()[len(mine) :]
            left = sorted(set(loads) - each.present - {*mine}, key=lambda e: (-loads[e], e))
            left = [e for e in left if places and each.worth(e) >= places[0] and each.distance not in closed]
            for expert in left:
                if loads[expert] in sorted({loads[e] for e in left})[-TRIALS:]:
                    gain = times(each, {*mine})[0] - times(each, {*mine, expert})[0]
                    options.append((-gain * accuracy.probability(each.distance), each.distance, -loads[expert], expert))
        least, distance, _, expert = min(options, default=(0.0, 0, 0, 0))
        if least >= 0:
            break
        queue = sorted([distance, *(d for d, some in chosen.items() for _ in some)])
        if any(link_free + (i + 1) * model.transfer(True) > deadlines[d] for i, d in enumerate(queue)):
            closed.add(distance)
        else:
            chosen[distance].append(expert)
    return [(distance, expert) for distance, some in chosen.items() for expert in some]


def test_the_choice_is_the_greedy_one_by_definition():
    """Times are multiples of an eighth, so that equal gains are equal."""
    generator, sizes = random.Random(0), set()
    for number in range(150):
        whole, rule = generator.randrange, generator.choice(["paper", "cpu-misses", "fetch-misses"])
        model = dataclasses.replace(
            costs(whole(9), whole(1, 9) / 8, 2.0 ** whole(-2, 3), whole(6), whole(9) / 8), device_token=whole(9) / 8
        )
        targets, most = [], generator.choice([1, 1, 3, 9])
        for distance in range(1, whole(2, 5)):
            loads = {e: whole(1, most + 1) for e in generator.sample(range(12), whole(1, 7))}
            openings = [FREE] * whole(3) + [0.5] * whole(5)
            present = set(generator.sample(range(12), whole(5)))
            targets.append(target(distance, loads, present, None, openings, lambda e: (e % 4) * 0.25))
        accuracy = Accuracy(4)
        if number % 2:
            accuracy.update(1, {1, 2}, {3})  # predictions at distance 1 come true less often
        limits = {"until_next": whole(40) / 4, "link_free": whole(8) / 4, "room": whole(1, 6)}
        forecast = Forecast(get_scheduler(rule), model)
        found = choose_by_impact(targets, forecast, accuracy, tokens=2, **limits)
        found = [(each.distance, expert) for each, expert in found]
        assert found == chosen_by_definition(targets, model, rule, accuracy, 2, **limits)
        sizes.add(len(found))
    assert sizes >= {0, 1, 2, 3, 4}


def test_the_more_probable_distance_wins_at_equal_impact():
    accuracy = Accuracy(2)
    for _ in range(50):
        accuracy.update(1, {1}, {2})
        accuracy.update(2, {1}, {1})
    targets = [target(1, {0: 1}), target(2, {1: 1})]
    assert choose(targets, room=1) == [(1, 0)]
    assert choose(targets, room=1, accuracy=accuracy) == [(2, 1)]


def test_a_transfer_must_land_before_its_layer_starts():
    only = [target(1, {0: 1})]
    assert choose(only, until_next=3.0) == [(1, 0)]
    assert choose(only, until_next=2.9) == []
    assert choose(only, until_next=3.0, link_free=0.5) == []


def test_what_does_not_fit_the_next_layer_may_fit_a_later_one():
    targets = [target(1, {0: 1}), target(2, {1: 1})]
    assert choose(targets, until_next=2.0, rule="cpu-misses") == [(2, 1)]


def test_several_share_the_window_and_nearer_layers_are_sent_first():
    targets = [target(1, {0: 1, 1: 1}), target(2, {2: 1, 3: 1})]
    sent = choose(targets, until_next=6.5, rule="cpu-misses")
    assert sent[:2] == [(1, 0), (1, 1)]
    assert sent == sorted(sent)
    assert choose(targets, until_next=3.5, rule="cpu-misses")[:2] == [(1, 0), (2, 2)]


def test_predicted_demand_fetches_of_a_nearer_layer_are_not_held_up():
    """Layer 2 starts at 12 s or later, but where layer 1 is going to fetch at 1 s the link must be free by then."""
    fetching = target(1, {0: 1, 1: 1, 2: 1}, openings=())
    quiet = target(1, {0: 1, 1: 1, 2: 1}, present={0, 1, 2}, openings=())
    behind = target(2, {3: 1})
    assert choose([fetching, behind], rule="fetch-misses", until_next=1.0) == []
    assert choose([fetching, behind], rule="fetch-misses", until_next=3.0) == [(2, 3)]
    assert choose([quiet, behind], rule="fetch-misses", until_next=1.0) == [(2, 3)]


def test_room_limits_the_number():
    targets = [target(1, {e: 1 for e in range(6)})]
    assert len(choose(targets, until_next=1e9, rule="cpu-misses", room=2)) == 2


def test_a_full_layer_takes_only_as_many_as_may_leave_and_none_hotter():
    many = {e: 1 for e in range(6)}
    assert choose([target(1, many, openings=())], until_next=1e9) == []
    two = target(1, many, openings=(FREE, FREE))
    assert len(choose([two], until_next=1e9, rule="cpu-misses")) == 2
    guarded = target(1, many, openings=(0.5, 0.5), worth=lambda e: 0.1 * e)
    assert choose([guarded], until_next=1e9, rule="cpu-misses") == [(1, 5)]


def test_openings_are_not_asked_for_without_a_candidate():
    def must_not_run():
        raise AssertionError("the eviction order was computed for nothing")

    idle = Target(1, 1, Prediction({0: 1}), {0}, must_not_run, lambda e: 0.0)
    late = Target(1, 1, Prediction({0: 1}), set(), must_not_run, lambda e: 0.0)
    assert choose([idle]) == [] and choose([late], until_next=0.5) == []


def test_next_layer_mode_goes_by_score_alone():
    scores = [0.1, 0.4, 0.2, 0.3]
    wanted = target(1, {0: 9, 1: 1, 2: 1, 3: 1}, present={1}, scores=scores)
    assert [e for _, e in choose_next_layer(wanted, room=2)] == [3, 2]
    assert [e for _, e in choose_next_layer(wanted, room=9)] == [3, 2, 0]
    assert choose_next_layer(target(1, {0: 1}, openings=()), room=2) == []
