"""Live runs and their replays agree: under the virtual clock to the last digit, under the wall clock in every count."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tiny
from test_trace_command import recorded

from hybrimoe_jax.decide import SYSTEMS
from hybrimoe_jax.decide.planner import Planner
from hybrimoe_jax.engine.recording import EngineTimeline, EngineTrace, run_record
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.machine.profile import load_costs, load_profile
from hybrimoe_jax.machine.shapes import get_shape
from hybrimoe_jax.simulate.__main__ import main as simulate
from hybrimoe_jax.simulate.recorded import replay_run
from hybrimoe_jax.trace.file import load_trace


def live(tmp_path, system, family="qwen2_moe", lengths=(21,), **options):
    """(trace as read back, the run's statistics, the planner's totals)."""
    engine = tiny.engine(family, system=system, **options)
    trace = EngineTrace(engine)
    engine.record(trace)
    config, _, _ = tiny.weights(family)
    generation = engine.generate(tiny.prompts(config, lengths), max_new_tokens=10)
    trace.save(tmp_path / "run.npz")
    engine.close()
    return load_trace(tmp_path / "run.npz"), generation.stats, engine.planner.counters


CASES = [(system, "qwen2_moe", (21,)) for system in SYSTEMS] + [("hybrimoe", "mixtral", (5, 18, 9))]
STREAMED = (("freetoken", (37, 20)), ("hybrimoe", (21,)), ("adapmoe", (40,)))
POOLED = ("hybrimoe", "adapmoe", "on-demand", "ktransformers")


@pytest.mark.parametrize(("system", "family", "lengths"), CASES)
def test_a_virtual_run_is_its_replay(tmp_path, system, family, lengths):
    trace, stats, counters = live(tmp_path, system, family, lengths, clock="virtual", cache_ratio=0.4)
    planner, result = replay_run(trace)
    assert result.counters == counters
    assert [step.seconds for step in result.steps] == [step.seconds for step in stats.steps]
    assert [step.hits for step in result.steps] == [step.total("hits") for step in stats.steps]
    assert stats.summary()["clock"] == "virtual" and stats.ttft_s > 0 and stats.compile_s == 0
    lanes = stats.lanes()
    assert (lanes.cpu, lanes.device) == pytest.approx((result.cpu, result.device)) and result.seconds > 0
    assert counters.prefetch_issued > 0 or planner.system.prefetch == "none"


@pytest.mark.parametrize("system", POOLED)
def test_a_virtual_run_with_pooled_slots_is_its_replay(tmp_path, system):
    trace, stats, counters = live(tmp_path, system, clock="virtual", cache_ratio=0.4, cache_scope="pooled", debug=True)
    planner, result = replay_run(trace)
    assert planner.system.scope == "pooled" and result.counters == counters
    assert [step.seconds for step in result.steps] == [step.seconds for step in stats.steps]
    assert [step.hits for step in result.steps] == [step.total("hits") for step in stats.steps]
    residents = [len(planner.resident(layer)) for layer in range(planner.num_layers)]
    assert sum(residents) == sum(planner.slots) and (len(set(residents)) > 1 or system == "ktransformers")


@pytest.mark.parametrize(("system", "lengths"), STREAMED)
def test_a_virtual_run_whose_prompts_are_streamed_is_its_replay(tmp_path, system, lengths):
    trace, stats, counters = live(
        tmp_path, system, lengths=lengths, clock="virtual", cache_ratio=0.4, stream_prefill=True, debug=True
    )
    planner, result = replay_run(trace)
    assert planner.system.stream_prefill and result.counters == counters and counters.layer_streamed > 0
    assert [step.seconds for step in result.steps] == [step.seconds for step in stats.steps]
    assert [step.hits for step in result.steps] == [step.total("hits") for step in stats.steps]
    assert stats.lanes().link == pytest.approx(result.link, rel=0.2), (
        "what is still on its way at a layer's end counts later"
    )
    assert counters.prefetch_issued > 0 or planner.system.prefetch == "none"


@pytest.mark.parametrize("stream_prefill", [False, True])
def test_a_virtual_run_with_the_costs_of_a_full_size_model_is_its_replay(tmp_path, stream_prefill):
    config, _, _ = tiny.weights("qwen2_moe")
    options = {"clock": "virtual", "cache_ratio": 0.4, "stream_prefill": stream_prefill}
    options |= {"profile": "a6000-paper", "cost_shape": "deepseek-v2-lite:int8-g128"}
    trace, stats, counters = live(tmp_path, "hybrimoe", **options)
    _, result = replay_run(trace)
    assert result.counters == counters and counters.fetched + counters.prefetch_issued > 0
    assert [step.seconds for step in result.steps] == [step.seconds for step in stats.steps]
    shape, summary = get_shape("deepseek-v2-lite"), stats.summary()
    costs, size = load_profile("a6000-paper").costs(shape, "int8-g128"), shape.expert_bytes("int8-g128")
    assert summary["costs"] == costs.describe() and summary["cost_shape"] == options["cost_shape"]
    assert summary["bytes_h2d"] % size == 0 and summary["bytes_h2d"] >= size * (counters.fetched or 1)
    assert summary["host_bytes"] == size * len(config.moe_layers) * config.num_experts
    assert summary["peak_device_bytes"] % size == 0 and summary["peak_device_bytes"] > size * sum(stats.slots)


@pytest.mark.parametrize("predictor", ["router-input", "corrected", "co-activation", "previous"])
def test_a_virtual_run_is_its_replay_whatever_predicts(tmp_path, predictor):
    trace, stats, counters = live(
        tmp_path, "hybrimoe", clock="virtual", cache_ratio=0.4, predictor=predictor, lookahead="adaptive"
    )
    planner, result = replay_run(trace)
    assert result.counters == counters and planner.system.predictor == predictor
    assert planner.depth(1) >= 1 and sum(planner.accuracy.predicted) > 0
    assert [step.seconds for step in result.steps] == [step.seconds for step in stats.steps]


def counts(counters) -> dict:
    """What is counted and not timed: under the wall clock the live engine measures seconds, and a replay cannot."""
    return {name: value for name, value in dataclasses.asdict(counters).items() if not name.endswith("_s")}


@pytest.mark.parametrize("system", ["hybrimoe", "adapmoe", "on-demand", "freetoken"])
def test_a_wall_clock_run_is_its_replay_in_every_count(tmp_path, system):
    trace, stats, counters = live(tmp_path, system, cache_ratio=0.4, clock="wall")
    _, result = replay_run(trace)
    assert counts(result.counters) == counts(counters) and result.seconds == 0
    assert [step.hits for step in result.steps] == [step.total("hits") for step in stats.steps]
    assert stats.summary()["clock"] == "wall"


def test_the_virtual_clock_changes_no_token_and_no_machine_at_hand_enters(tmp_path):
    config, _, _ = tiny.weights("qwen2_moe")
    prompt = tiny.prompts(config, [12])
    runs = []
    big = {"clock": "virtual", "profile": "laptop-8gb", "cost_shape": "mixtral-8x7b"}
    for options in ({"clock": "virtual"}, {"clock": "virtual"}, {"clock": "wall"}, big):
        engine = tiny.engine(**options)
        runs.append(engine.generate(prompt, max_new_tokens=6))
        engine.close()
    assert runs[0].token_ids == runs[1].token_ids == runs[2].token_ids == runs[3].token_ids
    assert runs[3].stats.ttft_s > runs[0].stats.ttft_s
    assert runs[0].stats.ttft_s == runs[1].stats.ttft_s and runs[0].stats.tbt_ms() == runs[1].stats.tbt_ms()


def test_costs_that_were_measured_with_other_experts_are_refused():
    with pytest.raises(UserError, match="experts of 9216 bytes, those of mixtral-8x7b have 93585408"):
        tiny.engine(clock="virtual", cost_shape="mixtral-8x7b")


def test_a_virtual_timeline_holds_the_machine_s_events():
    engine = tiny.engine(clock="virtual")
    recorder = EngineTimeline(engine)
    engine.record(timeline=recorder)
    config, _, _ = tiny.weights("qwen2_moe")
    stats = engine.generate(tiny.prompts(config, [12]), max_new_tokens=4).stats
    timeline = recorder.finish()
    engine.close()
    assert timeline.busy("cpu") == pytest.approx(stats.lanes().cpu)
    assert timeline.span == pytest.approx(sum(step.seconds for step in stats.steps), rel=1e-6)


def test_what_cannot_be_repeated_is_said(tmp_path):
    engine = tiny.engine()
    config, _, _ = tiny.weights("qwen2_moe")
    engine.generate(tiny.prompts(config, [4]), max_new_tokens=2)
    trace = EngineTrace(engine)
    engine.record(trace)
    engine.generate(tiny.prompts(config, [4]), max_new_tokens=2)
    engine.close()
    with pytest.raises(UserError, match="start it with the run"):
        replay_run(trace.recorder.trace())
    trace.recorder.about.pop("run")
    with pytest.raises(UserError, match="carries no run"):
        replay_run(trace.recorder.trace())


@pytest.mark.parametrize("clock", ["virtual", "wall"])
def test_a_step_that_was_broken_off_is_not_in_the_trace(tmp_path, clock, monkeypatch):
    engine = tiny.engine("qwen2_moe", system="adapmoe", cache_ratio=0.4, clock=clock)
    trace = EngineTrace(engine)
    engine.record(trace)
    config, _, _ = tiny.weights("qwen2_moe")
    steps = engine.steps(tiny.prompts(config, (21,)), max_new_tokens=12)
    for _ in range(5):
        next(steps)
    carry_out = engine._forward.carry_out

    def interrupted(run, *rest):
        if run.moe_layer == 2:
            raise KeyboardInterrupt
        return carry_out(run, *rest)

    monkeypatch.setattr(engine._forward, "carry_out", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(steps)
    monkeypatch.setattr(engine._forward, "carry_out", carry_out)
    trace.save(tmp_path / "run.npz")
    saved = load_trace(tmp_path / "run.npz")
    assert saved.step.max() == 4 and max(saved.extra.get("landed", [[0]]), key=lambda row: row[0])[0] <= 4
    _, result = replay_run(saved)
    assert [step.hits for step in result.steps] == [step.total("hits") for step in engine.stats.steps]
    engine.generate(tiny.prompts(config, (4,)), max_new_tokens=2)
    trace.save(tmp_path / "run.npz")
    engine.close()
    with pytest.raises(UserError, match="went on after a step that was broken off, before step 5"):
        replay_run(load_trace(tmp_path / "run.npz"))


@pytest.mark.slow
def test_the_command_runs_the_bundled_model_on_a_named_machine(tmp_path):
    def run(*flags):
        arguments = ["--prompt", "My lord,", "--max-tokens", "8", "--stats", "json", *flags]
        command = [sys.executable, "-m", "hybrimoe_jax.generate", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "NPROC": "1"})
        return done.returncode, done.stdout, done.stderr

    code, out, error = run("--clock", "virtual", "--profile", "a6000-engineered", "--trace", str(tmp_path / "t.npz"))
    assert code == 0, error
    record = json.loads(out.splitlines()[-1])
    assert record["clock"] == "virtual" and record["costs"]["profile"] == "a6000-engineered"
    _, result = replay_run(load_trace(tmp_path / "t.npz"))
    assert (result.counters.hits, result.counters.misses) == (record["hits"], record["misses"])
    assert sum(s.seconds for s in result.steps if s.phase == "prefill") == record["ttft_s"]
    code, _, error = run("--clock", "virtual")
    assert code == 2 and "needs a profile" in error and "Traceback" not in error
    code, _, error = run("--clock", "virtual", "--profile", "no-such-machine")
    assert code == 2 and "laptop-8gb" in error


ROWS = np.array([[1, 0, 1, 2]], np.int32)
DAMAGED = [
    ({"costs/combine": [1]}, r"about\.run, is damaged \(combine must be an object, not \[1\]\); record it again"),
    ({"costs/combine": {"cpu": []}}, r"combine\.cpu is \[\]"),
    ({"costs/figures/cpu_flops": None}, "cpu_flops must be a number a second"),
    ({"costs/figures": 1}, "is damaged"),
    ({"costs": "figures"}, "is damaged"),
    ({"shape/experts": "x"}, "experts must be a whole number"),
    ({"frequencies": [["x"] * 8] * 2}, "the frequency of expert 0, 'x' is no number"),
    ({"frequencies": [[10**400] * 8] * 2}, r"the frequency of expert 0, .* is no number"),
    ({"frequencies": [[-1] * 8] * 2}, "-1 must be at least 0"),
    ({"frequencies": [1, 2]}, "is damaged"),
    ({"slots": [1, "2"]}, "slots '2' is no whole number within 0..8"),
    ({"slots": [1, 1e99]}, "slots 1e.99 is no"),
    ({"slots": 5}, "is damaged"),
    ({"max_in_flight": True}, "max_in_flight True is no"),
    ({"max_in_flight": None}, "max_in_flight None is no"),
    ({"system/lookahead": "x"}, "lookahead"),
    ({"system": []}, "is damaged"),
    ({"broken_off": "x"}, "before step 'x': it cannot be repeated"),
    ({"steps_before": ["x" * 999]}, "start it with the run"),
    ({"cache_state": 5}, "began with a cache state"),
    (np.array(5), r"x_landed is int64 \[\]; integers \[n, 4\] are needed; record it again"),
    (ROWS[:, :3], r"x_landed is int32 \[1, 3\]"),
    (ROWS * np.nan, "x_landed is float64"),
    (ROWS.astype("M8[s]"), "x_landed is datetime64"),
    (ROWS + np.array([[0, 0, 9, 0]]), r"x_landed row 0 has the layer 10, outside 0\.\.1"),
    (ROWS - [[0, 1, 0, 0]], "the layer before which it landed -1"),
    (ROWS + np.array([[0, 0, 0, 8]]), r"the expert 10, outside 0\.\.7"),
    (ROWS + np.array([[99, 0, 0, 0]]), "the step 100, outside 0..4"),
    (ROWS, "x_landed has expert 2 of layer 1 land before layer 0 of step 1, where no prefetch of it is under way"),
    (ROWS + np.array([[3, 0, 0, 0]]), "land before layer 0 of step 4"),
]


@pytest.mark.parametrize(("change", "said"), DAMAGED, ids=[said[:40] for _, said in DAMAGED])
def test_a_damaged_record_of_a_run_is_one_refusal(change, said, tmp_path):
    trace = recorded([(1, 1)] * 4, layers=2, experts=8, top_k=2, seed=1)
    costs = load_costs("a6000-paper", get_shape("bundled"), "int4-g64")
    planner = Planner("hybrimoe", 2, 8, 2, 3, costs, frequencies=[[1.0] * 8] * 2)
    run = json.loads(json.dumps(run_record(planner, None)))
    about = {"clock": "wall", "run": run}
    replay_run(dataclasses.replace(trace, about=about), "t.npz", save=tmp_path / "s.npz")
    extra = {}
    if isinstance(change, dict):
        ((path, value),) = change.items()
        *path, last = path.split("/")
        holder = run
        for part in path:
            holder = holder[part]
        holder[last] = value
    else:
        extra = {"landed": change}
    with pytest.raises(UserError, match=f"^t.npz: .*{said}"):
        replay_run(dataclasses.replace(trace, about=about, extra=extra), "t.npz", save=tmp_path / "s.npz")


def test_as_recorded_writes_what_it_prints_and_refuses_what_it_would_ignore(tmp_path, capsys):
    live(tmp_path, "hybrimoe", clock="virtual")
    flags = ["--trace", str(tmp_path / "run.npz"), "--as-recorded"]
    assert simulate([*flags, "--out", str(tmp_path / "r.jsonl")]) == 0
    assert (tmp_path / "r.jsonl").read_text() == capsys.readouterr().out
    place = str(tmp_path / "x")
    for flag, value in (("--timeline", place), ("--plots", place), ("--systems", "hybrimoe"), ("--cache", "lru")):
        with pytest.raises(UserError, match=f"^{flag} is not for --as-recorded, .*: leave one out$"):
            simulate([*flags, flag, value])
