"""A cache state: a run that goes on from a file does what the run that wrote it would have done, live and in replay."""

from __future__ import annotations

import dataclasses
import json
import random
from collections import deque

import numpy as np
import pytest
import tiny
from cache_state_cases import costs, planner_for, short_trace
from test_trace_command import recorded

from hybrimoe_jax.__main__ import command_main
from hybrimoe_jax.decide.cache import MRS, POLICIES
from hybrimoe_jax.decide.cache_state import load_state, take_state
from hybrimoe_jax.decide.prefetch.prediction import Prediction, Predictor
from hybrimoe_jax.decide.prefetch.predictors import PREDICTORS
from hybrimoe_jax.decide.systems import SYSTEMS, get_system
from hybrimoe_jax.engine.recording import EngineTrace
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.machine.virtual import VirtualMachine
from hybrimoe_jax.simulate.recorded import replay_run
from hybrimoe_jax.simulate.replay import replay, settle
from hybrimoe_jax.simulate.workload import recorded_steps
from hybrimoe_jax.trace.file import save_trace


@pytest.fixture(scope="module")
def trace():
    return short_trace()


class Remembers(MRS):
    """A policy of one's own that keeps more than heat."""

    def __init__(self, *args, **common):
        super().__init__(*args, **common)
        self.seen, self.chance = {}, random.Random(3)

    def update(self, scores, loads):
        super().update(scores, loads)
        self.seen[self.step] = set(loads)
        for expert in self.seen.get(self.step - 2, ()):
            self.heat[expert] += self.chance.random()


class Before(Predictor):
    """A predictor of one's own: the layer is asked for what it was asked for two steps ago."""

    def __init__(self, *model):
        super().__init__(*model)
        self.chosen = [deque(maxlen=2) for _ in range(self.num_layers)]

    def predict(self, layer, shown, depth):
        self.chosen[layer].append(np.unique(shown.ids))
        ahead = (self.chosen[layer + d] for d in range(1, self.max_distance(layer, depth) + 1))
        return [Prediction(dict.fromkeys(past[0].tolist(), 1) if past else {}) for past in ahead]


CHOICES = [
    ("hybrimoe", {"cache": Remembers, "predictor": Before}),
    *[("hybrimoe", {"cache": name}) for name in POLICIES],
    *[("hybrimoe", {"predictor": name}) for name in PREDICTORS if name != "perfect"],
    *[(name, {}) for name in SYSTEMS],
    ("freetoken", {"cache": "echo"}),
]


@pytest.mark.parametrize(("system", "parts"), CHOICES, ids=lambda value: str(value))
def test_a_replay_that_goes_on_from_a_file_is_the_one_that_was_never_broken_off(system, parts, trace, tmp_path):
    """Step for step, hit for hit, for every built-in rule: from half of the trace on."""
    steps = list(recorded_steps(trace))
    system = get_system(system).override(**parts)
    whole, machine = planner_for(system, trace.facts), VirtualMachine(costs())
    replay(whole, machine, steps[:16])
    settle(whole, machine)
    take_state(whole, trace.facts).save(tmp_path / "s.npz")
    fresh, other = planner_for(system, trace.facts), VirtualMachine(costs())
    load_state(tmp_path / "s.npz").restore(fresh, trace.facts)
    assert [fresh.resident(layer) for layer in range(4)] == [whole.resident(layer) for layer in range(4)]
    went_on, warm = replay(whole, machine, steps[16:]), replay(fresh, other, steps[16:])
    assert [(s.hits, s.misses) for s in warm.steps] == [(s.hits, s.misses) for s in went_on.steps]
    np.testing.assert_allclose([s.seconds for s in warm.steps], [s.seconds for s in went_on.steps])
    for planner, lanes in ((whole, machine), (fresh, other)):
        settle(planner, lanes)
    assert take_state(fresh, trace.facts).digest == take_state(whole, trace.facts).digest


def test_a_cold_start_is_not_a_warm_one(trace):
    """Else the test above could not fail."""
    steps = list(recorded_steps(trace))
    whole, machine = planner_for("hybrimoe", trace.facts), VirtualMachine(costs())
    replay(whole, machine, steps[:16])
    settle(whole, machine)
    went_on = replay(whole, machine, steps[16:])
    anew = replay(planner_for("hybrimoe", trace.facts), VirtualMachine(costs()), steps[16:])
    assert [s.hits for s in went_on.steps] != [s.hits for s in anew.steps]


@pytest.fixture(scope="module")
def prompts():
    return tiny.prompts(tiny.weights("qwen2_moe")[0], (9, 5), seed=3)


LIVE = [
    {"system": "hybrimoe", "clock": "virtual"},
    pytest.param({"system": "adapmoe", "clock": "virtual", "cache": "s3-fifo"}, marks=pytest.mark.slow),
    {"system": "on-demand"},
]


@pytest.mark.parametrize("options", LIVE, ids=["hybrimoe", "adapmoe", "on-demand"])
def test_a_live_warm_start_does_what_the_run_would_have_done(options, prompts, tmp_path):
    def made(engine):
        out = engine.generate([prompts[1]], max_new_tokens=5)
        return out.token_ids, [[(layer.hits, layer.misses) for layer in step.layers] for step in out.stats.steps]

    first = tiny.engine("qwen2_moe", cache_ratio=0.4, debug=True, **options)
    first.generate([prompts[0]], max_new_tokens=8)
    first.save_cache_state(tmp_path / "s.npz")
    second = tiny.engine("qwen2_moe", cache_ratio=0.4, debug=True, **options)
    cold = tiny.engine("qwen2_moe", cache_ratio=0.4, **options)
    second.load_cache_state(tmp_path / "s.npz")
    went_on, warm, anew = made(first), made(second), made(cold)
    assert warm == went_on
    assert warm[0] == anew[0], "placement changes no token"
    assert warm[1] != anew[1]
    for engine in (first, second, cold):
        engine.close()


def test_a_recorded_run_is_replayed_from_the_state_that_it_began_with(prompts, tmp_path):
    """And ends with the state that the run ended with."""
    options = {"system": "hybrimoe", "clock": "virtual", "cache_ratio": 0.4}
    first = tiny.engine("qwen2_moe", **options)
    first.generate([prompts[0]], max_new_tokens=8)
    first.save_cache_state(tmp_path / "s.npz")
    engine = tiny.engine("qwen2_moe", **options)
    engine.load_cache_state(tmp_path / "s.npz")
    recorder = EngineTrace(engine)
    engine.record(recorder)
    with pytest.raises(UserError, match="loaded before recording begins"):
        engine.load_cache_state(tmp_path / "s.npz")
    stats = engine.generate([prompts[1]], max_new_tokens=6).stats
    engine.save_cache_state(tmp_path / "end.npz")
    trace = recorder.recorder.trace()
    with pytest.raises(UserError, match="began with a cache state; give that file with --load-cache-state"):
        replay_run(trace)
    with pytest.raises(UserError, match="not the cache state that the run"):
        replay_run(trace, "t.npz", load_state(tmp_path / "end.npz"))
    _, result = replay_run(trace, "t.npz", load_state(tmp_path / "s.npz"), tmp_path / "again.npz")
    assert [s.hits for s in result.steps] == [step.total("hits") for step in stats.steps]
    assert load_state(tmp_path / "again.npz").digest == load_state(tmp_path / "end.npz").digest
    for made in (first, engine):
        made.close()


def test_simulate_saves_and_goes_on(trace, tmp_path, capsys):
    """All sequences of two traces, in two runs or in one: the same hits."""
    one_token = recorded([(2, 2), *[(1, 0)] * 9, *[(0, 1)] * 9], layers=4, experts=16, top_k=3, seed=7)
    halves = [one_token.select(one_token.sequence == n) for n in (0, 1)]
    both = [tmp_path / name for name in ("whole.npz", "a.npz", "b.npz")]
    for path, part in zip(both, (one_token, *halves)):
        save_trace(part, path)
    flags = ["--systems", "hybrimoe", "--cache-ratios", "0.4", "--starts", "cold", "--shape", "toy"]
    state, runs = str(tmp_path / "s.npz"), []
    monkey = pytest.MonkeyPatch()
    shape = tiny_shape(4, 16, 3)
    monkey.setattr("hybrimoe_jax.simulate.cases.get_shape", lambda _: shape)
    for path, more in zip(
        both,
        (["--save-cache-state", str(tmp_path / "x.npz")], ["--save-cache-state", state], ["--load-cache-state", state]),
    ):
        out = tmp_path / "r.jsonl"
        command_main("simulate")(["--trace", str(path), *flags, *more, "--out", str(out)])
        runs.append(json.loads(out.read_text()))
    monkey.undo()
    whole, first, second = runs
    assert whole["hits"] == first["hits"] + second["hits"] and whole["steps"] == first["steps"] + second["steps"]
    assert second["start"] == "loaded" and any("one run" in note for note in whole["notes"])
    with pytest.raises(UserError, match="of one run, and these flags ask for 2"):
        command_main("simulate")(["--trace", str(both[0]), *flags[:2], "--cache-ratios", "0.2,0.4", "--starts", "cold",
                                  "--save-cache-state", state])  # fmt: skip


def tiny_shape(layers: int, experts: int, top_k: int):
    from hybrimoe_jax.machine.shapes import get_shape

    return dataclasses.replace(get_shape("bundled"), layers=layers, experts=experts, top_k=top_k)
