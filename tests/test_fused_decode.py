"""Fused decode: the dense model's tokens, the same plans and statistics as layer by layer, and only where it is
meant."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest
import tiny

from hybrimoe_jax.engine.fused import choice, select
from hybrimoe_jax.engine.fused.forward import FusedForward
from hybrimoe_jax.engine.fused.program import MAX_STEPS_PER_CALL
from hybrimoe_jax.engine.inputs import StepInput
from hybrimoe_jax.host_kernels.native import ffi

pytestmark = pytest.mark.skipif(not ffi.available(), reason="no native kernels for jitted programs here")


@pytest.fixture(autouse=True)
def found_faster(monkeypatch):
    """Both ways are timed as ever, but beside other work either may be the faster one, at load and later."""
    is_faster = select.is_faster
    monkeypatch.setattr(select, "is_faster", lambda *args: is_faster(*args) or True)
    monkeypatch.setattr(choice, "CLEARLY", float("inf"))


def all_on_cpu_costs(config, **changes):
    """The invented machine without a device of its own, whose CPU takes everything."""
    costs = tiny.costs(config)
    return dataclasses.replace(
        costs, alone_expert=1e-6, alone_token=1e-7, alone_first=1e-6, handover=1e-4, look=1.0, **changes
    )


def fused_engine(family="qwen2_moe", format="f32", **options):
    costs = all_on_cpu_costs(tiny.weights(family)[0])  # small experts are float32 on the device
    return tiny.engine(family, host_kernel="native", profile=costs, format=format, **options)


def go_layer_by_layer(engine) -> None:
    engine._forward = engine._forward.layered


FORMATS = [("qwen2_moe", "f32"), ("qwen2_moe", "bf16"), ("mixtral", "f32"), ("deepseek_v2", "f32")]


@pytest.mark.parametrize(("family", "format"), FORMATS)
def test_the_dense_models_tokens(family, format):
    engine, dense = fused_engine(family, format), tiny.engine(family, executor="dense", format=format)
    prompts = tiny.prompts(engine.config, (37,), seed=3)
    ran = []
    step = engine._forward.fused.step
    engine._forward.fused.step = lambda *args: ran.append(1) or step(*args)
    assert engine.generate(prompts, max_new_tokens=24).token_ids == dense.generate(prompts, max_new_tokens=24).token_ids
    assert len(ran) == 23


def test_logits_of_a_step_are_the_layer_by_layer_ones():
    engine = fused_engine()
    prompt = tiny.prompts(engine.config, (20,))
    logits = {}
    for fused in (True, False):
        kept, forward = [], engine._forward.forward
        engine._forward.forward = lambda *args, kept=kept, forward=forward: kept.append(forward(*args)) or kept[-1]
        engine.generate(prompt, max_new_tokens=8)
        engine._forward.forward = forward
        if fused:
            go_layer_by_layer(engine)
        logits[fused] = np.concatenate([logit for logit, _, _ in kept])
    scale = np.abs(logits[False]).max()
    assert np.abs(logits[True] - logits[False]).max() < 2e-5 * scale


def test_a_narrow_embedding_is_handed_over_in_place_and_read_by_the_row():
    """XLA would widen all of it in each call."""
    import jax
    import jax.numpy as jnp

    from hybrimoe_jax.engine.fused.program import row_of, to_program_layout

    rows = jax.device_put(np.random.default_rng(0).standard_normal((512, 256), np.float32).astype(jnp.bfloat16))
    handed = to_program_layout(rows)
    assert handed.unsafe_buffer_pointer() == rows.unsafe_buffer_pointer()

    def last(table, token, steps):
        def add(state):
            i, token, total = state
            row = row_of(table, token)
            return i + 1, jnp.argmax(row[0]).astype(jnp.int32), total + row

        return jax.lax.while_loop(lambda state: state[0] < steps, add, (0, token, jnp.zeros((1, 256))))[2]

    compiled = jax.jit(last).lower(handed, np.int32(7), np.int32(1)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < handed.nbytes / 4
    np.testing.assert_array_equal(compiled(handed, np.int32(7), np.int32(1))[0], np.asarray(rows[7], np.float32))


def test_a_call_needs_no_memory_in_the_size_of_the_embedding():
    import jax
    import jax.numpy as jnp

    from hybrimoe_jax.engine.fused.program import to_program_layout

    engine = fused_engine()
    fused, model = engine._forward.fused, engine._parts.model
    table = jnp.zeros((1 << 16, model.table.shape[1]), jnp.bfloat16)
    before, numbers = jax.device_put(np.zeros(MAX_STEPS_PER_CALL + 2, np.int32)), np.array([5, 1, 1, 1], np.int32)
    arguments = (
        fused._params,
        (to_program_layout(table), model.norm, model.head),
        fused._table,
        before,
        model.init_cache(1, 256),
    )
    lowered = fused._program.lower(*arguments, numbers, np.full(8, -1, np.int32), 256)
    assert lowered.compile().memory_analysis().temp_size_in_bytes < table.nbytes / 4


def test_statistics_are_the_layer_by_layer_ones():
    runs = {}
    for fused in (True, False):
        engine = fused_engine(cache_ratio=0.5)
        if not fused:
            go_layer_by_layer(engine)
        result = engine.generate(tiny.prompts(engine.config, (20,)), max_new_tokens=12)
        layers = [layer for step in result.stats.steps for layer in step.layers]
        runs[fused] = [(at.layer, at.loads, at.hits, at.misses, at.cpu, at.device, at.bytes_h2d) for at in layers]
        counters = engine.planner.counters
        assert counters.hits + counters.misses == counters.activated == counters.cpu + counters.device
        assert all(layer.lanes.cpu > 0 for layer in layers if layer.cpu)
    assert runs[True] == runs[False]


def steps_started_ahead(engine) -> list[bool]:
    """For every fused step that follows: whether it had been started before it was asked for."""
    fused, seen = engine._forward.fused, []
    find = fused._find

    def watched(*args):
        call = find(*args)
        seen.append(call is not None)
        return call

    fused._find = watched
    return seen


def steps_of_calls(engine, most: int = MAX_STEPS_PER_CALL) -> list[int]:
    """How many steps XLA was given in each call that follows."""
    fused, seen = engine._forward.fused, []
    start, fused.max_steps = fused._start, most

    def watched(before, position, steps, *rest):
        seen.append(steps)
        return start(before, position, steps, *rest)

    fused._start = watched
    return seen


def test_the_next_greedy_step_is_started_ahead():
    engine = fused_engine()
    seen = steps_started_ahead(engine)
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
def test_steps_share_calls_that_grow_and_end_with_the_run(new_tokens, most, calls):
    engine, dense = fused_engine(), tiny.engine(executor="dense")
    seen, prompt = steps_of_calls(engine, most), tiny.prompts(engine.config, (9,))
    made = engine.generate(prompt, max_new_tokens=new_tokens)
    assert seen == calls
    assert made.token_ids == dense.generate(prompt, max_new_tokens=new_tokens).token_ids
    assert len(made.stats.steps) == new_tokens and all(step.seconds > 0 for step in made.stats.steps)


def test_no_call_reads_beyond_the_span_that_its_program_was_made_for():
    """A call begins where attention must read more of the cache, and ends before."""
    engine, dense = fused_engine(), tiny.engine(executor="dense")
    prompt = tiny.prompts(engine.config, (250,))
    seen = steps_of_calls(engine)
    made = engine.generate(prompt, max_new_tokens=20).token_ids
    assert seen == [1, 2, 3, 1, 2, 4, 6]
    assert made == dense.generate(prompt, max_new_tokens=20).token_ids


def test_nothing_is_computed_behind_a_token_that_ends_the_sequence():
    engine = fused_engine()
    prompt = tiny.prompts(engine.config, (9,))
    tokens = engine.generate(prompt, max_new_tokens=20).token_ids[0]
    at = next(i for i in range(5, 15) if tokens[i] not in tokens[:i])
    engine.eos = (tokens[at],)
    fused, given = engine._forward.fused, []
    start, fused.max_steps = fused._start, MAX_STEPS_PER_CALL
    fused._start = lambda *args: given.append(start(*args)) or given[-1]
    assert engine.generate(prompt, max_new_tokens=20).token_ids[0] == tokens[: at + 1]
    computed = [int(np.asarray(call.results.tokens)[1]) for call, _ in given]
    assert sum(computed) == at and computed[-1] == 0, "the last call is given the ending token"


def test_a_token_that_ends_sequences_can_be_given():
    engine = fused_engine()
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


def test_an_interrupt_while_steps_are_planned_leaves_statistics_that_can_be_read(monkeypatch):
    engine = fused_engine()
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
def test_an_interrupt_in_the_planner_leaves_an_exact_engine(temperature, call, monkeypatch):
    """Also at a run's end, where the latest drawn step is planned: what is half planned is repaired."""
    engine, prompt = fused_engine(), tiny.prompts(tiny.weights("qwen2_moe")[0], (9,))
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
    engine.close()


def test_a_program_made_at_load_serves_models_with_ending_tokens():
    engine = fused_engine(eos=(95, 94))
    prompt = tiny.prompts(engine.config, (9,))
    forward = engine._forward
    engine._forward = forward.layered
    engine.generate(prompt, max_new_tokens=3)  # so that the prompt's are made
    engine._forward, made = forward, tiny.executables()
    engine.generate(prompt, max_new_tokens=12)
    assert tiny.executables() == made


def test_runs_that_take_turns_compute_no_steps_for_nobody():
    engine = fused_engine()
    prompts = tiny.prompts(engine.config, (9, 12), seed=5)
    want = [engine.generate([prompt], max_new_tokens=12).token_ids[0] for prompt in prompts]
    calls, made = steps_of_calls(engine), [[], []]
    for pair in zip(*(engine.steps([prompt], max_new_tokens=12) for prompt in prompts), strict=True):
        for tokens, emitted in zip(made, pair, strict=True):
            tokens += [token for _, token in emitted.tokens]
    assert made == want
    assert sum(calls) <= 2 * 11 + 2, "the first step could not know"


def test_steps_share_the_time_of_their_calls():
    engine = fused_engine()
    engine.generate(tiny.prompts(engine.config, (9,)), max_new_tokens=20)
    start = time.perf_counter()
    steps = engine.generate(tiny.prompts(engine.config, (9,)), max_new_tokens=20).stats.steps
    took = time.perf_counter() - start
    assert 0 < sum(step.seconds for step in steps) <= took
    decode = [step.seconds for step in steps if step.phase == "decode"]
    assert decode[1] == decode[2] and len(set(decode[3:7])) == 1, "one, two, four"


@pytest.mark.parametrize(("step_s", "most"), [(0.001, MAX_STEPS_PER_CALL), (0.03, 3), (0.5, 1)])
def test_calls_hold_as_many_steps_as_take_a_tenth_of_a_second(step_s, most):
    engine = fused_engine()
    fused, now = engine._forward.fused, [0.0]

    class Clock:
        def now(self):
            now[0] += step_s
            return now[0]

    fused.calibrate(Clock(), 256, 2)
    assert fused.max_steps == most


def test_what_was_started_ahead_and_not_wanted_harms_nothing(monkeypatch):
    """A sampler that takes the second likeliest token."""
    from hybrimoe_jax.engine.sampling import Sampler

    engine, dense = fused_engine(), tiny.engine(executor="dense")
    prompt = tiny.prompts(engine.config, (9,))
    greedy = engine.generate(prompt, max_new_tokens=12).token_ids
    monkeypatch.setattr(Sampler, "__call__", lambda self, row, logits: int(np.argsort(logits)[-2]))
    seen = steps_started_ahead(engine)
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


def test_a_step_that_fails_is_told_once():
    import jax

    engine = fused_engine()
    prompt, pair = tiny.prompts(engine.config, (9,)), tiny.prompts(engine.config, (9, 5))
    want = engine.generate(prompt, max_new_tokens=4).token_ids
    fused = engine._forward.fused
    table = fused._table
    fused._table = jax.device_put(np.zeros_like(table))  # no expert has a record
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="the routing does not fit the experts"):
        engine.generate(prompt, max_new_tokens=4)
    fused._table = table
    assert engine.logits(prompt[0]).shape == (9, engine.config.vocab_size)
    engine.generate(pair, max_new_tokens=2)
    assert engine.generate(prompt, max_new_tokens=4).token_ids == want


def test_a_row_stopped_early_leaves_the_next_run_as_it_was():
    engine = fused_engine()
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


def test_a_recorder_attached_between_steps_sees_the_same_tokens():
    from hybrimoe_jax.engine.recording import EngineTrace

    engine = fused_engine()
    prompt = tiny.prompts(engine.config, (9,))
    want = engine.generate(prompt, max_new_tokens=10).token_ids[0]
    tokens = []
    for emitted in engine.steps(prompt, max_new_tokens=10):
        tokens += [token for _, token in emitted.tokens]
        if len(tokens) == 5:
            engine.record(trace=EngineTrace(engine))
        if len(tokens) == 8:
            engine.record()
    assert tokens == want


def test_the_callers_own_time_is_not_a_steps():
    engine = fused_engine()
    for emitted in engine.steps(tiny.prompts(engine.config, (9,)), max_new_tokens=6):
        time.sleep(0.2)
        assert emitted.stats.phase == "prefill" or emitted.stats.seconds < 0.2


def test_every_step_yielded_has_its_statistics():
    engine = fused_engine()
    for emitted in engine.steps(tiny.prompts(engine.config, (9,)), max_new_tokens=5):
        assert [layer.layer for layer in emitted.stats.layers] == list(range(len(engine.config.moe_layers)))


def test_batches_and_recorders_go_layer_by_layer():
    from hybrimoe_jax.engine.recording import EngineTrace

    engine = fused_engine()

    def refuse(*args):
        raise AssertionError("this step must go layer by layer")

    engine._forward.fused.step = refuse
    engine.generate(tiny.prompts(engine.config, (9, 5)), max_new_tokens=4)
    engine.record(trace=EngineTrace(engine))
    engine.generate(tiny.prompts(engine.config, (9,)), max_new_tokens=4)


@pytest.mark.parametrize(
    "options",
    [{"lazy": True}, {"debug": True}, {"clock": "virtual"}, {"host_kernel": "reference"}, {"executor": "callback"}],
    ids=lambda options: next(iter(options)),
)
def test_other_engines_have_no_fused_decode(options):
    config = tiny.weights("qwen2_moe")[0]
    engine = tiny.engine(**{"host_kernel": "native", "profile": all_on_cpu_costs(config), **options})
    assert not isinstance(engine._forward, FusedForward)


def test_a_noisy_warm_up_does_not_say_that_leaving_the_program_is_free(monkeypatch):
    """That would mean: there is no such program."""
    from hybrimoe_jax.engine import probes

    parts = fused_engine()._parts
    lanes = probes.EngineLanes(parts.model, parts.pool, parts.link, parts.host, None)
    timed, seconds = probes._timed, iter((1.0, 1e6))  # a layer's front read at once, and many queued in a bad moment
    monkeypatch.setattr(probes, "_timed", lambda *args: next(seconds, None) or timed(*args))
    assert 0 < lanes.handover(256) < 1


def test_a_machine_with_a_device_of_its_own_has_no_fused_decode():
    assert not isinstance(tiny.engine(host_kernel="native")._forward, FusedForward)


@pytest.mark.parametrize("tokens", [1, 3, 50])
def test_routed_experts_are_the_reference_kernels(tokens):
    import jax

    from hybrimoe_jax.formats.plain import ExpertWeights, aligned_copy
    from hybrimoe_jax.host_kernels.native.kernel import NativeKernel
    from hybrimoe_jax.host_kernels.native.routed import routed, table
    from hybrimoe_jax.host_kernels.reference import ReferenceKernel

    rng = np.random.default_rng(0)
    count, width, hidden, top_k = 5, 40, 24, 3
    experts = [
        ExpertWeights(
            *(aligned_copy(rng.standard_normal(s, np.float32)) for s in ((2 * hidden, width), (width, hidden)))
        )
        for _ in range(count)
    ]
    kernel = NativeKernel()
    handles = [kernel.prepare(expert) for expert in experts]
    x = rng.standard_normal((tokens, width), np.float32)
    ids = np.stack([rng.permutation(count)[:top_k] for _ in range(tokens)]).astype(np.int32)
    mix = rng.random((tokens, top_k), np.float32)
    addresses = table([kernel.native_handle(handle)[1] for handle in handles])
    call = jax.jit(lambda *args: routed(*args, kernel.number))
    for threads in (1, 2):
        y, seconds = call(x, ids, mix, addresses, np.int32(threads))
        want = np.zeros_like(x)
        reference = ReferenceKernel()
        for token in range(tokens):
            for expert, weight in zip(ids[token], mix[token], strict=True):
                want[token] += weight * reference.expert(reference.prepare(experts[expert]), x[token : token + 1])[0]
        np.testing.assert_allclose(np.asarray(y), want, atol=2e-5 * np.abs(want).max())
        assert seconds.shape == (1,) and float(seconds[0]) > 0
    ids[0, 0] = count
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="the routing does not fit the experts"):
        jax.block_until_ready(call(x, ids, mix, addresses, np.int32(1)))
