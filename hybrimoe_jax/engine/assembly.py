"""Putting an engine together: memory, lanes, costs, planner and executor, in the order in which they depend on each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from hybrimoe_jax.decide.layer_stream import BUFFERED_LAYERS
from hybrimoe_jax.decide.plan import Counters
from hybrimoe_jax.decide.planner import Planner
from hybrimoe_jax.decide.systems import System, get_system
from hybrimoe_jax.engine import budget, programs, warmup
from hybrimoe_jax.engine.config import EngineConfig
from hybrimoe_jax.engine.device_model import DeviceModel
from hybrimoe_jax.engine.fused import select
from hybrimoe_jax.engine.fused.forward import FusedForward
from hybrimoe_jax.engine.lanes import threads
from hybrimoe_jax.engine.lanes.clock import Clock, VirtualClock, WallClock
from hybrimoe_jax.engine.lanes.host import HostExecutor
from hybrimoe_jax.engine.lanes.slots import SlotPool
from hybrimoe_jax.engine.lanes.transfer import Link, parts_of
from hybrimoe_jax.engine.stats import RunStats
from hybrimoe_jax.engine.step import DenseForward, Forward
from hybrimoe_jax.engine.steps.callback import CallbackForward
from hybrimoe_jax.engine.steps.layered import LayeredForward
from hybrimoe_jax.engine.steps.overlapped import INLINE_WAKES, OverlappedForward
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats import sizes
from hybrimoe_jax.formats.layout import is_format
from hybrimoe_jax.host_kernels import get_kernel
from hybrimoe_jax.machine.costs import CostModel
from hybrimoe_jax.machine.profile import load_costs
from hybrimoe_jax.machine.shapes import shape_of
from hybrimoe_jax.machine.virtual import VirtualMachine
from hybrimoe_jax.models.parameters import split
from hybrimoe_jax.models.products import native_here
from hybrimoe_jax.models.registry import build_model
from hybrimoe_jax.trace.tokens import load_recording

STAGING = 2
"""Staging slots: one fills while the other is read."""
IN_FLIGHT = 2
"""Prefetches on their way at once; each holds one expert's bytes on the device until it is committed."""
WARMUP_CAPACITY = 256
LOGIT_ROWS = 16
"""Tokens whose logits `Engine.logits` holds on the device at once."""
POLL_WAKES = 8
"""Results are polled for where a layer takes less than this many wake-ups of a thread; longer waits are better slept
through, since a polling thread slows the device's on two hyperthreads of one core."""


@dataclasses.dataclass(kw_only=True)
class Parts:
    """What an engine is made of. `slots`: of each MoE layer. `lookahead`: layers at most. The dense executor has no planner,
    costs, pool, link and host lane."""

    options: EngineConfig
    system: System
    device: jax.Device
    model: DeviceModel
    forward: Forward
    clock: Clock
    footprint: budget.Footprint
    cores: threads.ThreadBudget
    expert_format: str
    device_kernel: str
    slots: list[int]
    lookahead: int = 0
    planner: Planner | None = None
    costs: CostModel | None = None
    pool: SlotPool | None = None
    link: Link | None = None
    host: HostExecutor | None = None

    def new_stats(self) -> RunStats:
        experts = self.model.config.num_experts * len(self.model.moe_layers)
        return RunStats(
            system=self.system.name,
            executor=self.options.executor,
            cache_ratio=sum(self.slots) / experts if experts else 0.0,
            clock=self.options.clock,
            host_kernel=self.host.kernel.describe() if self.host else {},
            device_kernel=self.device_kernel,
            cores=dataclasses.asdict(self.cores),
            costs=self.costs.describe() if self.costs else {},
            slots=self.slots,
            expert_format=self.expert_format,
        )

    def counters(self) -> Counters:
        """The planner's totals so far (all zero for the dense executor)."""
        return dataclasses.replace(self.planner.counters) if self.planner else Counters()

    def predicted(self) -> list[tuple[int, int]]:
        """By distance from 1: experts predicted so far, and how many of them were activated."""
        accuracy = self.planner.accuracy if self.planner else None
        return list(zip(accuracy.predicted, accuracy.came_true))[1:] if accuracy else []

    def close(self) -> None:
        for part in (self.host, self.link):
            if part is not None:
                part.close()


def assemble(config, dense, store, options: EngineConfig, max_context: int, frequencies) -> Parts:
    """Args as of `Engine`. Raises UserError where the options cannot be met."""
    cores = threads.split_threads(options.threads, options.executor)
    threads.set_async_dispatch(options.executor)
    device, wall = jax.devices()[0], WallClock()
    model = DeviceModel(config, dense, device, native=options.executor != "dense" and native_here())
    if options.executor == "dense":
        return _dense_parts(model, store, options, device, cores, max_context, wall)
    system = get_system(options.system).override(
        cache=options.cache,
        scheduler=options.scheduler,
        prefetch=options.prefetch,
        lookahead=options.lookahead,
        predictor=options.predictor,
        scope=options.cache_scope,
        stream_prefill=options.stream_prefill,
    )
    model.own_norm, model.device_kernel = system.predictor == "router-input", options.device_kernel
    expert_format, dtype = device_format(store, device)
    check_device_kernel(options.device_kernel, device, expert_format)
    fixed, slots = _memory(model, store, system, options, max_context, frequencies, expert_format)
    pool = SlotPool(slots, config.hidden_size, config.moe_width, dtype, STAGING, store.layout, system.scope == "pooled")
    link = Link(device, wall)
    threads.limit_blas(1)
    kernel = get_kernel(options.host_kernel, sample=store.get(0, 0))
    host = HostExecutor(kernel, store.get, cores.total, cores.host, wall)
    wake_s = warmup.wake_latency(host, config.hidden_size)
    fusible = select.can_fuse(options, device, host)
    costs = _costs(options, model, pool, link, host, store, wake_s, system.max_distance, expert_format, fusible)

    recording = load_recording(system.recording)

    def plan_with(costs: CostModel) -> Planner:
        return Planner(
            system,
            num_layers=len(model.moe_layers),
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            slots_per_layer=slots,
            costs=costs,
            frequencies=frequencies,
            recording=recording,
            max_in_flight=IN_FLIGHT,
        )

    clock = wall if options.clock == "wall" else VirtualClock(VirtualMachine(costs))

    def layered_with(planner: Planner, costs: CostModel) -> LayeredForward:
        lanes = (model, planner, pool, link, host, store.get, clock, system.max_distance)
        verify = _verifier(pool, planner, store) if options.debug else None
        if options.executor == "callback":
            return CallbackForward(*lanes, verify)
        polls = threads.available_cores() > 1 and costs.layer(1) < POLL_WAKES * wake_s
        return OverlappedForward(*lanes, verify, wake_s=wake_s, spin_s=2 * costs.layer(1) if polls else 0.0)

    layered, planner, fused = layered_with(plan_with(costs), costs), None, None
    if fusible and _may_fuse(layered.planner, options):
        layered, costs, fused = _select(layered, plan_with, layered_with, costs, cores.total)
    layered.fill()
    planner = layered.planner
    emulated = options.executor == "callback"
    return Parts(
        options=options,
        system=system,
        device=device,
        model=model,
        forward=layered if fused is None else FusedForward(fused, layered),
        clock=clock,
        footprint=dataclasses.replace(fixed, slots=pool.expert_bytes * sum(slots)),
        cores=cores,
        expert_format=expert_format,
        device_kernel=options.device_kernel if emulated else programs.runs(pool.some(1)[0], options.device_kernel),
        slots=slots,
        lookahead=system.max_distance,
        planner=planner,
        costs=costs,
        pool=pool,
        link=link,
        host=host,
    )


def _may_fuse(planner: Planner, options: EngineConfig) -> bool:
    """Whether plans give single tokens' experts to the CPU, or would if leaving the program cost enough. A given profile is believed:
    it says what the machine is, and so what is planned."""
    return planner.all_on_cpu or (options.profile is None and planner.handover_for_all_on_cpu is not None)


def _select(layered: LayeredForward, plan_with: Callable, layered_with: Callable, costs: CostModel, all_threads: int):
    """-> the executor of layers, the costs that its planner has, and the fused decode where that was the faster."""
    fused, needed = select.fused_decode(layered), layered.planner.handover_for_all_on_cpu
    fused.calibrate(layered.clock, WARMUP_CAPACITY, all_threads)
    if not select.is_faster(fused, layered, WARMUP_CAPACITY):
        fused = None
    elif needed is not None:  # what was seen: leaving the program costs more than it is believed to save
        costs = dataclasses.replace(costs, handover=max(costs.handover, needed))
    return layered_with(plan_with(costs), costs), costs, fused


def _verifier(pool: SlotPool, planner: Planner, store) -> Callable[[int], None]:
    def verify(moe_layer: int) -> None:
        if pool.residents(moe_layer) != planner.resident(moe_layer):
            raise RuntimeError(f"MoE layer {moe_layer}: the slots and the planner disagree about what is resident")
        pool.verify(moe_layer, lambda expert: store.get(moe_layer, expert))

    return verify


def device_format(store, device: jax.Device) -> tuple[str, np.dtype]:
    """The format, and its arrays' type, of experts on the device: as in host memory, but float32 for plain ones on the CPU backend."""
    if store.layout is None and device.platform == "cpu":
        return "f32", np.dtype(np.float32)
    return store.format, store.dtype


def check_device_kernel(kernel: str, device: jax.Device, expert_format: str) -> None:
    """Raises UserError where `kernel` cannot compute experts of this format on the device."""
    if kernel == "xla":
        return
    if not is_format(expert_format):
        raise UserError(f"device kernel {kernel!r} computes quantised experts, and these are {expert_format}; use xla")
    from hybrimoe_jax.models import packed_triton

    if not packed_triton.available():
        raise UserError(
            f"device kernel {kernel!r} needs the Triton backend of Pallas, which jax {jax.__version__} has not; use xla"
        )
    if kernel == "pallas" and device.platform == "cpu":
        raise UserError("device kernel 'pallas' needs a GPU, and jax finds none; use xla")


def _memory(
    model: DeviceModel, store, system: System, options: EngineConfig, max_context: int, frequencies, expert_format: str
) -> tuple[budget.Footprint, list[int]]:
    """-> device bytes of all but the slots, and the slots of each MoE layer."""
    config, layers, lookahead = model.config, len(model.moe_layers), system.max_distance
    expert_bytes = sizes.expert_bytes(config.hidden_size, config.moe_width, expert_format)
    buffers = BUFFERED_LAYERS * config.num_experts if system.stream_prefill else 0
    chunk, quantised = min(options.prefill_chunk, max_context), store.layout is not None
    fixed = budget.Footprint(
        dense=model.nbytes,
        kv=model.cache_bytes(options.max_batch, max_context),
        staging=expert_bytes * (2 * STAGING + (IN_FLIGHT if lookahead else 0) + buffers),
        workspace=budget.workspace_bytes(
            config, options.max_batch, chunk, max_context, lookahead, LOGIT_ROWS, quantised
        ),
    )
    if options.budget_bytes is not None:
        total = budget.slots_within(options.budget_bytes, fixed, expert_bytes, layers * config.num_experts)
        return fixed, system.slots_for_total(total, layers, config.num_experts, frequencies)
    ratio = 0.25 if options.cache_ratio is None else options.cache_ratio
    return fixed, system.slots_per_layer(ratio, layers, config.num_experts, frequencies)


def _costs(options, model, pool, link, host, store, wake_s, lookahead, expert_format, fusible) -> CostModel:
    """Those of the profile, or what the warm-up measures."""
    if options.profile is None:
        inline_s = INLINE_WAKES * wake_s
        return warmup.measure(model, pool, link, host, store.get, WARMUP_CAPACITY, inline_s, lookahead, fusible)
    costs = options.profile
    if not isinstance(costs, CostModel):
        costs = load_costs(costs, shape_of(model.config, model.config.model_type), expert_format)
    if costs.expert_bytes != pool.expert_bytes:
        raise UserError(
            f"profile {options.profile}: measured with experts of {costs.expert_bytes} bytes, this model's have "
            f"{pool.expert_bytes}; measure it again with this model"
        )
    return costs


def _dense_parts(model: DeviceModel, store, options, device, cores, max_context: int, clock: WallClock) -> Parts:
    if options.vram_budget is not None:
        raise UserError("the dense executor keeps every expert on the device: it takes no vram_budget")
    config = model.config
    graphdef, abstract = split(build_model(config))
    flat = {"model.embed_tokens.weight": model.table, "model.norm.weight": model.norm, "lm_head.weight": model.head}
    for index, layer in enumerate(model.layers):
        flat |= {f"model.layers.{index}.{name}": array for name, array in layer.params.items()}
    weights = []
    for layer in model.layers:
        if layer.moe_layer is None:
            weights.append(None)
            continue
        experts = [store.get(layer.moe_layer, expert) for expert in range(config.num_experts)]
        stacked = jax.tree.map(lambda *parts: np.stack(parts), *map(parts_of, experts))
        weights.append(jax.device_put(stacked, device))
    held = sum(a.nbytes for a in jax.tree.leaves(weights))
    chunk, quantised = min(options.prefill_chunk, max_context), store.layout is not None
    work = budget.workspace_bytes(config, 1, chunk, max_context, 0, LOGIT_ROWS, quantised)
    return Parts(
        options=options,
        system=get_system(options.system),
        device=device,
        model=model,
        forward=DenseForward(graphdef, {name: flat[name] for name in abstract}, weights, clock),
        clock=clock,
        footprint=budget.Footprint(model.nbytes, model.cache_bytes(1, max_context), 0, work, held),
        cores=cores,
        expert_format=device_format(store, device)[0],
        device_kernel="xla",
        slots=[config.num_experts] * len(model.moe_layers),
    )
