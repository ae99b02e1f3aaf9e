"""Both ways of decoding are timed at load, whatever the costs say."""

from __future__ import annotations

import dataclasses
import time

import pytest
import tiny
from test_fused_decode import all_on_cpu_costs

from hybrimoe_jax.decide.planner import Planner
from hybrimoe_jax.engine import warmup
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
