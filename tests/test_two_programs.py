"""A MoE layer is two programs where slots are stacked: what a decode step dispatches and copies is counted.

The CPU backend's own kernels are switched off, so that what runs is what a GPU runs.
"""

from __future__ import annotations

import collections
import itertools

import jax
import numpy as np
import pytest
import tiny
from grids import few

from hybrimoe_jax.decide.systems import SYSTEMS
from hybrimoe_jax.engine import programs
from hybrimoe_jax.engine.lanes import stacked
from hybrimoe_jax.engine.lanes.transfer import Link
from hybrimoe_jax.engine.steps import layered, overlapped
from hybrimoe_jax.models import products

EXPERTS = ("add_chosen", "write_stacked")
"""Calls for the experts themselves: one each for an expert that crosses the link."""


class Counter:
    """Counts program calls, host arrays that they are passed, and results that are read back."""

    def __init__(self):
        self.counts = collections.Counter()

    def counted(self, name: str, function):
        def call(*args, **kwargs):
            sent = sum(isinstance(leaf, (np.ndarray, np.generic)) for leaf in jax.tree.leaves((args, kwargs)))
            self.counts["experts" if name in EXPERTS else "programs"] += 1
            self.counts["sent"] += sent
            return function(*args, **kwargs)

        return call


@pytest.fixture
def counter(monkeypatch):
    monkeypatch.setattr(products, "native_here", lambda: False)
    monkeypatch.setattr(Link, "lends_arrays", False)
    counter = Counter()
    for owner, name in ((programs, "dense_rows"), (programs, "gathered_rows"), *((stacked, name) for name in EXPERTS)):
        monkeypatch.setattr(owner, name, counter.counted(name, getattr(owner, name)))
    block_program = stacked.block_program
    monkeypatch.setattr(stacked, "block_program", lambda *key: counter.counted("block", block_program(*key)))
    asarray, put = np.asarray, jax.device_put

    class Watched:
        """NumPy, whose `asarray` counts what it reads from the device."""

        def __getattr__(self, name):
            return getattr(np, name)

        def asarray(self, x, *args, **kwargs):
            counter.counts["read"] += isinstance(x, jax.Array)
            return asarray(x, *args, **kwargs)

    for module in (layered, overlapped):
        monkeypatch.setattr(module, "np", Watched())

    def counted_put(x, *args, **kwargs):
        counter.counts["put"] += sum(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(x))
        return put(x, *args, **kwargs)

    monkeypatch.setattr(jax, "device_put", counted_put)
    return counter


def wrap_layers(engine, counter) -> None:
    for layer in engine._parts.model.layers:
        kinds = zip(layer.programs._fields, layer.programs)
        layer.programs = programs.LayerPrograms(
            **{name: function and counter.counted(name, function) for name, function in kinds}
        )


USUAL = [("hybrimoe", 8), ("adapmoe", 1), ("on-demand", 8), ("freetoken", 1), ("cpu-only", 1)]


@pytest.mark.parametrize(("system", "batch"), few(USUAL, itertools.product(SYSTEMS, (8, 1))))
def test_a_decode_layer_is_two_programs_and_a_copy_each_way(system, batch, counter):
    engine = tiny.engine("qwen2_moe", system=system, slots="stacked", cache_ratio=0.5, max_batch=8)
    wrap_layers(engine, counter)
    prompts = tiny.prompts(engine.config, (6,) * batch)
    steps = engine.steps(prompts, max_new_tokens=12)
    for _ in range(4):  # the first compile
        next(steps)
    counter.counts.clear()
    records = [next(steps).stats for _ in range(6)]
    steps.close()
    under_way = len(engine._parts.link._in_flight)
    engine.close()
    layers = [layer for record in records for layer in record.layers]
    counts, crossed = counter.counts, sum(layer.bytes_h2d for layer in layers) // engine._parts.pool.expert_bytes
    assert counts["programs"] <= 2 * len(layers)
    assert counts["read"] <= len(layers) + len(records), "one read-back a layer, and the logits"
    assert counts["sent"] <= len(layers) + 2 * len(records), "the host's part, and each step's ids and last tokens"
    assert counts["experts"] <= 2 * crossed
    arrays = len(jax.tree.leaves(engine._parts.pool.pool))
    assert counts["put"] <= arrays * (crossed + under_way) + len(records), "experts, and each step's positions"
    if system != "cpu-only":
        assert sum(len(layer.device) for layer in layers) > 0


def test_residents_are_dispatched_early_and_only_where_every_plan_keeps_them(monkeypatch):
    """With a CPU five times as slow, a planner that may steal never does; and what lands between layers changes no
    answer."""
    prompt = tiny.prompts(tiny.weights("qwen2_moe")[0], (9,), seed=3)
    dense = tiny.engine("qwen2_moe", executor="dense")
    expected = dense.generate(prompt, max_new_tokens=24).token_ids
    dense.close()
    told = []
    block = stacked.StackedSlots.block

    def noted(self, layer, routed, left_out, pace=None):
        told.append(left_out)
        return block(self, layer, routed, left_out, pace)

    monkeypatch.setattr(stacked.StackedSlots, "block", noted)
    for cpu, early in ((1.0, False), (5.0, True)):
        told.clear()
        profile = tiny.costs(tiny.weights("qwen2_moe")[0], cpu=cpu)
        engine = tiny.engine("qwen2_moe", slots="stacked", profile=profile, cache_ratio=0.5, debug=True)
        out = engine.generate(prompt, max_new_tokens=24)
        assert engine._parts.planner.keeps_residents(1) == early
        assert out.token_ids == expected
        assert any(told) != early, "a CPU that is fast takes residents now and then"
        if early:
            assert out.stats.summary()["prefetch"]["issued"] > 0
        engine.close()
