"""What a caller of `Engine` relies on: batches, chunks, endings, sampling, and parts that can be replaced one by
one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tiny
from grids import few

from hybrimoe_jax.decide.cache import POLICIES
from hybrimoe_jax.decide.schedule import SCHEDULERS
from hybrimoe_jax.errors import UserError

LENGTHS = (5, 37, 20)


@pytest.fixture(scope="module")
def prompts():
    return tiny.prompts(tiny.weights("qwen2_moe")[0], LENGTHS, seed=3)


@pytest.fixture(scope="module")
def engine():
    engine = tiny.engine("qwen2_moe", cache_ratio=0.25, debug=True)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def greedy(engine, prompts):
    """The greedy answer to the ragged batch, which `test_exactness` ties to the dense model."""
    return engine.generate(prompts, max_new_tokens=16).token_ids


PAIRS = [pair for pair, _ in zip(zip(itertools.cycle(POLICIES), itertools.cycle(SCHEDULERS)), range(18))]
ONCE = max(len(POLICIES), len(SCHEDULERS))


@pytest.mark.parametrize(
    ("cache", "scheduler"),  # each of both at least twice, by default once
    few(PAIRS[:ONCE], PAIRS),
)
def test_every_cache_and_scheduler_gives_the_same_answer(cache, scheduler, prompts, greedy):
    changed = tiny.engine("qwen2_moe", cache_ratio=0.25, debug=True, cache=cache, scheduler=scheduler)
    assert changed.generate(prompts, max_new_tokens=16).token_ids == greedy
    changed.close()


@pytest.mark.parametrize(
    "parts", [{"prefetch": "none"}, {"prefetch": "next-layer"}, {"lookahead": 1}, {"lookahead": 2}]
)
def test_every_prefetcher_gives_the_same_answer(parts, prompts, greedy):
    changed = tiny.engine("qwen2_moe", cache_ratio=0.25, debug=True, **parts)
    assert changed.generate(prompts, max_new_tokens=16).token_ids == greedy
    changed.close()


def test_ragged_rows_answer_as_they_do_alone(engine, prompts, greedy):
    for prompt, tokens in zip(prompts, greedy, strict=True):
        assert engine.generate([prompt], max_new_tokens=16).token_ids == [tokens]


@pytest.mark.parametrize("chunk", few([4], [4, 64]))
def test_the_prefill_chunk_changes_no_answer(chunk, engine, prompts, greedy):
    other = tiny.engine("qwen2_moe", cache_ratio=0.25, prefill_chunk=chunk)
    assert other.generate(prompts, max_new_tokens=16).token_ids == greedy
    want, have = engine.logits(prompts[1]), other.logits(prompts[1])
    assert have.shape == (LENGTHS[1], tiny.COMMON["vocab_size"])
    np.testing.assert_allclose(have, want, rtol=0, atol=2e-5 * np.abs(want).max())
    other.close()


def test_logits_agree_with_what_generation_chooses(engine, prompts, greedy):
    walked = engine.logits(prompts[0] + greedy[0][:-1])
    assert walked[LENGTHS[0] - 1 :].argmax(axis=1).tolist() == greedy[0]


def first_new(tokens: list[int], start: int) -> int:
    """The place, from `start` on, of a token that occurs there for the first time."""
    return next(i for i in range(start, len(tokens)) if tokens[i] not in tokens[:i])


def test_one_end_of_sequence_id_ends_its_row_only(prompts, greedy):
    at = first_new(greedy[0], 3)
    engine = tiny.engine("qwen2_moe", eos=(greedy[0][at],))
    out = engine.generate(prompts, max_new_tokens=16)
    for tokens, whole, reason in zip(out.token_ids, greedy, out.finish_reasons, strict=True):
        ends = whole.index(greedy[0][at]) + 1 if greedy[0][at] in whole else len(whole)
        assert tokens == whole[:ends]
        assert reason == ("eos" if greedy[0][at] in whole else "length")
    assert out.finish_reasons[0] == "eos" and len(out.token_ids[0]) == at + 1
    engine.close()


def test_any_of_several_end_of_sequence_ids_ends_a_row(prompts, greedy):
    ends = [greedy[0][first_new(greedy[0], 5)], greedy[1][first_new(greedy[1], 2)]]
    engine = tiny.engine("qwen2_moe", eos=ends)
    out = engine.generate(prompts[:2], max_new_tokens=16)
    for tokens, whole in zip(out.token_ids, greedy, strict=False):
        assert tokens == whole[: 1 + min(whole.index(end) for end in ends if end in whole)]
    assert out.finish_reasons == ["eos", "eos"]
    assert out.stats.new_tokens == sum(map(len, out.token_ids))
    engine.close()


def test_ids_that_no_token_has_are_dropped_and_what_is_no_id_is_refused():
    engine = tiny.engine("qwen2_moe", eos=[-1, 5, 10**400, np.int64(6), 2**40])
    assert engine.eos == (5, 6)
    engine.close()
    for eos in ("5", ["5"], [None], 2.5):
        with pytest.raises(UserError, match="eos "):
            tiny.engine("qwen2_moe", eos=eos)


class Letters:
    """A tokenizer whose token i is written "<i>"."""

    has_chat_template = False

    def decode(self, ids):
        return "".join(f"<{i}>" for i in ids)


def test_a_stop_string_ends_its_row_even_across_tokens(prompts, greedy):
    engine = tiny.engine("qwen2_moe", tokenizer=Letters())
    end = first_new(greedy[2], 4)
    across = f"{greedy[2][end - 1]}><{greedy[2][end]}"
    out = engine.generate(prompts, max_new_tokens=16, stop=["never", across])
    assert out.token_ids[2] == greedy[2][: end + 1] and out.finish_reasons[2] == "stop"
    assert out.token_ids[0] == greedy[0] and out.finish_reasons[0] == "length"
    engine.close()


def test_stop_strings_without_a_tokenizer_are_refused(engine, prompts):
    with pytest.raises(UserError, match="tokenizer"):
        engine.generate(prompts, stop=["x"])


def test_sampling_is_reproducible_by_seed_and_independent_of_neighbours(engine, prompts):
    drawn = engine.generate(prompts, max_new_tokens=12, temperature=1.0, seed=5).token_ids
    assert engine.generate(prompts, max_new_tokens=12, temperature=1.0, seed=5).token_ids == drawn
    assert engine.generate(prompts[:1], max_new_tokens=12, temperature=1.0, seed=5).token_ids == drawn[:1]
    others = [prompts[2], prompts[1], prompts[0]]
    assert engine.generate(others, max_new_tokens=12, temperature=1.0, seed=5).token_ids[1] == drawn[1]
    assert engine.generate(prompts, max_new_tokens=12, temperature=1.0, seed=6).token_ids != drawn


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}])
def test_a_cut_to_one_token_is_greedy_at_any_temperature(narrow, engine, prompts, greedy):
    assert engine.generate(prompts, max_new_tokens=16, temperature=5.0, **narrow).token_ids == greedy


def test_a_cut_to_a_few_tokens_draws_only_those(engine, prompts):
    drawn = engine.generate(prompts[:1], max_new_tokens=16, temperature=3.0, top_k=3, seed=2).token_ids[0]
    walked = engine.logits(prompts[0] + drawn[:-1])[LENGTHS[0] - 1 :]
    ranks = [int((row > row[token]).sum()) for row, token in zip(walked, drawn, strict=True)]
    assert max(ranks) <= 2 and any(ranks)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"max_new_tokens": 10_000}, "max_context"),
    ],
)
def test_impossible_requests_are_refused_by_name(wrong, named, engine, prompts):
    with pytest.raises(UserError, match=named):
        engine.generate(prompts, **wrong)


@pytest.mark.parametrize(("prompt", "named"), [([], "no prompts"), ([[]], "empty"), ([[96]], "96"), ([[3, -1]], "-1")])
def test_impossible_prompts_are_refused(prompt, named, engine):
    with pytest.raises(UserError, match=named):
        engine.generate(prompt)


def test_rows_can_be_stopped_from_outside(engine, prompts, greedy):
    steps, made, stopped = engine.steps(prompts, max_new_tokens=16), [[], [], []], None
    while True:
        try:
            emitted = steps.send(stopped)
        except StopIteration:
            break
        stopped = []
        for row, token in emitted.tokens:
            made[row].append(token)
            if row == 1 and len(made[1]) == 4:
                stopped = [1]
    assert made == [greedy[0], greedy[1][:4], greedy[2]]


def test_a_generation_left_half_way_does_no_harm(engine, prompts, greedy):
    steps = engine.steps(prompts, max_new_tokens=16)
    for _ in range(5):
        next(steps)
    steps.close()
    assert engine.stats.new_tokens > 0
    assert engine.generate(prompts, max_new_tokens=16).token_ids == greedy


def test_a_closed_engine_says_so(prompts):
    engine = tiny.engine("qwen2_moe", cache_ratio=0.25)
    engine.close()
    for use in (lambda: engine.generate(prompts), lambda: engine.logits(prompts[0])):
        with pytest.raises(UserError, match="closed"):
            use()
