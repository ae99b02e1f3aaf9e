"""Systems: what each name stands for, how slots are shared out, and overrides."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrimoe_jax.decide.systems import SYSTEMS, check_lookahead, get_system
from hybrimoe_jax.errors import UserError


def test_every_system_of_the_issue_is_there():
    assert set(SYSTEMS) == {
        "hybrimoe",
        "ktransformers",
        "adapmoe",
        "llamacpp",
        "fiddler",
        "powerinfer",
        "freetoken",
        "on-demand",
        "cpu-only",
        "device-only",
    }


def test_which_lanes_each_may_use():
    assert {name for name, s in SYSTEMS.items() if not s.uses_cpu} == {"adapmoe", "on-demand", "device-only"}
    assert {name for name, s in SYSTEMS.items() if not s.fetches} == {
        "ktransformers",
        "llamacpp",
        "powerinfer",
        "cpu-only",
    }


def test_slots_are_the_floor_of_the_ratio_in_each_layer():
    hybrimoe = get_system("hybrimoe")
    assert hybrimoe.slots_per_layer(0.3, 4, 8) == [2, 2, 2, 2]
    assert hybrimoe.slots_per_layer(0.29, 1, 100) == [29]  # not 28, which binary fractions would make it
    assert hybrimoe.slots_per_layer(0.0, 2, 8) == [0, 0] and hybrimoe.slots_per_layer(1.0, 2, 8) == [8, 8]


def test_llamacpp_holds_whole_layers_the_last_first():
    assert get_system("llamacpp").slots_per_layer(0.5, 5, 8) == [0, 0, 0, 8, 8]


def test_the_most_popular_have_slots_then_the_earlier_layers_and_the_lower_ids():
    frequencies = [[5, 1, 5], [5, 9, 0]]
    assert [get_system("fiddler").slots_for_total(n, 2, 3, frequencies) for n in (1, 3, 4)] == [[0, 1], [2, 1], [2, 2]]
    assert get_system("fiddler").slots_for_total(5, 2, 3) == [2, 2], "unknown: as many in each"


@pytest.mark.parametrize(
    "lookahead, known", [(0, True), (8, True), (9, False), (-1, False), ("adaptive", True), ("8", False)]
)
def test_a_lookahead_is_of_eight_layers_at_most(lookahead, known):
    with contextlib.nullcontext() if known else pytest.raises(UserError, match=r'outside 0\.\.8|must be "adaptive"'):
        check_lookahead(lookahead)


def test_cpu_only_has_no_slots():
    assert get_system("cpu-only").slots_per_layer(1.0, 3, 8) == [0, 0, 0]


@given(st.sampled_from(sorted(SYSTEMS)), st.floats(0, 1), st.integers(1, 40), st.integers(1, 128))
def test_no_system_takes_more_than_its_share(name, ratio, layers, experts):
    slots = get_system(name).slots_per_layer(ratio, layers, experts)
    assert len(slots) == layers and all(0 <= s <= experts for s in slots)
    assert sum(slots) <= ratio * layers * experts + 1e-6


@given(st.sampled_from(sorted(SYSTEMS)), st.integers(0, 5000), st.integers(1, 40), st.integers(1, 128))
def test_a_total_is_never_exceeded(name, total, layers, experts):
    slots = get_system(name).slots_for_total(total, layers, experts)
    assert len(slots) == layers and sum(slots) <= total and all(0 <= s <= experts for s in slots)


def test_pooled_slots_are_all_that_fit():
    freetoken = get_system("freetoken")
    assert freetoken.slots_for_total(11, 3, 8) == [4, 4, 3] and freetoken.slots_for_total(99, 3, 8) == [8, 8, 8]
    assert freetoken.slots_per_layer(0.3, 4, 8) == [2, 2, 2, 2]
    assert get_system("hybrimoe").override(scope="pooled").scope == "pooled"
    with pytest.raises(UserError, match="cache scope 'model'"):
        freetoken.override(scope="model")


def test_override_replaces_one_part():
    changed = get_system("hybrimoe").override(cache="lru")
    assert (changed.cache, changed.scheduler, changed.lookahead) == ("lru", "paper", 3)
    assert get_system("hybrimoe").override() == SYSTEMS["hybrimoe"]


def test_override_of_the_prefetcher_brings_its_lookahead():
    assert get_system("on-demand").override(prefetch="impact").lookahead == 3
    assert get_system("on-demand").override(prefetch="next-layer").lookahead == 1
    assert get_system("hybrimoe").override(prefetch="none").lookahead == 0
    assert get_system("hybrimoe").override(lookahead=0).lookahead == 0
    assert get_system("hybrimoe").override(prefetch="next-layer").lookahead == 1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: get_system("magic"), "'magic' is unknown.*hybrimoe"),
        (lambda: get_system("hybrimoe").override(cache="magic"), "cache policy 'magic'"),
        (lambda: get_system("hybrimoe").override(scheduler="magic"), r"scheduler 'magic' is unknown.*paper, released"),
        (lambda: get_system("hybrimoe").override(prefetch="magic"), "prefetch 'magic'"),
        (lambda: get_system("hybrimoe").override(guard="magic"), "guard 'magic'"),
        (lambda: get_system("hybrimoe").override(lookahead=-1), "lookahead -1"),
        (lambda: get_system("hybrimoe").slots_per_layer(1.5, 2, 8), "ratio 1.5"),
        (lambda: get_system("hybrimoe").slots_for_total(-1, 2, 8), "-1 slots"),
    ],
)
def test_what_cannot_be_is_one_clear_error(build, message):
    with pytest.raises(UserError, match=message):
        build()
