"""What callers hand over is checked once, at the door: one line that names the argument, whoever's numbers they are."""

from __future__ import annotations

import dataclasses
import enum
import numbers
import os

import numpy as np
import pytest

import hybrimoe_jax
from hybrimoe_jax import EngineConfig, UserError, arguments
from hybrimoe_jax.checkpoint.convert import convert, convert_random
from hybrimoe_jax.decide.cache import LFU
from hybrimoe_jax.decide.cache_state import load_state
from hybrimoe_jax.engine.request import SAMPLING, read_request, read_stop
from hybrimoe_jax.engine.sampling import Sampling
from hybrimoe_jax.errors import shown
from hybrimoe_jax.formats.sizes import expert_bytes
from hybrimoe_jax.machine.profile import load_profile
from hybrimoe_jax.records import read_records
from hybrimoe_jax.simulate.runs import Runs
from hybrimoe_jax.text import Tokenizer
from hybrimoe_jax.trace.importers import join_traces
from hybrimoe_jax.trace.timeline import Timeline


class Word(str, enum.Enum):  # noqa: UP042 - StrEnum is the one that does no harm
    """Texts whose `str` is another text."""

    HASHES = "###"
    DENSE = "dense"


class NoValues:
    """A number of an array library that holds no value, as a tensor on torch's device "meta"."""

    dtype, ndim = "torch.int64", 0

    def tolist(self):
        raise RuntimeError("no values")

    def __index__(self):
        raise RuntimeError("no values")

    __float__ = __index__


NUMBERS_IN_DISGUISE = (
    *(np.complex64(4 + 2j), np.str_("4"), np.bytes_(b"4"), np.array("4"), np.void(b"4"), np.timedelta64(4, "ns")),
    *(np.datetime64(4, "ns"), np.array(True, object), np.ma.array(4, mask=True), np.bool_(True), NoValues()),
)
"""Arrays without a dimension, and such, that Python turns into a number when it is asked to."""
ODD = (
    *NUMBERS_IN_DISGUISE,
    *(10**5000, -(10**5000), Word.HASHES, np.array("x"), np.array(0.5), bytearray(b"x"), memoryview(b"x")),
    *(None, True, 2.5, float("nan"), float("inf"), -1, 10**30, "x", "", b"x", [], {"a": 1}, object()),
    *(np.float32(0.5), np.float64("nan"), np.array([1, 2]), np.bool_(True), "\ud800", "a\0b", int),
)


@pytest.mark.parametrize("given", [4, 4.0, np.int64(4), np.uint8(4), np.float32(4), np.array(4)])
def test_whole_numbers_are_whole_whoever_made_them(given):
    found = arguments.whole("count", given, 1)
    assert found == 4 and type(found) is int


@pytest.mark.parametrize(
    "given",
    [*NUMBERS_IN_DISGUISE, True, 2.5, None, "4", b"4", float("nan"), np.array([4]), np.float32("inf"), 1j, 0, 2**63],
)
def test_what_is_no_count_is_refused_by_name(given):
    with pytest.raises(UserError, match=r"^count "):
        arguments.whole("count", given, 1)


@pytest.mark.parametrize(
    "given", [*NUMBERS_IN_DISGUISE, True, None, "0.5", float("nan"), float("-inf"), [0.5], 10**400, 1j]
)
def test_what_is_no_finite_number_is_refused_by_name(given):
    with pytest.raises(UserError, match=r"^share "):
        arguments.number("share", given)
    assert type(arguments.number("share", np.float32(0.5))) is float


@pytest.mark.parametrize("given", [np.float32(1.5), np.float16(1.5), np.array(1.5), np.dtype(">f4").type(1.5), 1.5])
def test_a_number_of_any_width_is_one(given):
    assert arguments.number("share", given) == 1.5


def test_an_array_without_a_dimension_is_one_thing():
    assert read_stop(np.array("###")) == ("###",)
    assert arguments.several("ratios", np.array(0.25), numbers.Real) == [0.25]
    assert arguments.several("ratios", np.float32(0.25), numbers.Real) == [0.25]


def test_an_enumeration_of_texts_is_its_text():
    assert read_stop(Word.HASHES) == read_stop([Word.HASHES]) == ("###",)
    config = EngineConfig(executor=Word.DENSE, vram_budget="1GiB")
    assert (config.executor, type(config.executor)) == ("dense", str)
    assert arguments.path("out", Word.DENSE) == "dense" and "Word" not in shown(Word.DENSE)


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
        ("engine", lambda odd: hybrimoe_jax.stream_generate(odd, "x")),
        ("path", lambda odd: Timeline.read(odd)),
        ("path", lambda odd: load_profile(odd)),
        ("path", lambda odd: load_state(odd)),
        ("path", lambda odd: read_records(odd)),
        ("folder", lambda odd: Tokenizer(odd)),
        ("src", lambda odd: convert(odd, "/nowhere/x")),
        ("dst", lambda odd: convert("/nowhere", odd)),
        ("format", lambda odd: convert("/nowhere", "/nowhere/x", "x" if odd is None else odd)),
        ("config", lambda odd: convert_random(odd, "/nowhere/x")),
        ("traces", lambda odd: join_traces(odd)),
        ("budget", lambda odd: hybrimoe_jax.compare("/nowhere", against=(), budget=odd)),
        ("systems", lambda odd: hybrimoe_jax.compare("/nowhere", against=(), systems=odd)),
    ],
)
def test_nothing_but_a_user_error_leaves_an_entry(given, call, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # some of these texts could be a file's name
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
        (lambda: Runs([{"hits": 1}]).where(hits=np.array([1, 2])), "where: hits is one value"),
        (lambda: expert_bytes(8, 8, "int4-g" + "9" * 5000), "weight format .* is unknown"),
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
