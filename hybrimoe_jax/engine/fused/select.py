"""Whether decode steps run as one program, and making it: by the planner's costs, or where those say no, by running both ways.

A warm-up's costs come from short measurements, one kind of work after another; on a noisy machine they may say that residents or prefetches are worth
leaving the program for where they are not (seen in one start of some ten beside a busy process; its steps took two to three times as long). So that is not
believed before a step layer by layer was seen to be the faster.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from hybrimoe_jax.decide.planner import Planner
from hybrimoe_jax.engine.config import EngineConfig
from hybrimoe_jax.engine.device_model import DeviceModel
from hybrimoe_jax.engine.fused.decode import WholeStep
from hybrimoe_jax.engine.lanes.host import HostExecutor
from hybrimoe_jax.engine.step import StepInput
from hybrimoe_jax.engine.steps.overlapped import OverlappedForward
from hybrimoe_jax.host_kernels.native import ffi
from hybrimoe_jax.machine.costs import CostModel

REPEATS = 5


def can_be_one_program(options: EngineConfig, device: jax.Device, host: HostExecutor) -> bool:
    """Whether a decode step can be one program here: the "device" is the CPU, and the native kernel computes single tokens."""
    plain = options.executor == "overlapped" and options.clock == "wall" and not (options.debug or options.lazy)
    return (
        plain
        and device.platform == "cpu"
        and ffi.available()
        and host.kernel.native_handle(host.handle(0, 0)) is not None
    )


def whole_step(model: DeviceModel, host: HostExecutor, num_experts: int) -> WholeStep:
    records = [
        [host.kernel.native_handle(host.handle(layer, expert)) for expert in range(num_experts)]
        for layer in range(len(model.moe_layers))
    ]
    return WholeStep(model, [[address for _, address in layer] for layer in records], records[0][0][0])


def decided_by_running(
    forward: OverlappedForward, plan_with: Callable[[CostModel], Planner], costs: CostModel, capacity: int, threads: int
) -> CostModel:
    """Gives `forward`, whose planner would leave the program, the whole step and a planner that does not, if that is the faster way; a planner that
    starts anew in any case. Slots are left empty.

    Returns the costs with a `handover` that says what was seen: that leaving the program costs more than it is believed to save.
    """
    whole, clock, needed = forward.whole, forward.clock, forward.planner.handover_for_all_on_cpu
    whole.calibrate(clock, capacity, threads)
    forward.fill()
    caches = forward.model.init_cache(1, capacity)
    position = np.full((1, 1), capacity // 2, np.int32)
    times: dict[bool, list[float]] = {True: [], False: []}
    for repeat in range(2 * (REPEATS + 1)):  # in turns; other tokens, so that other experts are wanted
        forward.whole = None if repeat % 2 else whole
        step = StepInput(np.full((1, 1), repeat // 2, np.int32), position, capacity, "decode", np.zeros(1, np.int64))
        start = clock.now()
        if repeat % 2:
            _, caches, _ = forward.forward(step, caches)
        else:
            _, caches, _ = whole.logits(step, caches)
        times[forward.whole is not None].append(clock.now() - start)
    forward.link.drain()
    forward.pool.clear()
    forward.whole = None
    if min(times[True][1:]) < min(times[False][1:]):
        forward.whole, costs = whole, dataclasses.replace(costs, handover=max(costs.handover, needed))
    forward.planner = plan_with(costs)
    return costs
