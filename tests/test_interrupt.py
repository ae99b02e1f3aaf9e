"""A step that is broken off anywhere leaves an engine that still answers as before."""

from __future__ import annotations

import pytest
import tiny
from grids import each_once

from hybrimoe_jax.engine.sampling import Sampler
from hybrimoe_jax.simulate.recorded import replay_run


class Stop(KeyboardInterrupt):
    pass


PLACES = dict.fromkeys(("_place", "prefetch", "land", "_residents"), "adapmoe") | {"double_buffered": "freetoken"}
"""Method that is broken off -> the system that calls it."""


@pytest.mark.parametrize(("method", "call"), each_once(PLACES, (1, 4)))
def test_an_interrupted_engine_recovers(method, call, monkeypatch):
    config, _, _ = tiny.weights("qwen2_moe")
    prompts = tiny.prompts(config, (21, 9))
    engine = tiny.engine(system=PLACES[method], cache_ratio=0.5, debug=True)
    expected = engine.generate(prompts, max_new_tokens=8).token_ids
    forward, count = engine._forward, 0
    original = getattr(forward, method)

    def interrupt(*args):
        nonlocal count
        count += 1
        if count == call:
            raise Stop
        return original(*args)

    monkeypatch.setattr(forward, method, interrupt)
    with pytest.raises(Stop):
        engine.generate(prompts, max_new_tokens=8)
    monkeypatch.setattr(forward, method, original)
    assert engine.generate(prompts, max_new_tokens=8).token_ids == expected
    counters = engine.planner.counters
    assert counters.prefetch_issued == counters.prefetch_useful + counters.prefetch_late + counters.prefetch_wasted


@pytest.mark.parametrize(("system", "call"), [("adapmoe", 1), ("freetoken", 1), ("freetoken", 3), ("freetoken", 9)])
def test_an_interrupt_while_transfers_are_handed_over_leaves_none_to_wait_for(system, call, monkeypatch):
    config, _, _ = tiny.weights("qwen2_moe")
    prompts = tiny.prompts(config, (21, 9))
    engine = tiny.engine(system=system, cache_ratio=0.5)
    expected = engine.generate(prompts, max_new_tokens=8).token_ids
    worker, count = engine._forward.link._worker, 0
    original = worker.put

    def interrupt(*args):
        nonlocal count
        count += 1
        if count == call:
            raise Stop
        return original(*args)

    monkeypatch.setattr(worker, "put", interrupt)
    with pytest.raises(Stop):
        engine.generate(prompts, max_new_tokens=8)
    monkeypatch.setattr(worker, "put", original)
    assert engine.generate(prompts, max_new_tokens=8).token_ids == expected


@pytest.mark.parametrize(("options", "call"), [({"temperature": 0.7}, 1), ({"temperature": 0.7}, 4), ({}, 4)])
def test_a_step_whose_token_is_not_chosen_counts_and_is_in_the_trace(options, call, monkeypatch):
    prompts = tiny.prompts(tiny.weights("qwen2_moe")[0], (21,))
    engine = tiny.engine(system="adapmoe", cache_ratio=0.5, debug=True)
    with tiny.engine(system="adapmoe", cache_ratio=0.5) as other:
        expected = other.generate(prompts, max_new_tokens=8, **options).token_ids
    choose, count = Sampler.__call__, 0

    def interrupt(*args):
        nonlocal count
        count += 1
        if count == call:
            raise Stop
        return choose(*args)

    with engine.recording() as record, monkeypatch.context() as patch:
        patch.setattr(Sampler, "__call__", interrupt)
        with pytest.raises(Stop):
            engine.generate(prompts, max_new_tokens=8, **options)
    steps = engine.stats.steps
    assert len(engine.partial.token_ids[0]) == call - 1
    assert record.trace.step.max() + 1 == len(steps) == call + 1, "the prompt takes two steps, and one has no token"
    _, replayed = replay_run(record.trace)
    assert [step.hits for step in replayed.steps] == [step.total("hits") for step in steps]
    for _ in range(2):
        assert engine.generate(prompts, max_new_tokens=8, **options).token_ids == expected
    engine.close()
