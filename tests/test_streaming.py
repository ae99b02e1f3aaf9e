"""Text as it is made: every token yields, nothing of a stop string is ever shown, and nothing else is lost."""

from __future__ import annotations

import asyncio

import pytest
import tiny
import tiny_checkpoint
from grids import examples
from hypothesis import given
from hypothesis import strategies as st

from hybrimoe_jax.engine.lanes import host
from hybrimoe_jax.engine.streaming import StopBuffer, stream_generate
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.text import Tokenizer

PROMPT = "héllo the and"


@examples(300)
@given(st.lists(st.text("ab", max_size=4), max_size=8), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_text_up_to_the_first_stop_string_is_shown_and_no_more(pieces, stops):
    buffer, shown, made = StopBuffer(stops), "", ""
    for piece in pieces:
        made += piece
        text, complete = buffer.push(piece)
        shown += text
        found = [made.find(stop) for stop in stops if stop in made]
        assert complete == bool(found)
        if complete:
            assert shown == made[: min(found)]
            return
        held = made.removeprefix(shown)
        assert made.startswith(shown)
        assert held == "" or any(stop.startswith(held) for stop in stops), "text is held back for no reason"
    assert shown + buffer.flush() == made


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UserError, match="empty"):
        StopBuffer(["ok", ""])


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tiny_checkpoint.write_hf(tmp_path_factory.mktemp("model") / "hf")
    engine = tiny.engine("bytes", tokenizer=Tokenizer(folder), cache_ratio=0.5)
    yield engine
    engine.close()


def test_streaming_gives_what_generating_gives(engine):
    ids = engine.tokenizer.encode(PROMPT)
    whole = engine.generate([ids], max_new_tokens=12)
    chunks = list(stream_generate(engine, PROMPT, max_new_tokens=12))
    assert [chunk.token_id for chunk in chunks] == whole.token_ids[0]
    assert "".join(chunk.text for chunk in chunks) == engine.tokenizer.decode(whole.token_ids[0])
    assert [chunk.finish_reason for chunk in chunks] == [None] * 11 + ["length"]
    assert [chunk.stats.phase for chunk in chunks] == ["prefill"] + ["decode"] * 11
    assert engine.stats.new_tokens == 12


def test_a_stop_string_ends_the_stream_and_is_not_shown(engine):
    ids = engine.tokenizer.encode(PROMPT)
    tokens = engine.generate([ids], max_new_tokens=24).token_ids[0]
    text = engine.tokenizer.decode(tokens)
    stop = next(text[i : i + 2] for i in range(3, len(text)) if text[i : i + 2].isascii())
    chunks = list(stream_generate(engine, ids, max_new_tokens=24, stop=[stop]))
    assert "".join(chunk.text for chunk in chunks) == text[: text.index(stop)]
    assert chunks[-1].finish_reason == "stop" and len(chunks) < 24
    assert engine.generate([ids], max_new_tokens=24, stop=[stop]).token_ids[0] == [c.token_id for c in chunks]


def test_streams_that_take_turns_or_are_left_give_what_they_give_alone(engine):
    prompts = [engine.tokenizer.encode(text) for text in (PROMPT, "and the")]
    alone = [engine.generate([ids], max_new_tokens=8).token_ids[0] for ids in prompts]
    left = stream_generate(engine, prompts[0], max_new_tokens=24)
    next(left), next(left)
    turns = zip(*(stream_generate(engine, ids, max_new_tokens=8) for ids in prompts), strict=True)
    assert [list(ids) for ids in zip(*((one.token_id, two.token_id) for one, two in turns))] == alone
    left.close()
    assert engine.generate(prompts, max_new_tokens=8).token_ids == alone


def test_a_running_event_loop_and_another_thread_change_nothing(engine):
    ids = engine.tokenizer.encode(PROMPT)
    want = engine.generate([ids], max_new_tokens=8).token_ids

    async def ask():
        here = engine.generate([ids], max_new_tokens=8).token_ids
        return here, await asyncio.to_thread(lambda: engine.generate([ids], max_new_tokens=8).token_ids)

    assert asyncio.run(ask()) == (want, want)
    assert engine.generate([ids], max_new_tokens=8).token_ids == want


def test_the_end_token_gives_no_text(engine):
    ids = engine.tokenizer.encode(PROMPT)
    tokens = engine.generate([ids], max_new_tokens=24).token_ids[0]
    at = next(i for i in range(3, 24) if tokens[i] not in tokens[:i])
    ending = tiny.engine("bytes", tokenizer=engine.tokenizer, cache_ratio=0.5, eos=[tokens[at]])
    chunks = list(stream_generate(ending, ids, max_new_tokens=24))
    assert [chunk.token_id for chunk in chunks] == tokens[: at + 1] and chunks[-1].finish_reason == "eos"
    assert "".join(chunk.text for chunk in chunks) == engine.tokenizer.decode(tokens[:at])
    ending.close()


def test_a_text_prompt_needs_a_tokenizer():
    engine = tiny.engine("qwen2_moe")
    with pytest.raises(UserError, match="token ids"):
        stream_generate(engine, "text")
    with pytest.raises(UserError, match="tokenizer"):
        stream_generate(engine, [1, 2], stop=["x"])
    engine.close()


def test_what_a_host_worker_raises_reaches_the_caller_and_breaks_nothing(engine, monkeypatch):
    slow = tiny.costs(engine.config, cpu=1000)  # so that the work goes to a worker thread
    working = tiny.engine("bytes", system="ktransformers", cache_ratio=0.5, profile=slow, debug=True)
    ids = engine.tokenizer.encode(PROMPT)
    expected = working.generate([ids], max_new_tokens=6).token_ids

    def broken(*args):
        raise MemoryError("no room for a temporary")

    with monkeypatch.context() as patch:
        patch.setattr(host, "run_experts", broken)
        with pytest.raises(MemoryError, match="no room"):
            working.generate([ids], max_new_tokens=6)
    assert working.generate([ids], max_new_tokens=6).token_ids == expected
    working.close()
