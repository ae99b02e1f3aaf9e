"""`engine.record`: full scores, weights and predictions at every distance, whatever the system, and without
changing what it does."""

from __future__ import annotations

import numpy as np
import pytest
import tiny

from hybrimoe_jax.engine.recording import EngineTrace
from hybrimoe_jax.trace.info import info, lacks

LAYERS = 3


def run(prompts, trace: bool, **options):
    engine = tiny.engine("qwen2_moe", cache_ratio=0.25, **options)
    recorder = EngineTrace(engine) if trace else None
    engine.record(recorder, None)
    out = engine.generate(prompts, max_new_tokens=6)
    engine.close()
    return engine, out, recorder


@pytest.fixture(scope="module")
def prompts():
    return tiny.prompts(tiny.weights("qwen2_moe")[0], (5, 19), seed=3)


@pytest.mark.parametrize(
    "options", [{"system": "cpu-only"}, {"system": "on-demand"}, {"system": "hybrimoe", "lookahead": 1}]
)
def test_a_live_trace_lacks_nothing(options, prompts, tmp_path):
    _, out, recorder = run(prompts, True, **options)
    trace = recorder.recorder.trace()
    assert lacks(trace) == []
    assert sorted(trace.lookahead) == [1, 2], "three layers: two distances"
    for record in trace.records():
        assert sorted(record.lookahead) == list(range(1, LAYERS - record.layer))
        np.testing.assert_allclose(record.scores.sum(axis=1), 1, rtol=1e-5)
        best = np.sort(np.argsort(-record.scores, axis=1, kind="stable")[:, :2], axis=1)
        assert np.array_equal(np.sort(record.ids, axis=1), best)
        for ahead in record.lookahead.values():
            np.testing.assert_allclose(ahead.sum(axis=1), 1, rtol=1e-5)
    figures = info(trace)
    assert figures["tokens"]["prefill"] == sum(map(len, prompts)) and figures["sequences"] == 2
    assert sum(figures["steps"].values()) == len(out.stats.steps)
    assert figures["expert_bytes"]["f32"] == 3 * 32 * trace_width(recorder)
    trace_again = tmp_path / "t.npz"
    recorder.save(trace_again)


def trace_width(recorder) -> int:
    return tiny.weights("qwen2_moe")[0].moe_width * 4


@pytest.mark.parametrize("system", ["hybrimoe", "cpu-only", "adapmoe"])
def test_recording_changes_nothing(system, prompts):
    plain, out, _ = run(prompts, False, system=system)
    recorded, same, _ = run(prompts, True, system=system)
    assert same.token_ids == out.token_ids
    for a, b in zip(out.stats.steps, same.stats.steps, strict=True):
        assert [layer.loads for layer in a.layers] == [layer.loads for layer in b.layers]
    assert (plain.planner.counters.prefetch_issued == 0) == (recorded.planner.counters.prefetch_issued == 0)


def test_runs_that_take_turns_are_sequences_of_their_own(prompts):
    engine = tiny.engine("qwen2_moe", cache_ratio=0.25)
    recorder = EngineTrace(engine)
    engine.record(recorder, None)
    runs = [engine.steps([prompt], max_new_tokens=3) for prompt in (prompts[0], prompts[0][::-1])]
    for _ in range(3):
        for run in runs:
            next(run)
    engine.close()
    trace = recorder.recorder.trace()
    for number in range(2):
        mine = (trace.sequence == number) & (trace.layer == 0)
        assert trace.position[mine].tolist() == list(range(len(prompts[0]) + 2))
        assert set(trace.batch[mine].tolist()) == {number}
