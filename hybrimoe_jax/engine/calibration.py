"""The paper's warm-up, whole: every kind of work by everything it depends on, on an engine's own lanes.

`engine.warmup` takes the few points that a load can wait for, with the same code.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from hybrimoe_jax.engine import memory_kinds
from hybrimoe_jax.engine.checks import device_name, given_costs
from hybrimoe_jax.engine.probes import EngineLanes
from hybrimoe_jax.engine.steps.overlapped import INLINE_WAKES
from hybrimoe_jax.engine.warmup import CONTEXT, Plan, Taker, grid, sample
from hybrimoe_jax.machine.calibration import Calibration
from hybrimoe_jax.machine.fit import Samples, fit
from hybrimoe_jax.machine.origin import Origin

if TYPE_CHECKING:
    from hybrimoe_jax.engine.engine import Engine
    from hybrimoe_jax.engine.parts import Parts
    from hybrimoe_jax.trace.columns import Trace

LOADS = (2, 4, 8, 16, 64, 128)
WHOLE = Plan(
    cpu=(*grid((1,), (1, 2, 4, 8)), *grid(LOADS, (1, 4))),
    alone=(*grid((1,), (1, 2, 4, 8)), *grid(LOADS, (1, 4))),
    device=(*grid((1,), (0, 1, 2, 4, 8)), *grid((4, 16, 64, 128), (0, 1, 4))),
    layer=(*grid((1, 4, 16, 64, 128), (CONTEXT,)), *grid((1, 64), (1024, 4096)), (128, 1024)),
    shares=(1 / 16, 1 / 4, 1 / 2),
    repeats=(3, 200),
    point_s=0.1,
    dear_s=0.3,
)
ROUND_S = 15.0
"""All points are taken a second time if the first one was over by then: what disturbs the machine comes and goes."""
BY_THREADS = (1, 16)
"""Loads at which an expert is timed by threads."""
STEPS, ROUTING_S = 32, 6.0
PROMPTS = ("Shall I compare thee to a summer's day?", "The time has come to speak of many things:")
"""Of `record_routing`: tokens, and seconds after which they must do."""

Show = Callable[[Iterable[str], int, str], Iterable[str]]


def calibrate(engine: Engine, show: Show = lambda kinds, total, label: kinds, plan: Plan = WHOLE) -> Calibration:
    """Measures an engine that has just been loaded; under a minute where an expert takes milliseconds.

    Args: show: is handed what the measurements come from, how many they are at most and a label; a progress bar.
    """
    parts = engine._parts
    assert parts.pool is not None and parts.link is not None and parts.host is not None, "the dense executor has none"
    lanes = EngineLanes(parts.model, parts.pool, parts.link, parts.host, engine.store.get)
    samples, most = Samples(lanes.expert_bytes), engine.max_context
    places = tuple((tokens, context) for tokens, context in plan.layer if max(tokens, context) <= most)
    plan = Plan(**{**vars(plan), "layer": places or ((1, most),)})
    every = _points(lanes, samples, plan, parts)
    total = 2 * sum(map(len, (plan.cpu, plan.alone, plan.device, plan.layer))) + 4 * len(plan.shares or ()) + 14
    for _ in show(every, total, "measuring"):
        pass
    given = given_costs(engine.options, engine.config, parts.expert_format)
    origin = Origin.here(device_name(parts.device, engine.options), given.shape, given.format)
    costs = fit(samples, source=f"calibrated on {origin.machine}")
    if parts.device.platform == "cpu":
        return Calibration(costs, origin, tuple(samples.points))
    memory = memory_kinds.seconds_by_memory(parts.device, lanes.expert_bytes, lanes.now)
    costs = dataclasses.replace(costs, host_memory=memory_kinds.fastest(memory) or "")
    return Calibration(costs, origin, tuple(samples.points), memory)


def record_routing(engine: Engine, tokens: int = STEPS) -> Trace:
    """What the model itself chooses while it writes on from two prompts, so many tokens each if there is time."""
    from hybrimoe_jax.engine.recording import EngineTrace

    most = max(1, engine.max_context - tokens - 1)
    if engine.tokenizer is not None:
        prompts = [engine.tokenizer.encode(text)[:most] for text in PROMPTS]
    else:
        prompts = [list(range(start, start + min(most, 16))) for start in (0, engine.config.vocab_size // 2)]
    trace, began = EngineTrace(engine), time.perf_counter()
    engine.record(trace)
    steps = engine.steps(prompts, max_new_tokens=tokens + 1, temperature=0.8)
    try:
        for number, _ in enumerate(steps):
            if number >= 2 and time.perf_counter() - began > ROUTING_S:
                break
    finally:
        steps.close()
        engine.record(None)
    return trace.recorder.trace()


def _points(lanes: EngineLanes, samples: Samples, plan: Plan, parts: Parts) -> Iterator[str]:
    """What a warm-up takes, and what no figure of the cost model comes from."""
    lanes_of = (lanes, samples, plan, INLINE_WAKES * parts.wake_s, parts.lookahead, parts.fusible)
    began = lanes.now()
    yield from sample(*lanes_of)
    if lanes.now() - began < ROUND_S:
        yield from sample(*lanes_of)
    taker, most = Taker(lanes, samples, plan), parts.cores.total
    threads = [*(1 << power for power in range(most.bit_length()) if 1 << power < most), most]
    yield from taker.take("threads", [(load, count) for load in BY_THREADS for count in threads], lanes.cpu_by_threads)
    beside = grid((1, 16), (4,))
    yield from taker.take("cpu_alone", beside, lanes.cpu)
    with lanes.beside_link():
        yield from taker.take("cpu_link_busy", beside, lanes.cpu)
    yield from taker.take("again", plan.cpu[:1], lanes.cpu)
