"""Whether decode steps run fused: whole steps of both ways are timed at load, and the faster one is taken.

It is looked at again while steps run (`choice`).

The costs have no say in it. They come from short measurements, one kind of work after another; on a noisy machine they
may say that residents or prefetches are worth leaving the program for where they are not (seen in one start of some
ten beside a busy process; its steps took two to three times as long).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hybrimoe_jax.engine.config import EngineConfig
from hybrimoe_jax.engine.fused.decode import FusedDecode
from hybrimoe_jax.engine.inputs import StepInput
from hybrimoe_jax.engine.lanes.host import HostExecutor
from hybrimoe_jax.engine.programs import Device
from hybrimoe_jax.engine.steps.layered import LayeredForward
from hybrimoe_jax.host_kernels.native import ffi

REPEATS = 5
ENOUGH_S, MOST_REPEATS = 0.1, 25
"""Steps of a small model last a millisecond or two: more of them, since another process may take both cores so long."""


def can_fuse(options: EngineConfig, device: Device, host: HostExecutor) -> bool:
    """Whether a decode step can be one program here.

    It can where the "device" is the CPU, and the native kernel computes single tokens.
    """
    plain = options.executor == "overlapped" and options.clock == "wall" and options.paced is None
    return (
        plain
        and options.slots != "stacked"
        and not (options.debug or options.lazy)
        and device.platform == "cpu"
        and ffi.available()
        and host.kernel.native_handle(host.handle(0, 0)) is not None
    )


def fused_decode(layered: LayeredForward) -> FusedDecode:
    """The program over the experts of `layered`'s host lane."""
    experts = range(layered.model.config.num_experts)
    records = [[_record(layered.host, layer, e) for e in experts] for layer in range(len(layered.model.moe_layers))]
    return FusedDecode(layered.model, [[address for _, address in layer] for layer in records], records[0][0][0])


class WayTimes(NamedTuple):
    """Seconds of whole decode steps both ways, without the first of each, which compiles."""

    fused: list[float]
    layered: list[float]


def time_ways(fused: FusedDecode, layered: LayeredForward, capacity: int) -> WayTimes:
    """Runs decode steps both ways, in turns.

    What `layered`'s planner and slots hold afterwards is of no use: fill the slots anew, and give the engine another
    planner.
    """
    clock = layered.clock
    layered.fill()
    caches = layered.model.init_cache(1, capacity)
    position = np.full((1, 1), capacity // 2, np.int32)
    times = WayTimes([], [])
    for repeat in range(2 * (MOST_REPEATS + 1)):  # other tokens, so that other experts are wanted
        step = StepInput(np.full((1, 1), repeat // 2, np.int32), position, capacity, "decode", np.zeros(1, np.int64))
        start = clock.now()
        if repeat % 2:
            _, caches, _ = layered.forward(step, caches)
        else:
            _, caches, _ = fused.logits(step, caches)
        if repeat > 1:
            times[repeat % 2].append(clock.now() - start)
        if len(times.layered) >= REPEATS and sum(times.fused) + sum(times.layered) > ENOUGH_S:
            break
    layered.link.drain()
    fused.synchronize()
    return times


def is_faster(times: WayTimes) -> bool:
    """Whether the program is: by the fastest step of each, which other processes have slowed least."""
    return min(times.fused) < min(times.layered)


def _record(host: HostExecutor, layer: int, expert: int) -> tuple[int, int]:
    found = host.kernel.native_handle(host.handle(layer, expert))
    if found is None:
        raise TypeError(f"expert {expert} of MoE layer {layer}: the native kernel has no record of it")
    return found
