"""Calls on one engine are served in turn, whoever makes them: threads, streams, and what an interrupt leaves."""

from __future__ import annotations

import contextlib
import gc
import threading
import time

import pytest
import tiny

from hybrimoe_jax.engine.streaming import stream_generate
from hybrimoe_jax.engine.turns import LOOK_AGAIN_S, Turns
from hybrimoe_jax.errors import UserError

PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]


@pytest.fixture(scope="module")
def engine():
    with tiny.engine(system="adapmoe", cache_ratio=0.5) as engine:
        yield engine


def together(*calls) -> list:
    """What each gave, or raised; each in a thread of its own, all at once."""
    found: list = [None] * len(calls)
    ready = threading.Barrier(len(calls))

    def run(place, call):
        ready.wait()
        try:
            found[place] = call()
        except BaseException as error:
            found[place] = error

    threads = [threading.Thread(target=run, args=each, daemon=True) for each in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "somebody waits for ever"
    return found


def streamed(engine, prompt) -> list[int]:
    return [chunk.token_id for chunk in stream_generate(engine, prompt, max_new_tokens=6)]


def test_threads_get_the_answers_that_each_gets_alone(engine):
    alone = [engine.generate(prompt, max_new_tokens=6) for prompt in PROMPTS]
    tokens = [one.token_ids[0] for one in alone]
    calls = [lambda p=prompt: engine.generate(p, max_new_tokens=6).token_ids[0] for prompt in PROMPTS]
    streams = [lambda p=prompt: streamed(engine, p) for prompt in PROMPTS]
    assert together(*calls, *streams, lambda: engine.logits(PROMPTS[0]).shape[0], lambda: len(engine.slots.slots)) == [
        *tokens,
        *tokens,
        3,
        3,
    ]
    counters = engine.planner.counters
    assert counters.prefetch_issued == counters.prefetch_useful + counters.prefetch_late + counters.prefetch_wasted


def test_a_stream_that_is_left_holds_nobody_up(engine):
    expected = engine.generate(PROMPTS[0], max_new_tokens=6).token_ids[0]
    left: list = []
    together(lambda: left.append(stream_generate(engine, PROMPTS[1], max_new_tokens=6)) or next(left[0]))
    assert together(lambda: engine.generate(PROMPTS[0], max_new_tokens=6).token_ids[0]) == [expected]
    left.clear()
    gc.collect()
    assert streamed(engine, PROMPTS[0]) == expected


def test_interleaved_streams_count_what_is_theirs(engine):
    before = engine.planner.counters.prefetch_issued
    stats = tiny.in_turns([engine.steps(prompt, max_new_tokens=6) for prompt in PROMPTS[:2]])
    assert sum(one.prefetch.issued for one in stats) == engine.planner.counters.prefetch_issued - before
    assert [len(one.steps) for one in stats] == [6, 6]


def test_one_stream_serves_several_threads(engine):
    stream = stream_generate(engine, PROMPTS[0], max_new_tokens=24)
    found = together(*[lambda: [chunk.token_id for chunk in stream]] * 3, lambda: next(stream).token_id)
    taken = [token for tokens in found[:3] for token in tokens] + [found[3]]
    assert sorted(taken) == sorted(engine.generate(PROMPTS[0], max_new_tokens=24).token_ids[0])


def test_a_closed_engine_ends_the_streams_that_are_left():
    with tiny.engine(system="adapmoe", cache_ratio=0.5) as engine:
        stream = stream_generate(engine, PROMPTS[0], max_new_tokens=6)
        next(stream)
    with pytest.raises(UserError, match="closed"):
        next(stream)


def test_a_call_within_a_step_is_refused_and_between_steps_is_served(engine, monkeypatch):
    expected = engine.generate(PROMPTS[0], max_new_tokens=3).token_ids
    original = engine._forward.forward

    def calling(*args):
        engine.generate(PROMPTS[1], max_new_tokens=1)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(engine._forward, "forward", calling)
        with pytest.raises(UserError, match="within a step"):
            engine.generate(PROMPTS[0], max_new_tokens=3)
    for _ in engine.steps(PROMPTS[1], max_new_tokens=3):
        assert engine.generate(PROMPTS[0], max_new_tokens=3).token_ids == expected


def test_turns_come_in_the_order_of_the_asking():
    turns, order, inside = Turns(contextlib.nullcontext), [], threading.Event()
    go = threading.Event()
    first = threading.Thread(target=lambda: turns.serve(lambda: (inside.set(), go.wait(30))))
    first.start()
    inside.wait(30)
    waiting = []
    for number in range(4):
        thread = threading.Thread(target=lambda n=number: turns.serve(lambda: order.append(n)))
        thread.start()
        waiting.append(thread)
        while len(turns._queue) < number + 2:
            time.sleep(0.001)
    began = time.monotonic()
    go.set()
    for thread in (first, *waiting):
        thread.join(30)
    assert order == [0, 1, 2, 3] and time.monotonic() - began < LOOK_AGAIN_S


def test_who_is_interrupted_while_it_waits_leaves_the_queue(monkeypatch):
    turns = Turns(contextlib.nullcontext)
    turns._queue.append(threading.Lock())  # somebody's turn
    monkeypatch.setattr(threading, "Lock", lambda: Interrupted())
    with pytest.raises(KeyboardInterrupt):
        turns.serve(lambda: None)
    assert len(turns._queue) == 1
    turns._queue.clear()
    monkeypatch.undo()
    assert turns.serve(lambda: 5) == 5


class Interrupted:
    """A lock whose wait Ctrl-C breaks off."""

    def acquire(self, timeout: float = -1) -> bool:
        if timeout >= 0:
            raise KeyboardInterrupt
        return True

    def release(self) -> None:
        raise RuntimeError("nobody holds it")
