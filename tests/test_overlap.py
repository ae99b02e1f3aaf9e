"""Host and device experts really run side by side: with both slowed to 50 ms, a layer takes far less than their sum."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import pytest
import tiny

from hybrimoe_jax.engine import programs
from hybrimoe_jax.engine.lanes import host

pytestmark = pytest.mark.alone
SLOWED = 0.050
LIMIT = 0.75
"""Of the sum of both slowdowns. The device's changes with the processor's speed: it is timed before and after."""


def device_delay(seconds: float):
    """-> (a jitted function, array -> the same array after a loop of about `seconds`; one that times it now).

    Its products are large enough for XLA:CPU not to call the program cheap: a cheap one is run by the thread that
    dispatches it, as soon as its inputs are there.
    """
    weights = jnp.ones((32, 64), jnp.float32) / 32

    @jax.jit
    def spin(x, steps):
        def body(carry):
            i, total = carry
            return i + 1, total * 0.999 + jnp.sum(jnp.sin(x[:1] @ weights + total))

        _, total = jax.lax.while_loop(lambda carry: carry[0] < steps, body, (0, jnp.float32(0)))
        return x + 0 * total

    x = jnp.ones((1, 32), jnp.float32)

    def fastest(steps: int) -> float:
        times = []
        for _ in range(6):
            start = time.perf_counter()
            jax.block_until_ready(spin(x, steps))
            times.append(time.perf_counter() - start)
        return min(times)

    steps = 1000
    while (took := fastest(steps)) < seconds / 4:
        steps *= 2
    steps = int(steps * seconds / took)
    return lambda array: spin(array, steps), lambda: fastest(steps)


@pytest.fixture
def slowed_engine(monkeypatch):
    """One MoE layer, so that a decode step is one MoE block; half its experts resident, the others the CPU's."""
    monkeypatch.setitem(tiny.CONFIGS, "one_layer", {**tiny.CONFIGS["qwen2_moe"], "num_hidden_layers": 1})
    costs = tiny.costs(tiny.weights("one_layer")[0], cpu=1000)  # worth a worker thread, as 50 ms are
    engine = tiny.engine("one_layer", system="ktransformers", cache_ratio=0.5, profile=costs)
    prompts = tiny.prompts(engine.config, (9, 9))
    engine.generate(prompts, max_new_tokens=24)  # compiled beforehand
    run_experts, dense_rows = host.run_experts, programs.dense_rows
    delay, time_delay = device_delay(SLOWED)

    def slow_host(*args):
        time.sleep(SLOWED)
        return run_experts(*args)

    def slow_device(acc, x, *rest, **options):
        return dense_rows(acc, delay(x), *rest, **options)

    monkeypatch.setattr(host, "run_experts", slow_host)
    monkeypatch.setattr(programs, "dense_rows", slow_device)
    engine.generate(prompts, max_new_tokens=2)  # compiles the delay for this batch
    yield engine, prompts, time_delay
    engine.close()


def best_step(engine, prompts, time_delay) -> tuple[float, float, float]:
    """The seconds of the fastest step with experts in both lanes, and the least and the most of the slowdowns' sum.

    The best step counts: whatever else runs on the machine lengthens steps, and nothing shortens one.
    """
    before = time_delay()
    steps = engine.generate(prompts, max_new_tokens=24).stats.steps[1:]
    sums = SLOWED + before, SLOWED + time_delay()
    both = [step for step in steps if step.layers[0].cpu and 1 <= len(step.layers[0].device) <= 4]
    assert len(both) >= 8, "too few steps use both lanes to tell"
    for step in both:
        assert step.layers[0].lanes.cpu >= SLOWED
        assert step.layers[0].lanes.device >= 0.5 * SLOWED
    return min(step.seconds for step in both), min(sums), max(sums)


def test_a_step_takes_as_long_as_the_slower_lane(slowed_engine):
    seconds, _, most = best_step(*slowed_engine)
    assert seconds < LIMIT * most


@pytest.mark.slow
def test_without_overlap_the_same_step_takes_the_sum(slowed_engine, monkeypatch):
    """So that the test above is about something: waiting for the device at dispatch makes every step miss the limit."""
    dispatch = programs.dense_rows
    monkeypatch.setattr(programs, "dense_rows", lambda *args, **kw: jax.block_until_ready(dispatch(*args, **kw)))
    seconds, least, _ = best_step(*slowed_engine)
    assert seconds > LIMIT * least
