"""Fused decode: the dense model's tokens, the same plans and statistics as layer by layer, and only where it is
meant."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tiny

from hybrimoe_jax.engine.fused import choice, select
from hybrimoe_jax.engine.fused.forward import FusedForward
from hybrimoe_jax.engine.fused.program import MAX_STEPS_PER_CALL
from hybrimoe_jax.host_kernels.native import ffi

pytestmark = pytest.mark.skipif(not ffi.available(), reason="no native kernels for jitted programs here")


@pytest.fixture(autouse=True, scope="module")
def found_faster():
    """Both ways are timed as ever, but beside other work either may be the faster one, at load and later."""
    is_faster = select.is_faster
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "is_faster", lambda *args: is_faster(*args) or True)
        patch.setattr(choice, "CLEARLY", float("inf"))
        yield


def all_on_cpu_costs(config, **changes):
    """The invented machine without a device of its own, whose CPU takes everything."""
    costs = tiny.costs(config)
    return dataclasses.replace(
        costs, alone_expert=1e-6, alone_token=1e-7, alone_first=1e-6, handover=1e-4, look=1.0, **changes
    )


def fused_engine(family="qwen2_moe", format="f32", **options):
    costs = all_on_cpu_costs(tiny.weights(family)[0])  # small experts are float32 on the device
    return tiny.engine(family, host_kernel="native", profile=costs, format=format, **options)


@pytest.fixture(scope="module")
def engine():
    """Shared by tests that leave it as it was."""
    return fused_engine()


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


def test_a_call_needs_no_memory_in_the_size_of_the_embedding(engine):
    import jax
    import jax.numpy as jnp

    from hybrimoe_jax.engine.fused.program import to_program_layout

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


def test_a_program_made_at_load_serves_models_with_ending_tokens():
    engine = fused_engine(eos=(95, 94, 96, 2**40, 10**400))
    prompt = tiny.prompts(engine.config, (9,))
    forward = engine._forward
    engine._forward = forward.layered
    engine.generate(prompt, max_new_tokens=3)  # so that the prompt's are made
    engine._forward, made = forward, tiny.executables()
    engine.generate(prompt, max_new_tokens=12)
    assert tiny.executables() == made


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


def test_a_recorder_attached_between_steps_sees_the_same_tokens(engine):
    from hybrimoe_jax.engine.recording import EngineTrace

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


def test_batches_and_recorders_go_layer_by_layer(engine, monkeypatch):
    def refuse(*args):
        raise AssertionError("this step must go layer by layer")

    monkeypatch.setattr(engine._forward.fused, "step", refuse)
    engine.generate(tiny.prompts(engine.config, (9, 5)), max_new_tokens=4)
    with engine.recording():
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


def test_a_noisy_warm_up_does_not_say_that_leaving_the_program_is_free(engine, monkeypatch):
    """That would mean: there is no such program."""
    from hybrimoe_jax.engine import probes

    parts = engine._parts
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
