"""Both ways of decoding are timed at load, whatever the costs say, and looked at again while steps run."""

from __future__ import annotations

import dataclasses
import time

import pytest
import tiny
from test_fused_decode import all_on_cpu_costs

from hybrimoe_jax.decide.planner import Planner
from hybrimoe_jax.engine import warmup
from hybrimoe_jax.engine.fused.choice import LONGEST_PAUSE, PAUSE, TRIAL, WINDOW, WayChoice
from hybrimoe_jax.engine.fused.decode import FusedDecode
from hybrimoe_jax.engine.fused.forward import FusedForward
from hybrimoe_jax.host_kernels.native import ffi

pytestmark = pytest.mark.skipif(not ffi.available(), reason="no native kernels for jitted programs here")


def misled(config):
    """Costs of a warm-up in a bad moment: by them the device is far the faster where experts are resident."""
    return dataclasses.replace(all_on_cpu_costs(config), alone_expert=1.0, cpu_expert=1.0, look=0.0)


@pytest.fixture
def engine_of_a_bad_moment(monkeypatch):
    def make(**options):
        config = tiny.weights("qwen2_moe")[0]
        monkeypatch.setattr(warmup, "measure", lambda *args, **kwargs: misled(config))
        return tiny.engine(host_kernel="native", profile=None, cache_ratio=0.5, **options)

    return make


def test_the_program_is_kept_where_it_is_the_faster(engine_of_a_bad_moment):
    engine = engine_of_a_bad_moment()
    config = engine.config
    planner = Planner(
        "hybrimoe", len(config.moe_layers), config.num_experts, config.num_experts_per_tok, 4, misled(config)
    )
    assert not planner.all_on_cpu and planner.depth(1) > 0, "by its costs alone"
    assert isinstance(engine._forward, FusedForward) and engine.planner.all_on_cpu and engine.planner.depth(1) == 0
    assert engine.costs.handover >= engine.planner.handover_for_all_on_cpu > 0
    counters = engine.planner.counters
    assert counters.hits == counters.misses == 0, "the steps that were tried are not counted"
    prompt = tiny.prompts(config, (9,))
    dense = tiny.engine(executor="dense")
    assert engine.generate(prompt, max_new_tokens=12).token_ids == dense.generate(prompt, max_new_tokens=12).token_ids


def test_it_is_left_where_layers_one_by_one_are_faster(engine_of_a_bad_moment, monkeypatch):
    logits = FusedDecode.logits
    monkeypatch.setattr(FusedDecode, "logits", lambda *args: time.sleep(0.05) or logits(*args))
    engine = engine_of_a_bad_moment()
    assert not isinstance(engine._forward, FusedForward) and not engine.planner.all_on_cpu
    assert engine.costs == misled(engine.config)
    prompt = tiny.prompts(engine.config, (9,))
    dense = tiny.engine(executor="dense")
    assert engine.generate(prompt, max_new_tokens=12).token_ids == dense.generate(prompt, max_new_tokens=12).token_ids


def test_a_given_profile_is_believed():
    config = tiny.weights("qwen2_moe")[0]
    engine = tiny.engine(host_kernel="native", profile=misled(config), cache_ratio=0.5)
    assert not isinstance(engine._forward, FusedForward) and engine.costs == misled(config)


def test_a_way_that_has_become_slow_is_left_and_taken_again_later(monkeypatch):
    """Tokens are the same whatever happens, and statistics say what did."""
    config = tiny.weights("qwen2_moe")[0]
    engine = tiny.engine(host_kernel="native", profile=all_on_cpu_costs(config))
    forward, prompt = engine._forward, tiny.prompts(config, (9,))
    dense = tiny.engine(executor="dense").generate(prompt, max_new_tokens=100).token_ids
    slow = {"fused": 0.03, "layered": 0.0}
    take, layer_by_layer = forward.fused._take, forward.layered.forward
    monkeypatch.setattr(forward.fused, "_take", lambda *args: time.sleep(slow["fused"]) or take(*args))
    monkeypatch.setattr(
        forward.layered, "forward", lambda *args: time.sleep(slow["layered"]) or delayed(layer_by_layer(*args), slow)
    )
    forward.choice = WayChoice(True, 1e-3, 5e-3)
    first = engine.generate(prompt, max_new_tokens=100)
    assert first.token_ids == dense and not forward.choice.fused
    (switch,) = first.stats.summary()["switches"]
    assert not switch["to_fused"] and switch["layered_s"] < 0.9 * switch["fused_s"]
    assert WINDOW <= first.stats.summary()["fused_steps"] < 60 and first.stats.note is not None
    slow.update(fused=0.0, layered=0.1)
    again = engine.generate(prompt, max_new_tokens=100)
    (switch,) = again.stats.summary()["switches"]
    assert again.token_ids == dense and switch["to_fused"] and forward.choice.fused
    quiet = engine.generate(prompt, max_new_tokens=10)
    assert quiet.stats.summary()["switches"] == [] and quiet.stats.summary()["fused_steps"] == 9


def delayed(result, slow):
    """A step's record as it would be had the step itself been slow."""
    result[2].seconds += slow["layered"]
    return result


def took(choice: WayChoice, fused_s: float, layered_s: float, steps: int) -> list[bool]:
    ways = []
    for _ in range(steps):
        ways.append(choice.fused)
        choice.note(fused_s if choice.fused else layered_s)
    return ways


def test_a_trial_that_changes_nothing_is_repeated_ever_more_rarely():
    choice = WayChoice(True, 1.0, 1.1)  # the other way was timed in a good moment: by now it takes 5.0
    ways = took(choice, 2.0, 5.0, 1000)
    assert TRIAL <= ways.count(False) <= 5 * TRIAL
    took(choice, 1.0, 9.0, TRIAL)
    assert all(took(choice, 1.0, 9.0, 1000))
    assert took(choice, 20.0, 19.0, 8 * LONGEST_PAUSE).count(False) <= 10 * TRIAL


def test_a_change_in_a_bad_moment_does_not_last():
    choice = WayChoice(True, 1.0, 3.0)
    took(choice, 9.0, 7.0, 2 * WINDOW)
    assert not choice.fused, "both are slow beside other work, and this one less so"
    took(choice, 1.0, 3.0, 2 * PAUSE)
    assert choice.fused


def test_a_slow_spell_of_a_few_steps_changes_nothing():
    choice = WayChoice(True, 1.0, 2.0)
    assert all(took(choice, 1.0, 2.0, WINDOW) + took(choice, 50.0, 2.0, 5) + took(choice, 1.0, 2.0, WINDOW - 5))
