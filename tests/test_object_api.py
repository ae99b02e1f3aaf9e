"""The engine as a notebook uses it: texts in and out, blocks, recordings, interrupts, several engines."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import hybrimoe_jax
from hybrimoe_jax.engine.request import prompt_ids
from hybrimoe_jax.errors import UserError


class Letters:
    """A tokenizer of one id a character; digits are characters like others."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 96 for letter in text]

    def decode(self, ids) -> str:
        return "".join(chr(97 + token % 26) for token in ids)


@pytest.fixture(scope="module")
def engine():
    with tiny.engine(cache_ratio=0.5, tokenizer=Letters()) as engine:
        yield engine


class Table:
    """What a DataFrame is to a stranger: an array to NumPy, and the names of its columns to who walks through it."""

    def __init__(self, rows):
        self.rows = rows

    def __array__(self, dtype=None, copy=None):
        if self.rows is None:
            raise RuntimeError("no values")
        return np.array(self.rows, object)

    def __iter__(self):
        return iter(["text"])


@pytest.mark.parametrize(
    ("given", "ids"),
    [
        ("1603", [[49, 54, 48, 51]]),
        (["1603", "a"], [[49, 54, 48, 51], [1]]),
        ([1, 6, 0, 3], [[1, 6, 0, 3]]),
        ((np.int64(1), np.int32(2)), [[1, 2]]),
        (range(3), [[0, 1, 2]]),
        (np.array([[1, 2], [3, 4]], np.int32), [[1, 2], [3, 4]]),
        ([np.array([5]), [6, 7], "a"], [[5], [6, 7], [1]]),
        ([], []),
        ([np.array(3), np.array(4)], [[3, 4]]),
        (Table([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (np.array("1603"), [[49, 54, 48, 51]]),
    ],
)
def test_prompts_are_texts_or_ids(given, ids):
    assert prompt_ids(given, Letters(), 100) == ids


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (7, "7 is neither"),
        (None, "None is neither"),
        (b"My lord", "neither"),
        ([1.5, 2], "prompt 0: 1.5 is neither"),
        ([[1, 2.0]], "prompt 0: 2.0 at place 1"),
        ([1, "a"], "'a' at place 1"),
        ([["a"]], "prompt 0: 'a' at place 0"),
        ([True, 1], "True at place 0"),
        ({"role": "user", "content": "hello"}, "neither"),
        ([{"role": "user", "content": "hello"}], "encode_chat"),
        (bytearray(b"My lord"), "neither"),
        (memoryview(b"My lord"), "neither"),
        ([bytearray(b"My lord")], "prompt 0: .* neither"),
        (np.array([1, 2], "datetime64[ns]"), "prompts: .* cannot be read"),
        ([np.array([1, 2], "timedelta64[ns]")], "prompt 0: .* cannot be read"),
        (np.array([(1, 2)], [("a", int), ("b", int)]), "prompts: .* cannot be read"),
        ([[np.timedelta64(1, "ns")]], "at place 0"),
        (np.ma.array([1, 2], mask=[0, 1]), "None at place 1"),
        (Table([["text"]]), "prompt 0: 'text' at place 0"),
        (Table(None), "prompts: .* cannot be read"),
    ],
)
def test_what_is_no_prompt_is_refused_in_one_line(given, said):
    with pytest.raises(UserError, match=said) as refused:
        prompt_ids(given, Letters(), 100)
    assert "\n" not in str(refused.value)


def test_a_text_that_is_far_too_long_is_refused_by_its_beginning():
    encoded = []

    class Counting(Letters):
        def encode(self, text: str) -> list[int]:
            encoded.append(len(text))
            return super().encode(text)

    with pytest.raises(UserError, match="5,000,000 characters, of which the first 65,536 alone are 65,536 tokens"):
        prompt_ids("a" * 5_000_000, Counting(), 1000)
    assert encoded == [65_536]
    long = "a" * 100_000
    assert prompt_ids(long, Letters(), 90_000) == [Letters().encode(long)]  # whether it fits is said of its tokens


def test_a_text_without_a_tokenizer_is_refused():
    with pytest.raises(UserError, match="no tokenizer"):
        prompt_ids("My lord,", None, 100)


def test_texts_go_in_and_come_out(engine):
    ids = Letters().encode("My lord,")
    result = engine.generate("My lord,", max_new_tokens=5)
    assert result.token_ids == engine.generate([ids], max_new_tokens=5).token_ids
    assert result.text == Letters().decode(result.token_ids[0])
    two = engine.generate(["My lord,", "Exeunt"], max_new_tokens=5)
    assert two.texts[0] == result.text and len(two.texts) == 2
    with pytest.raises(UserError, match="2 texts"):
        _ = two.text
    np.testing.assert_allclose(engine.logits("My lord,"), engine.logits(ids), rtol=1e-4, atol=1e-4)


def test_a_stop_string_is_not_part_of_the_text(engine):
    whole = engine.generate("My lord,", max_new_tokens=8).text
    stopped = engine.generate("My lord,", max_new_tokens=8, stop=whole[3:5])
    assert stopped.finish_reasons == ["stop"]
    assert stopped.text == whole[: whole.index(whole[3:5])]


def test_load_takes_the_engines_options():
    from hybrimoe_jax.engine.load import config_of

    assert config_of(None, None, {"cache_ratio": 0.5}) == hybrimoe_jax.EngineConfig(cache_ratio=0.5)
    base = hybrimoe_jax.EngineConfig(system="adapmoe", seed=3)
    virtual = config_of(base, "a6000-paper", {"seed": 4})
    assert (virtual.system, virtual.seed, virtual.profile, virtual.clock) == ("adapmoe", 4, "a6000-paper", "virtual")
    with pytest.raises(UserError, match=r"cache_ration.*did you mean cache_ratio"):
        hybrimoe_jax.load(cache_ration=0.5)
    with pytest.raises(UserError, match="leave out clock"):
        hybrimoe_jax.load(machine="a6000-paper", clock="wall")
    with pytest.raises(UserError, match="nonsense"):
        hybrimoe_jax.load(machine="nonsense")


def test_a_block_closes_its_engine():
    with tiny.engine(cache_ratio=0.5) as engine:
        engine.generate([1, 2, 3], max_new_tokens=2)
    with pytest.raises(UserError, match="closed"):
        engine.generate([1, 2, 3], max_new_tokens=2)


def test_every_prompt_of_every_call_is_a_sequence_of_its_own(engine):
    with engine.recording() as record:
        with pytest.raises(UserError, match="nothing was recorded"):
            _ = record.trace
        engine.generate("one", max_new_tokens=3)
        engine.generate(["two", "three"], max_new_tokens=3)
        assert set(record.trace.sequence) == {0, 1, 2}
        engine.generate("four", max_new_tokens=3)
    engine.generate("not recorded", max_new_tokens=3)
    trace = record.trace
    assert sorted(set(trace.sequence)) == [0, 1, 2, 3]
    positions = [trace.position[(trace.sequence == number) & (trace.layer == 0)] for number in range(4)]
    assert [len(one) for one in positions] == [5, 5, 7, 6], "each prompt and all new tokens but the last"
    assert all(np.array_equal(one, np.arange(len(one))) for one in positions)
    with pytest.raises(UserError, match="timeline=True"):
        _ = record.timeline


@pytest.mark.parametrize("clock", ["wall", "virtual"])
def test_a_recording_has_a_timeline_on_either_clock(clock):
    with tiny.engine(cache_ratio=0.5, clock=clock) as engine, engine.recording(timeline=True) as record:
        engine.generate([1, 2, 3], max_new_tokens=4)
        so_far = len(record.timeline)
        engine.generate([1, 2, 3], max_new_tokens=4)
    assert record.timeline.about["clock"] == clock
    assert 0 < so_far < len(record.timeline)
    assert len(record.timeline.steps()) == 8


def test_an_interrupted_generate_keeps_its_tokens(engine, monkeypatch):
    expected = engine.generate(["My lord,", "Exeunt"], max_new_tokens=8)
    assert engine.partial is None
    steps, original = 0, engine._forward.forward

    def interrupted(*args):
        nonlocal steps
        steps += 1
        if steps == 5:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(engine._forward, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt, match="partial"):
        engine.generate(["My lord,", "Exeunt"], max_new_tokens=8)
    monkeypatch.undo()
    partial = engine.partial
    assert partial.token_ids == [row[:4] for row in expected.token_ids]
    assert partial.finish_reasons == ["interrupted"] * 2
    assert partial.texts == [text[:4] for text in expected.texts]
    assert len(partial.stats.steps) == 4
    assert engine.generate(["My lord,", "Exeunt"], max_new_tokens=8).token_ids == expected.token_ids
    assert engine.partial is None


def test_statistics_are_tables(engine):
    stats = engine.generate("My lord,", max_new_tokens=4).stats
    steps = stats.table()
    assert list(steps["phase"]) == ["prefill", *["decode"] * 3]
    assert sum(steps["hits"]) == stats.total("hits") and sum(steps["MB"]) * 1e6 == pytest.approx(
        stats.total("bytes_h2d")
    )
    assert steps["hit_rate"][1] == pytest.approx(steps["hits"][1] / (steps["hits"][1] + steps["misses"][1]))
    assert len(stats.table("layer")) == 3 and len(stats.table("step and layer")) == 12
    experts = stats.table("expert")
    assert sum(experts["tokens"]) == sum(sum(layer.loads.values()) for step in stats.steps for layer in step.layers)
    with pytest.raises(UserError, match="choose one of step, layer"):
        stats.table("hour")


def test_every_object_says_in_one_line_what_it_is(engine):
    with engine.recording(timeline=True) as record:
        result = engine.generate("My lord,", max_new_tokens=4)
    shown = (engine, engine.slots, result, result.stats, record, record.trace, record.timeline)
    for thing in shown:
        said = repr(thing)
        assert "\n" not in said and len(said) < 400 and " object at 0x" not in said
    for thing in (engine, engine.slots, result, result.stats, record.timeline):
        assert "<" in thing._repr_html_()
    assert repr(hybrimoe_jax.EngineConfig(cache_ratio=0.5)) == "EngineConfig(cache_ratio=0.5)"
    assert result.text[:4] in repr(result) and "4 tokens" in repr(result)
    assert "wall clock, this machine" in repr(result.stats) and "wall clock" in result.stats._repr_html_()


def test_the_slot_map_is_what_the_planner_holds(engine):
    slots = engine.slots
    rows = slots.table()
    assert list(rows["slots"]) == engine.planner.slots
    assert [set(one) for one in rows["resident"]] == [engine.planner.resident(layer) for layer in range(3)]
    assert len(str(slots).splitlines()) == 4


def test_statistics_are_pictures(engine):
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    plot = engine.generate("My lord,", max_new_tokens=4).stats.plot
    for name in ("hit_rate", "times", "lanes", "layers", "experts"):
        axes = getattr(plot, name)()
        assert axes.get_xlabel() and axes.get_ylabel() and "hybrimoe" in axes.get_title()
    _, mine = pyplot.subplots()
    assert plot.hit_rate(mine) is mine
    pyplot.close("all")


@pytest.mark.parametrize("system", ["freetoken", "adapmoe", "on-demand"])
def test_a_picture_of_layers_tells_residents_from_what_was_on_its_way(system):
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    with tiny.engine(system=system, cache_ratio=0.25, profile="a6000-paper", clock="virtual") as engine:
        stats = engine.generate(tiny.prompts(engine.config, (90,)), max_new_tokens=8).stats
    bars = {bar.get_label(): sum(part.get_height() for part in bar) for bar in stats.plot.layers().containers}
    pyplot.close("all")
    steps, s = len(stats.steps), stats.summary()
    assert bars["CPU"] * steps == pytest.approx(s["cpu_experts"])
    assert bars["device, fetched"] * steps == pytest.approx(s["demand_fetches"])
    assert bars["device, resident"] * steps <= s["hits"] + 1e-6
    of_device = sum(share for name, share in bars.items() if name.startswith("device"))
    assert of_device * steps == pytest.approx(s["device_experts"])


def test_two_engines_and_jax_live_in_one_process(engine):
    """The session has used jax before; the second engine differs in everything that it can."""
    before = float(jnp.arange(4.0).sum())
    with tiny.engine("mixtral", system="adapmoe", cache_ratio=0.25, clock="virtual") as other:
        mine, others = engine.steps([[1, 2, 3]], max_new_tokens=6), other.steps([[4, 5]], max_new_tokens=6)
        made: tuple[list[int], list[int]] = ([], [])
        for one, two in zip(mine, others, strict=True):  # step by step in turns
            made[0].extend(token for _, token in one.tokens)
            made[1].extend(token for _, token in two.tokens)
            assert float(jnp.arange(4.0).sum()) == before
        assert other.generate([4, 5], max_new_tokens=6).token_ids == [made[1]]
    assert engine.generate([1, 2, 3], max_new_tokens=6).token_ids == [made[0]]
