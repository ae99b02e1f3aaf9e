"""Once an engine is warm, a decode step compiles nothing and leaves nothing behind on the device."""

from __future__ import annotations

import gc

import jax
import pytest
import tiny

from hybrimoe_jax.decide.systems import SYSTEMS
from hybrimoe_jax.engine.lanes.clock import compile_clock

STEPS = 100


def live(engine) -> tuple[int, int]:
    """Arrays on the device and their bytes, without those of prefetches that no slot has taken yet."""
    moving = list(engine._parts.link._in_flight.values())
    for transfer in moving:
        assert transfer.done.wait(30)
    staged = [array for transfer in moving for array in jax.tree.leaves(transfer.staged)]
    arrays = jax.live_arrays()
    return len(arrays) - len(staged), sum(a.nbytes for a in arrays) - sum(a.nbytes for a in staged)


USUAL = ("hybrimoe", "adapmoe", "on-demand", "freetoken")  # each way in which experts cross the link


@pytest.mark.parametrize(
    "system", [name if name in USUAL else pytest.param(name, marks=pytest.mark.slow) for name in SYSTEMS]
)
def test_warm_decode_steps_compile_nothing_and_keep_nothing(system):
    engine = tiny.engine(system=system, cache_ratio=0.5, **({"format": "int4-g32"} if system == "hybrimoe" else {}))
    warm, timed = tiny.prompts(engine.config, (9, 9))
    engine.generate([warm], max_new_tokens=STEPS)
    steps = engine.steps([timed], max_new_tokens=STEPS + 4)
    for _ in range(3):
        next(steps)
    gc.collect()
    before, compiled = live(engine), compile_clock().seconds
    for _ in range(STEPS):
        next(steps)
    assert compile_clock().seconds == compiled
    assert live(engine) == before
    engine.close()
