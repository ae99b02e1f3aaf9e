"""Fused decode's calls: several steps share one, the next is started ahead, and none is left behind by whatever ends
a run."""

from __future__ import annotations

import time

import numpy as np
import pytest
import tiny
from test_fused_decode import found_faster, fused_engine, go_layer_by_layer  # noqa: F401  # a fixture

from hybrimoe_jax.engine.fused.program import MAX_STEPS_PER_CALL
from hybrimoe_jax.engine.inputs import StepInput
from hybrimoe_jax.host_kernels.native import ffi

pytestmark = pytest.mark.skipif(not ffi.available(), reason="no native kernels for jitted programs here")


@pytest.fixture(scope="module")
def engine():
    return fused_engine()


@pytest.fixture(scope="module")
def dense():
    return tiny.engine(executor="dense")


def steps_started_ahead(engine, monkeypatch) -> list[bool]:
    """For every fused step that follows: whether it had been started before it was asked for."""
    fused, seen = engine._forward.fused, []
    find = fused._find

    def watched(*args):
        call = find(*args)
        seen.append(call is not None)
        return call

    monkeypatch.setattr(fused, "_find", watched)
    return seen


def steps_of_calls(engine, monkeypatch, most: int = MAX_STEPS_PER_CALL) -> list[int]:
    """How many steps XLA was given in each call that follows."""
    fused, seen = engine._forward.fused, []
    start = fused._start

    def watched(before, position, steps, *rest):
        seen.append(steps)
        return start(before, position, steps, *rest)

    monkeypatch.setattr(fused, "_start", watched)
    monkeypatch.setattr(fused, "max_steps", most)
    return seen


def test_the_next_greedy_step_is_started_ahead(engine, monkeypatch):
    seen = steps_started_ahead(engine, monkeypatch)
    prompt = tiny.prompts(engine.config, (9,))
    engine.generate(prompt, max_new_tokens=6)
    assert seen == [False, True, True, True, True]
    assert engine._forward.fused._next_call is None, "nothing follows the last token"
    seen.clear()
    engine.generate(prompt, max_new_tokens=6, temperature=0.7)
    assert seen == [False] * 5, "which token is drawn is not known before"


@pytest.mark.parametrize(
    ("new_tokens", "most", "calls"), [(22, 8, [1, 2, 4, 8, 6]), (9, 3, [1, 2, 3, 2]), (4, 1, [1, 1, 1])]
)
def test_steps_share_calls_that_grow_and_end_with_the_run(engine, dense, monkeypatch, new_tokens, most, calls):
    seen, prompt = steps_of_calls(engine, monkeypatch, most), tiny.prompts(engine.config, (9,))
    made = engine.generate(prompt, max_new_tokens=new_tokens)
    assert seen == calls
    assert made.token_ids == dense.generate(prompt, max_new_tokens=new_tokens).token_ids
    assert len(made.stats.steps) == new_tokens and all(step.seconds > 0 for step in made.stats.steps)


def test_no_call_reads_beyond_the_span_that_its_program_was_made_for(engine, dense, monkeypatch):
    """A call begins where attention must read more of the cache, and ends before."""
    prompt = tiny.prompts(engine.config, (250,))
    seen = steps_of_calls(engine, monkeypatch)
    made = engine.generate(prompt, max_new_tokens=20).token_ids
    assert seen == [1, 2, 3, 1, 2, 4, 6]
    assert made == dense.generate(prompt, max_new_tokens=20).token_ids


def test_nothing_is_computed_behind_a_token_that_ends_the_sequence(engine, monkeypatch):
    prompt = tiny.prompts(engine.config, (9,))
    tokens = engine.generate(prompt, max_new_tokens=20).token_ids[0]
    at = next(i for i in range(5, 15) if tokens[i] not in tokens[:i])
    monkeypatch.setattr(engine, "eos", (tokens[at],))
    fused, start, given = engine._forward.fused, engine._forward.fused._start, []
    monkeypatch.setattr(fused, "max_steps", MAX_STEPS_PER_CALL)
    monkeypatch.setattr(fused, "_start", lambda *args: given.append(start(*args)) or given[-1])
    assert engine.generate(prompt, max_new_tokens=20).token_ids[0] == tokens[: at + 1]
    computed = [int(np.asarray(call.results.tokens)[1]) for call, _ in given]
    assert sum(computed) == at and computed[-1] == 0, "the last call is given the ending token"


def test_a_token_that_ends_sequences_can_be_given(engine):
    model, fused = engine._parts.model, engine._forward.fused
    zero = np.zeros((1, 1), np.int32)
    logits = []
    for ends in ((), (0,)):
        step = StepInput(zero, zero + 3, 256, "decode", np.zeros(1, np.int64), 4, ends)
        logits.append(fused.logits(step, model.init_cache(1, 256))[0])
        fused.synchronize()
    np.testing.assert_array_equal(*logits)
    assert np.abs(logits[0]).max() > 0


def test_a_drawn_steps_layers_are_planned_beside_the_next_one():
    """Nothing runs meanwhile, so planning waits; it reads the same as layer by layer, and reading runs nothing."""
    runs = {}
    for fused in (True, False):
        engine, steps = fused_engine(cache_ratio=0.5), []
        if not fused:
            go_layer_by_layer(engine)
        for emitted in engine.steps(tiny.prompts(engine.config, (9,)), max_new_tokens=8, temperature=0.7):
            steps.append(emitted.stats)
            if fused and len(steps) > 2:
                assert not steps[-1].layers and all(step.layers for step in steps[:-1])
        runs[fused] = [(at.layer, at.loads, at.hits, at.misses) for step in steps for at in step.layers]
        assert len(steps[-1].layers) == len(engine.config.moe_layers), "the run's end plans what is left"
    assert runs[False] == runs[True]


def test_an_interrupt_while_steps_are_planned_leaves_statistics_that_can_be_read(engine, monkeypatch):
    prompt = tiny.prompts(engine.config, (9,))
    want = engine.generate(prompt, max_new_tokens=12).token_ids
    fused, plan, planned = engine._forward.fused, engine._forward.fused._plan, []

    def interrupted(*args):
        planned.append(1)
        if len(planned) == 4:
            raise KeyboardInterrupt
        return plan(*args)

    monkeypatch.setattr(fused, "_plan", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompt, max_new_tokens=12)
    assert engine.stats.summary()["hits"] >= 0
    assert engine.generate(prompt, max_new_tokens=12).token_ids == want


@pytest.mark.parametrize(
    ("temperature", "call"), [(0.0, 7), (0.7, 7), (0.7, 3 * 6 + 2)], ids=["greedy", "drawn", "at the end"]
)
def test_an_interrupt_in_the_planner_leaves_an_exact_engine(engine, temperature, call, monkeypatch):
    """Also at a run's end, where the latest drawn step is planned: what is half planned is repaired."""
    prompt = tiny.prompts(engine.config, (9,))
    options = {"max_new_tokens": 8, "temperature": temperature}
    want = engine.generate(prompt, **options).token_ids
    plan, repair, calls, repaired = engine.planner.plan, engine._forward.layered.repair, [], []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3 + call:  # the prompt's layers are planned first
            raise KeyboardInterrupt
        return plan(*args, **kwargs)

    monkeypatch.setattr(engine.planner, "plan", interrupted)
    monkeypatch.setattr(engine._forward.layered, "repair", lambda: repaired.append(1) or repair())
    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompt, **options)
    for _ in range(2):
        again = engine.generate(prompt, **options)
        assert again.token_ids == want
        assert all(len(step.layers) == 3 for step in again.stats.steps)
    assert repaired == [1]


def test_runs_that_take_turns_compute_no_steps_for_nobody(engine, monkeypatch):
    prompts = tiny.prompts(engine.config, (9, 12), seed=5)
    want = [engine.generate([prompt], max_new_tokens=12).token_ids[0] for prompt in prompts]
    calls, made = steps_of_calls(engine, monkeypatch), [[], []]
    for pair in zip(*(engine.steps([prompt], max_new_tokens=12) for prompt in prompts), strict=True):
        for tokens, emitted in zip(made, pair, strict=True):
            tokens += [token for _, token in emitted.tokens]
    assert made == want
    assert sum(calls) <= 2 * 11 + 2, "the first step could not know"


def test_steps_share_the_time_of_their_calls(engine):
    engine.generate(tiny.prompts(engine.config, (9,)), max_new_tokens=20)
    start = time.perf_counter()
    steps = engine.generate(tiny.prompts(engine.config, (9,)), max_new_tokens=20).stats.steps
    took = time.perf_counter() - start
    assert 0 < sum(step.seconds for step in steps) <= took
    decode = [step.seconds for step in steps if step.phase == "decode"]
    assert decode[1] == decode[2] and len(set(decode[3:7])) == 1, "one, two, four"


@pytest.mark.parametrize(("step_s", "most"), [(0.001, MAX_STEPS_PER_CALL), (0.03, 3), (0.5, 1)])
def test_calls_hold_as_many_steps_as_take_a_tenth_of_a_second(engine, monkeypatch, step_s, most):
    fused, now = engine._forward.fused, [0.0]

    class Clock:
        def now(self):
            now[0] += step_s
            return now[0]

    for name in ("threads", "max_steps"):
        monkeypatch.setattr(fused, name, getattr(fused, name))  # put back what calibrating sets
    fused.calibrate(Clock(), 256, 2)
    assert fused.max_steps == most


def test_what_was_started_ahead_and_not_wanted_harms_nothing(engine, dense, monkeypatch):
    """A sampler that takes the second likeliest token."""
    from hybrimoe_jax.engine.sampling import Sampler

    prompt = tiny.prompts(engine.config, (9,))
    greedy = engine.generate(prompt, max_new_tokens=12).token_ids
    monkeypatch.setattr(Sampler, "__call__", lambda self, row, logits: int(np.argsort(logits)[-2]))
    seen = steps_started_ahead(engine, monkeypatch)
    other = engine.generate(prompt, max_new_tokens=12).token_ids
    assert not any(seen) and other != greedy
    assert other == dense.generate(prompt, max_new_tokens=12).token_ids


def occupy() -> None:
    """Gives XLA some tenths of a second of work before what this thread gives it next, once the latest step has
    begun."""
    import jax
    import jax.numpy as jnp

    a = jnp.full((600, 600), 1e-3)
    jax.jit(lambda a: jax.lax.fori_loop(0, 60, lambda _, b: b @ a, a))(a)


def test_a_row_stopped_early_leaves_the_next_run_as_it_was(engine):
    prompts = tiny.prompts(engine.config, (9, 21), seed=5)
    want = [engine.generate([prompt], max_new_tokens=8).token_ids for prompt in prompts]
    run = engine.steps([prompts[0]], max_new_tokens=8)
    for _ in range(2):
        next(run)
    occupy()  # so that the step ahead is still to be computed when the run ends
    next(run)
    ahead = engine._forward.fused._next_call
    assert ahead is not None and ahead.cache() is not None
    with pytest.raises(StopIteration):
        run.send(0)
    del run
    assert ahead.cache() is None, "the caches are the caller's, and he has left"
    assert ahead.results.logits.is_ready(), "nothing reads the experts any more"
    for prompt, tokens in zip(prompts, want, strict=True):
        assert engine.generate([prompt], max_new_tokens=8).token_ids == tokens


def test_the_callers_own_time_is_not_a_steps(engine):
    for emitted in engine.steps(tiny.prompts(engine.config, (9,)), max_new_tokens=6):
        time.sleep(0.05)
        assert emitted.stats.phase == "prefill" or emitted.stats.seconds < 0.05


def test_every_step_yielded_has_its_statistics(engine):
    for emitted in engine.steps(tiny.prompts(engine.config, (9,)), max_new_tokens=5):
        assert [layer.layer for layer in emitted.stats.layers] == list(range(len(engine.config.moe_layers)))
