"""The statistics of a run add up, the measured costs steer the plan, and profiles and the debug mode do what they
promise."""

from __future__ import annotations

import json

import jax.numpy as jnp
import pytest
import tiny
from grids import few

from hybrimoe_jax.decide.systems import SYSTEMS
from hybrimoe_jax.engine import programs
from hybrimoe_jax.engine.stats import Lanes, LayerStats, RunStats, StepStats
from hybrimoe_jax.engine.stats_text import stats_text
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.host_kernels.reference import ReferenceKernel

TOP_K = 2


@pytest.fixture(scope="module")
def prompts():
    return tiny.prompts(tiny.weights("qwen2_moe")[0], (5, 37), seed=3)


def run(prompts, **options):
    engine = tiny.engine("qwen2_moe", **options)
    out = engine.generate(prompts, max_new_tokens=12)
    engine.close()
    return engine, out


USUAL = ["hybrimoe", "adapmoe", "on-demand", "freetoken", "fiddler", "cpu-only"]


@pytest.mark.parametrize("system", few(USUAL, SYSTEMS))
def test_every_activation_is_a_hit_or_a_miss_and_runs_once(system, prompts):
    engine, out = run(prompts, system=system, cache_ratio=0.25)
    layers = [layer for step in out.stats.steps for layer in step.layers]
    assert [layer.layer for layer in layers] == list(range(3)) * len(out.stats.steps)
    for step in out.stats.steps:
        for layer in step.layers:
            assert layer.hits + layer.misses == len(layer.loads)
            assert sorted(layer.cpu + layer.device) == sorted(layer.loads)
            assert sum(layer.loads.values()) == TOP_K * step.tokens
            assert set(layer.fetched) <= set(layer.device) and len(layer.fetched) <= layer.misses
    assert [step.phase for step in out.stats.steps] == ["prefill"] * 3 + ["decode"] * 11
    assert sum(step.tokens for step in out.stats.steps) == sum(map(len, prompts)) + out.stats.new_tokens - len(prompts)
    counters, summary = engine.planner.counters, out.stats.summary()
    assert (summary["hits"], summary["misses"]) == (counters.hits, counters.misses)
    assert summary["hit_rate"] == counters.hits / counters.activated
    assert (summary["cpu_experts"], summary["device_experts"]) == (counters.cpu, counters.device)
    assert summary["demand_fetches"] == counters.fetched
    assert json.loads(json.dumps(summary))["system"] == system


@pytest.mark.parametrize("system", ["on-demand", "device-only"])
def test_a_device_only_system_moves_exactly_its_misses(system, prompts):
    engine, out = run(prompts, system=system, cache_ratio=0.25)
    for step in out.stats.steps:
        for layer in step.layers:
            assert not layer.cpu and len(layer.fetched) == layer.misses
            assert layer.bytes_h2d == layer.misses * engine.store.expert_bytes
    assert out.stats.summary()["bytes_h2d"] == out.stats.summary()["misses"] * engine.store.expert_bytes > 0


def test_what_the_cpu_computes_is_never_moved(prompts):
    for system in ("cpu-only", "ktransformers", "llamacpp"):
        _, out = run(prompts, system=system, cache_ratio=0.5)
        assert out.stats.summary()["bytes_h2d"] == 0 and out.stats.summary()["cpu_experts"] > 0


def test_with_everything_resident_there_is_no_miss_and_no_transfer(prompts):
    _, out = run(prompts, cache_ratio=1.0)
    assert out.stats.hit_rate == 1.0 and out.stats.summary()["bytes_h2d"] == 0
    assert out.stats.prefetch.issued == 0


@pytest.mark.parametrize("system", ["hybrimoe", "adapmoe"])
def test_prefetches_add_up(system, prompts):
    engine, out = run(prompts, system=system, cache_ratio=0.25)
    counts, expert = out.stats.prefetch, engine.store.expert_bytes
    assert counts.issued == counts.useful + counts.late + counts.wasted > 0
    assert counts.useful > 0, "no prediction came true in time: the prefetcher does nothing"
    layers = [layer for step in out.stats.steps for layer in step.layers]
    assert sum(len(layer.prefetch_useful) for layer in layers) == counts.useful
    assert sum(len(layer.prefetch_late) for layer in layers) == counts.late
    for layer in layers:
        assert set(layer.prefetch_useful + layer.prefetch_late) <= set(layer.device)
    fetched = sum(len(layer.fetched) for layer in layers)
    moved = out.stats.summary()["bytes_h2d"]
    assert fetched * expert <= moved <= (fetched + counts.issued) * expert


def test_statistics_belong_to_one_call(prompts):
    engine = tiny.engine("qwen2_moe", system="adapmoe", cache_ratio=0.25)
    first = engine.generate(prompts, max_new_tokens=12)
    second = engine.generate(prompts, max_new_tokens=12)
    assert len(second.stats.steps) == len(first.stats.steps) and engine.stats is second.stats
    issued = engine.planner.counters.prefetch_issued
    assert first.stats.prefetch.issued + second.stats.prefetch.issued == issued
    engine.close()


def test_doubling_the_cpu_cost_moves_work_to_the_device(prompts):
    costs = tiny.costs(tiny.weights("qwen2_moe")[0])
    engine, base = run(prompts, cache_ratio=0.5, profile=costs)
    assert engine.costs == costs
    _, doubled = run(prompts, cache_ratio=0.5, profile=costs.scaled(cpu=2))
    assert doubled.token_ids == base.token_ids
    assert doubled.stats.summary()["cpu_experts"] < base.stats.summary()["cpu_experts"]
    assert doubled.stats.summary()["costs"]["cpu_expert"] == 2 * costs.cpu_expert


def slow(function, seconds: float):
    """`function`, no faster than `seconds`; it waits without occupying a core or the interpreter."""
    import time

    def slowed(*args, **kwargs):
        time.sleep(seconds)
        return function(*args, **kwargs)

    return slowed


def test_the_warm_up_measures_a_slow_cpu_and_the_plan_avoids_it(prompts, monkeypatch):
    monkeypatch.setattr(ReferenceKernel, "expert", slow(ReferenceKernel.expert, 0.01))
    engine, out = run(prompts[:1], cache_ratio=1.0, profile=None)
    assert engine.costs.cpu(1) > 0.009 > engine.costs.device(1)
    assert out.stats.summary()["cpu_experts"] == 0


def test_the_warm_up_measures_a_slow_device_and_the_plan_avoids_it(prompts, monkeypatch):
    monkeypatch.setattr(programs, "add_device_experts", slow(programs.add_device_experts, 0.01))
    engine, out = run(prompts[:1], cache_ratio=0.5, profile=None)
    assert engine.costs.shared(1) > 0.009 > engine.costs.cpu(1), "each call is slow, which is the block's"
    assert out.stats.summary()["device_experts"] == 0


def test_a_profile_is_read_back_as_it_was_measured(prompts, tmp_path):
    measured, out = run(prompts[:1], profile=None)
    measured.save_profile(tmp_path / "machine.json")
    again, same = run(prompts[:1], profile=tmp_path / "machine.json")
    assert again.costs == measured.costs and same.token_ids == out.token_ids
    assert same.stats.summary()["costs"] == out.stats.summary()["costs"]


def test_a_profile_of_another_model_or_a_damaged_one_is_refused(tmp_path):
    path = tmp_path / "machine.json"
    tiny.engine("qwen2_moe").save_profile(path)
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, "expert_bytes": 12345}))
    with pytest.raises(UserError, match="12345 bytes"):
        tiny.engine("qwen2_moe", profile=path)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(UserError, match=r"machine\.json"):
        tiny.engine("qwen2_moe", profile=path)
    with pytest.raises(UserError, match=r"absent\.json"):
        tiny.engine("qwen2_moe", profile=tmp_path / "absent.json")


def test_the_dense_executor_has_no_profile_to_save(tmp_path):
    with pytest.raises(UserError, match="dense"):
        tiny.engine("qwen2_moe", executor="dense").save_profile(tmp_path / "machine.json")


def test_debug_finds_a_slot_that_holds_the_wrong_weights(prompts):
    engine = tiny.engine("qwen2_moe", cache_ratio=0.5, debug=True, system="ktransformers")
    expected = engine.generate(prompts, max_new_tokens=4).token_ids
    pool = engine._parts.pool
    slot = min(pool._where[1].values())
    gate_up, down = pool._buffers[slot]
    pool._buffers[slot] = (gate_up, down + jnp.float32(1e-3))
    with pytest.raises(RuntimeError, match="layer 1 does not hold expert"):
        engine.generate(prompts, max_new_tokens=4)
    assert engine.generate(prompts, max_new_tokens=4).token_ids == expected  # a broken step refills the slots
    engine.close()


def test_without_debug_a_wrong_slot_changes_the_answer(prompts):
    """So that the test above is about something: device experts do come from the slots."""
    engine = tiny.engine("qwen2_moe", cache_ratio=1.0, system="on-demand")
    expected = engine.logits(prompts[0])
    pool = engine._parts.pool
    pool._buffers = [(gate_up, 0 * down) for gate_up, down in pool._buffers]
    assert abs(engine.logits(prompts[0]) - expected).max() > 1e-2
    engine.close()


def one_layer(platform: str = "cpu", clock: str = "wall", count: int = 1, **layer) -> RunStats:
    """Of a run of `count` steps with one layer."""
    parts = {"cpu": (0,), "device": (), "fetched": (), "bytes_h2d": 0, "seconds": 1.0, "lanes": Lanes(1, 1, 1), **layer}
    steps = [StepStats(p, 1, 1.0, 0.5 * (p == "prefill"), []) for p in ["prefill"] + ["decode"] * count]
    for step in steps:
        step.layers.append(LayerStats(0, {0: 1}, 0, 1, **parts))
    costs = {"model": "deepseek-v2-lite", "format": "int4z-g128-s32", "profile": "a6000-engineered"}
    system, kernel = "ktransformers", {"name": "native, AVX-512 with VNNI, int8 activations"}
    fixed = {"executor": "overlapped", "cache_ratio": 0.125, "device_kernel": "xla", "cores": {}}
    return RunStats(
        system, clock=clock, host_kernel=kernel, costs=costs, slots=[1], steps=steps, device=platform, **fixed
    )


def test_a_run_that_moved_nothing_on_a_cpu_alone_says_so_and_no_other_does():
    note = one_layer().summary()["note"]
    assert note.startswith("Nothing moved") and "--clock virtual --profile a6000-paper" in note
    others = [one_layer("gpu"), one_layer(clock="virtual"), one_layer(bytes_h2d=9), one_layer(device=(0,))]
    assert [stats.summary()["note"] for stats in others] == [None] * 4


@pytest.mark.parametrize("shape", [None, "deepseek-v2-lite:int4z-g128-s32"])
def test_the_text_fits_a_screen(shape):
    stats = one_layer(count=9999)
    stats.cost_shape, stats.clock = shape, "virtual" if shape else "wall"
    stats.peak_device_bytes = stats.host_bytes = 2**43
    rows = stats_text(stats).splitlines()
    assert len(rows) <= 16 and max(map(len, rows)) <= 80
    said = " ".join(row.strip() for row in rows)
    assert ("bytes and times of deepseek-v2-lite, int4z-g128-s32, computed" in said) == bool(shape)
    assert ("to see them differ: --clock virtual" in said) == (shape is None)
