"""Once an engine is warm, a decode step compiles nothing and leaves nothing behind on the device."""

from __future__ import annotations

import gc

import jax
import numpy as np
import pytest
import tiny

from hybrimoe_jax.decide.systems import SYSTEMS
from hybrimoe_jax.engine import programs
from hybrimoe_jax.engine.lanes.clock import compile_clock
from hybrimoe_jax.engine.lanes.stacked import StackedSlots


def live(engine) -> tuple[int, int]:
    """Arrays on the device and their bytes, without those of prefetches that no slot has taken yet."""
    moving = list(engine._parts.link._in_flight.values())
    for transfer in moving:
        assert transfer.done.wait(30)
    staged = [array for transfer in moving for array in jax.tree.leaves(transfer.staged)]
    arrays = jax.live_arrays()
    return len(arrays) - len(staged), sum(a.nbytes for a in arrays) - sum(a.nbytes for a in staged)


USUAL = [("adapmoe", "separate"), ("on-demand", "separate"), ("hybrimoe", "stacked"), ("freetoken", "stacked")]
"""Each way in which experts cross the link, and both ways in which slots lie."""
CASES = [(system, slots) for system in SYSTEMS for slots in ("separate", "stacked")]


@pytest.mark.parametrize(
    ("system", "slots"), [case if case in USUAL else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]
)
def test_warm_decode_steps_compile_nothing_and_keep_nothing(system, slots, pytestconfig):
    count = 100 if pytestconfig.getoption("slow") or pytestconfig.getoption("nightly") else 40
    engine = tiny.engine(system=system, slots=slots, cache_ratio=0.5)
    warm, timed = tiny.prompts(engine.config, (9, 9))
    engine.generate([warm], max_new_tokens=count)
    steps = engine.steps([timed], max_new_tokens=count + 4)
    for _ in range(3):
        next(steps)
    gc.collect()
    before, compiled = live(engine), compile_clock().seconds
    for _ in range(count):
        next(steps)
    assert compile_clock().seconds == compiled
    assert live(engine) == before
    engine.close()


@pytest.mark.parametrize(("slots", "most"), [("separate", programs.SLOTS_PER_CALL), ("stacked", 2)])
def test_few_programs_serve_any_number_of_slots(slots, most):
    """So that none is compiled in the middle of a run because a layer's hits were never so many before."""
    engine = tiny.engine(slots=slots, cache_ratio=1.0)
    pool, layer, k = engine._parts.pool, engine._parts.model.moe_layers[0], engine.config.num_experts_per_tok
    x, ids, weights = np.ones((1, 32), np.float32), np.arange(k, dtype=np.int32)[None], np.ones((1, k), np.float32)
    routed = programs.Routed(*jax.device_put((x, ids, weights), jax.devices()[0]))
    before = tiny.executables()
    if isinstance(pool, StackedSlots):  # which takes those out that the CPU computes
        for left_out in range(k + 1):
            pool.block(layer, routed, list(range(left_out)))
    else:
        rows, weights = dict.fromkeys(range(8), np.zeros(1, int)), dict.fromkeys(range(8), np.ones(1, np.float32))
        for count in range(1, 9):
            pool.add(routed.x, routed, [(expert, pool.get(0, expert)) for expert in range(count)], rows, weights)
    assert tiny.executables() - before <= most
    engine.close()


def test_a_layer_without_host_experts_compiles_nothing_anew():
    engine = tiny.engine()
    program, forward = jax.jit(lambda acc, host: acc + host), engine._forward
    program(forward.zeros(1), np.ones((1, 32), np.float32))
    compiled = compile_clock().seconds
    assert not np.asarray(program(forward.zeros(1), forward.no_host_part(1))).any()
    assert compile_clock().seconds == compiled
    engine.close()
