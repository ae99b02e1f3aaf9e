"""Systems beside the clairvoyant one and the bound; placements; synthetic routing has the statistics it states."""

import dataclasses
import json
from importlib.resources import files

import numpy as np
import pytest
from grids import few

from hybrimoe_jax.decide import SYSTEMS, Problem, get_scheduler, get_system
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.machine.profile import load_profile
from hybrimoe_jax.machine.shapes import SHAPES, get_shape, shape_of
from hybrimoe_jax.simulate.cases import ORACLE, Case
from hybrimoe_jax.simulate.grid import run_case
from hybrimoe_jax.simulate.synthetic import KNOBS, synthetic_of, synthetic_trace
from hybrimoe_jax.trace.analysis import overlap
from hybrimoe_jax.trace.facts import TraceFacts
from hybrimoe_jax.trace.recorder import TraceRecorder

QWEN = "synthetic:qwen2-57b-a14b"


@pytest.mark.parametrize("profile", few(["a6000-paper"], ["a6000-paper", "h100-pcie5"]))
def test_no_system_is_below_the_bound_and_the_oracle_is_below_the_others(profile):
    times = {}
    for system in (*SYSTEMS, ORACLE):
        record = run_case(Case(QWEN, profile, system, 0.25, steps=12))
        times[system] = record["seconds_per_step"]["mean"]
        assert record["bound_seconds_per_step"] <= times[system] * (1 + 1e-9)
        assert any("synthetic" in note for note in record["notes"])
    assert times[ORACLE] <= min(times.values()) * (1 + 1e-9)
    assert times["hybrimoe"] < times["llamacpp"] < times["cpu-only"]


def test_prompts_of_the_oracle_are_foreseen_too():
    times = {
        s: run_case(Case(QWEN, "a6000-paper", s, 0.25, prompt=64, prompts=1))["seconds_per_step"]["mean"]
        for s in ("hybrimoe", ORACLE)
    }
    assert times[ORACLE] <= times["hybrimoe"] * 1.001


def test_a_trace_of_the_bundled_model_is_simulated_as_it_is(tmp_path):
    config = json.loads((files("hybrimoe_jax") / "assets/bundled/config.json").read_text())
    assert SHAPES["bundled"] == shape_of(config, "bundled")
    recorder, rng = TraceRecorder(TraceFacts("qwen2_moe", 6, 32, 4), clock="wall"), np.random.default_rng(0)
    for step in range(3):
        recorder.next_step()
        for layer in range(6):
            ids = rng.permutation(32)[None, :4]
            recorder.add(layer, "decode", sequence=[0], position=[step], ids=ids)
    recorder.save(tmp_path / "run.npz")
    record = run_case(Case(str(tmp_path / "run.npz"), "laptop-8gb", "hybrimoe", 0.25))
    assert record["model"] == "bundled" and record["seconds_per_step"]["mean"] > 0


def test_a_warm_start_knows_more_than_a_cold_one():
    warm, cold = (
        run_case(Case(QWEN, "a6000-paper", "on-demand", 0.5, start=start, steps=6)) for start in ("warm", "cold")
    )
    assert warm["hits"] > cold["hits"] and warm["bytes_h2d"] < cold["bytes_h2d"]


def test_popular_slots_go_where_the_experts_are_asked_for():
    system = get_system("fiddler")
    frequencies = [[9, 8, 7, 0], [1, 1, 1, 1], [5, 0, 0, 2]]
    assert system.slots_per_layer(0.5, 3, 4, frequencies) == [3, 1, 2]
    assert system.slots_per_layer(0.5, 3, 4) == [2, 2, 2]
    assert get_system("powerinfer").slots_for_total(4, 3, 4, frequencies) == [3, 0, 1]


def test_fiddler_asks_of_each_miss_alone_where_it_would_be_done_first():
    costs = load_profile("a6000-paper").costs(get_shape("deepseek-v2-lite"), "int4")
    schedule = get_scheduler("cheaper").schedule(Problem({0: 1, 1: 500, 2: 3}, {0}, costs, 504))
    for expert, load in ((1, 500), (2, 3)):
        assert (expert in schedule.fetch) == (costs.cpu(load) > costs.transfer(True) + costs.device(load))


@pytest.mark.parametrize("name", KNOBS)
def test_synthetic_routing_has_the_statistics_that_are_stated(name):
    trace = synthetic_trace(name, 3, 100)
    assert overlap(trace).mean() == pytest.approx(0.31, abs=0.04)
    assert [trace.recall(d) for d in (1, 2, 3)] == pytest.approx([0.77, 0.735, 0.715], abs=0.03)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gpt-5", "synthetic routing of"),
        ("gpt-oss-20b:skew=1", "by skew and stay only"),
        ("qwen2-57b-a14b:skew", "skew='' is not a number"),
        ("qwen2-57b-a14b:size=3", "has no parameter 'size'"),
        ("qwen2-57b-a14b:stay=1", "below 1"),
    ],
)
def test_synthetic_routing_that_cannot_be_is_refused(name, said):
    with pytest.raises(UserError, match=said):
        run_case(Case(f"synthetic:{name}", "a6000-paper", "hybrimoe", 0.25))


def test_the_knobs_of_synthetic_routing_are_in_its_name():
    trace = synthetic_of("gpt-oss-20b:skew=0,stay=0.9,sequences=3,tokens=20")
    assert trace.facts.layers == 24 and len(np.unique(trace.sequence)) == 3 and trace.position.max() == 19
    lasting, fleeting = (
        overlap(synthetic_of(f"gpt-oss-20b:skew=0,stay={stay},tokens=20")).mean() for stay in (0.9, 0.0)
    )
    assert lasting > 0.5 > 2 * fleeting


def test_whole_sequences_are_measured_and_told_one_by_one():
    case = Case(f"{QWEN}:sequences=8,tokens=4", "a6000-paper", "ktransformers", 0.25, sequences=4)
    record = run_case(case)
    by = record["by_sequence"]
    assert by["steps"] == [4] * 4 and record["sequences"] == 4 and record["steps"] == 16
    assert sum(by["hits"]) == record["hits"] and sum(by["activated"]) == record["hits"] + record["misses"]
    assert sum(by["seconds"]) == pytest.approx(16 * record["seconds_per_step"]["mean"], rel=1e-6)
    fewer = run_case(dataclasses.replace(case, others=1))
    assert fewer["hits"] < record["hits"], "a placement that has seen less text"
    assert run_case(dataclasses.replace(case, sequence_tokens=2))["steps"] == 8
