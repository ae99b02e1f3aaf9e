"""What callers hand over is checked once, at the door: one line that names the argument, whoever's numbers they are."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest

import hybrimoe_jax
from hybrimoe_jax import EngineConfig, UserError, arguments
from hybrimoe_jax.decide.cache import LFU
from hybrimoe_jax.engine.request import SAMPLING, read_request, read_stop
from hybrimoe_jax.engine.sampling import Sampling
from hybrimoe_jax.machine.profile import load_profile
from hybrimoe_jax.simulate.runs import Runs

ODD = (
    *(None, True, 2.5, float("nan"), float("inf"), -1, 10**30, "x", "", b"x", [], {"a": 1}, object()),
    *(np.float32(0.5), np.float64("nan"), np.array([1, 2]), np.bool_(True), "\ud800", "a\0b", int),
)


@pytest.mark.parametrize("given", [4, 4.0, np.int64(4), np.uint8(4), np.float32(4), np.array(4)])
def test_whole_numbers_are_whole_whoever_made_them(given):
    found = arguments.whole("count", given, 1)
    assert found == 4 and type(found) is int


@pytest.mark.parametrize(
    "given", [True, np.bool_(True), 2.5, None, "4", b"4", float("nan"), np.array([4]), np.float32("inf"), 1j, 0, 2**63]
)
def test_what_is_no_count_is_refused_by_name(given):
    with pytest.raises(UserError, match=r"^count "):
        arguments.whole("count", given, 1)


@pytest.mark.parametrize("given", [True, None, "0.5", float("nan"), float("-inf"), [0.5], 10**400, 1j])
def test_what_is_no_finite_number_is_refused_by_name(given):
    with pytest.raises(UserError, match=r"^share "):
        arguments.number("share", given)
    assert type(arguments.number("share", np.float32(0.5))) is float


@pytest.mark.parametrize("given", ["", "a\0b", "\ud800", 5, None, b"x", "x" * 10_000])
def test_what_is_no_path_is_refused_by_name(given):
    with pytest.raises(UserError, match=r"^out "):
        arguments.path("out", given)


def refused_or_taken(name, make, *given) -> None:
    """Whatever the value, nothing but a UserError of one line, which names the argument."""
    for odd in ODD:
        one(name, make, *given, **{name: odd})


def one(name, make, *given, **odd) -> None:
    try:
        repr(make(*given, **odd))
    except UserError as error:
        assert "\n" not in str(error) and name.replace("_", " ").split()[0] in str(error).replace("_", " ")


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(EngineConfig)])
def test_every_field_of_the_configuration_is_checked(name):
    refused_or_taken(name, EngineConfig)


@pytest.mark.parametrize("name", [*SAMPLING, "seed"])
def test_every_choice_of_sampling_is_checked(name):
    refused_or_taken(name, Sampling)
    chosen = Sampling(**{name: np.float32(1)})
    assert type(getattr(chosen, name)) in (int, float), "what is written as JSON later"


@pytest.mark.parametrize("name", ["cache", "scheduler", "prefetch", "lookahead", "guard", "predictor", "scope"])
def test_every_part_of_a_system_is_checked(name):
    refused_or_taken(name, hybrimoe_jax.system, "mine")


@pytest.mark.parametrize(
    ("given", "call"),
    [
        ("name", lambda odd: hybrimoe_jax.system(None if isinstance(odd, str) else odd)),
        ("runs", lambda odd: hybrimoe_jax.check("nope", runs=odd)),
        ("seed", lambda odd: hybrimoe_jax.check("nope", seed=odd)),
        ("trace", lambda odd: hybrimoe_jax.open_trace(odd)),
        ("checkpoint", lambda odd: hybrimoe_jax.load("/nowhere" if odd is None else odd)),
        ("options", lambda odd: hybrimoe_jax.load("/nowhere", odd)),
        ("machine", lambda odd: hybrimoe_jax.load("/nowhere", machine=odd)),
        ("jobs", lambda odd: hybrimoe_jax.replay("/nowhere", jobs=odd)),
        ("machine", lambda odd: hybrimoe_jax.replay("/nowhere", machine=odd)),
        ("ratios", lambda odd: hybrimoe_jax.replay("/nowhere", ratios=odd)),
        ("systems", lambda odd: hybrimoe_jax.replay("/nowhere", systems=odd)),
        ("starts", lambda odd: hybrimoe_jax.replay("/nowhere", starts=odd)),
        ("prompt_lengths", lambda odd: hybrimoe_jax.replay("/nowhere", prompt_lengths=odd)),
        ("prompts", lambda odd: hybrimoe_jax.replay("/nowhere", prompts=odd)),
        ("steps", lambda odd: hybrimoe_jax.replay("/nowhere", steps=odd)),
        ("shape", lambda odd: hybrimoe_jax.replay("/nowhere", shape=odd)),
        ("rounds", lambda odd: hybrimoe_jax.compare("/nowhere", against=(), rounds=odd)),
        ("budget", lambda odd: hybrimoe_jax.compare("/nowhere", against=(), budget=odd)),
        ("systems", lambda odd: hybrimoe_jax.compare("/nowhere", against=(), systems=odd)),
    ],
)
def test_nothing_but_a_user_error_leaves_an_entry(given, call):
    for odd in ODD:
        with pytest.raises((UserError, hybrimoe_jax.RuleError)) as refused:
            call(odd)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: EngineConfig(cache_ration=0.5), r"EngineConfig has no 'cache_ration' \(did you mean cache_ratio\?\)"),
        (lambda: Sampling(temperatur=1), "Sampling has no 'temperatur' .did you mean temperature"),
        (lambda: hybrimoe_jax.load("/nowhere", cach="lru"), "EngineConfig has no 'cach' .did you mean cache"),
        (lambda: hybrimoe_jax.compare("/nowhere", cach="lru"), "EngineConfig has no 'cach'"),
        (lambda: hybrimoe_jax.replay("/nowhere", cach="lru"), "replay has no 'cach' .did you mean cache"),
        (lambda: hybrimoe_jax.system("mine", cach="lru"), "system 'mine' has no part 'cach' .did you mean cache"),
        (lambda: hybrimoe_jax.system("mine", cache=LFU(decy=1)), "cache lfu has no parameter 'decy' .did you mean dec"),
        (lambda: Runs([{"hits": 1}]).where(hit=1), "a run has no entry 'hit' .did you mean hits"),
        (lambda: load_profile("a6000-paper").changed(link=2), "a machine profile has no figure 'link' .known: "),
        (lambda: read_request(Asked(), [1], max_tokens=3), "generate has no 'max_tokens' .did you mean max_new_tokens"),
        (
            lambda: EngineConfig(**{"\x1b" * 10**6: 1}),
            r"no '\\x1b.*\(1,000,000 characters\) \(known: system",
        ),
    ],
)
def test_an_unknown_name_is_named_beside_the_one_that_was_meant(call, said):
    with pytest.raises(UserError, match=said) as refused:
        call()
    assert len(str(refused.value)) < 1600


class Asked:
    """All that a request asks of an engine before its names are checked."""


def test_more_threads_than_a_machine_has_are_refused():
    fine = 8 * (os.cpu_count() or 1)
    assert EngineConfig(threads=fine).threads == fine
    with pytest.raises(UserError, match=r"threads 100000: this machine has \d+ cores"):
        EngineConfig(threads=100_000)


@pytest.mark.parametrize(("given", "words"), [("###", ("###",)), (["a", "b"], ("a", "b")), (None, ()), ((), ())])
def test_a_text_is_one_stop_string(given, words):
    assert read_stop(given) == words


@pytest.mark.parametrize("given", ["", ["x", ""], [5], 5, b"x", [None], {"a": 1}])
def test_what_would_stop_at_anything_is_refused(given):
    with pytest.raises(UserError, match="stop"):
        read_stop(given)
