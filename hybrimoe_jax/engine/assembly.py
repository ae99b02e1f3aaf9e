"""Putting an engine together: memory, slots, costs, planner and executor, in the order in which they depend on each other."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from hybrimoe_jax.decide.layer_stream import BUFFERED_LAYERS
from hybrimoe_jax.decide.plan import Counters
from hybrimoe_jax.decide.planner import Planner
from hybrimoe_jax.decide.systems import System, get_system
from hybrimoe_jax.engine import budget, programs, warmup
from hybrimoe_jax.engine.config import EngineConfig
from hybrimoe_jax.engine.device_model import DeviceModel
from hybrimoe_jax.engine.fused.select import can_be_one_program, decided_by_running, whole_step
from hybrimoe_jax.engine.lanes import threads
from hybrimoe_jax.engine.lanes.clock import WallClock
from hybrimoe_jax.engine.lanes.host import HostExecutor
from hybrimoe_jax.engine.lanes.slots import SlotPool
from hybrimoe_jax.engine.lanes.transfer import Link, parts_of
from hybrimoe_jax.engine.stats import RunStats
from hybrimoe_jax.engine.step import DenseForward, Forward
from hybrimoe_jax.engine.steps.callback import CallbackForward
from hybrimoe_jax.engine.steps.layered import HybridForward
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

STAGING = 2
"""Staging slots: one fills while the other is read."""
IN_FLIGHT = 2
"""Prefetches on their way at once; each holds one expert's bytes on the device until it is committed."""
WARMUP_CAPACITY = 256
POLL_WAKES = 8
"""Results are polled for where a layer takes less than this many wake-ups of a thread; longer waits are better slept
through, since a polling thread slows the device's on two hyperthreads of one core."""
TRACE_LOOKAHEAD = 6
"""Distances that a trace records whatever the system looks ahead, so that it can replay every system."""


@dataclasses.dataclass
class Parts:
    """What an engine is made of."""

    options: EngineConfig
    system: System
    device: jax.Device
    model: DeviceModel
    forward: Forward
    footprint: budget.Footprint
    cores: threads.ThreadBudget
    expert_format: str
    device_kernel: str
    lookahead: int = 0
    slots: list[int] = dataclasses.field(default_factory=list)
    planner: Planner | None = None
    costs: CostModel | None = None
    pool: SlotPool | None = None
    link: Link | None = None
    host: HostExecutor | None = None

    def init_cache(self, batch: int, capacity: int):
        return self.model.init_cache(batch, capacity)

    def cache_bytes(self, batch: int, capacity: int) -> int:
        return self.model.cache_bytes(batch, capacity)

    def record(self, trace, timeline) -> None:
        if not isinstance(self.forward, HybridForward):
            if trace is not None or timeline is not None:
                raise UserError("the dense executor routes inside one executable: it gives no trace and no timeline")
            return
        self.forward.trace = trace
        if self.forward.machine is None:
            self.forward.timeline, self.host.detailed = timeline, timeline is not None
        else:
            self.forward.machine.timeline = timeline
        self.forward.lookahead = max(self.lookahead, TRACE_LOOKAHEAD) if trace is not None else self.lookahead

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

    def settle(self) -> None:
        """Plans what a step has left to be planned."""
        if isinstance(self.forward, HybridForward):
            self.forward.settle()

    def counters(self) -> Counters:
        """The planner's totals so far (all zero for the dense executor)."""
        self.settle()
        return dataclasses.replace(self.planner.counters) if self.planner else Counters()

    def predicted(self) -> list[tuple[int, int]]:
        """By distance from 1: experts predicted so far, and how many of them were activated."""
        self.settle()
        accuracy = self.planner.accuracy if self.planner else None
        return list(zip(accuracy.predicted, accuracy.came_true))[1:] if accuracy else []

    def close(self) -> None:
        for part in (self.host, self.link):
            if part is not None:
                part.close()


def assemble(config, dense, store, options: EngineConfig, max_context: int, frequencies) -> Parts:
    """Args as of `Engine`. Raises UserError where the options cannot be met."""
    system = get_system(options.system)
    cores = threads.split_threads(options.threads, options.executor)
    threads.set_async_dispatch(options.executor)
    device, clock = jax.devices()[0], WallClock()
    model = DeviceModel(config, dense, device, native=options.executor != "dense" and native_here())
    if options.executor == "dense":
        return _dense_parts(config, model, store, options, system, device, cores, max_context, clock)

    system = system.override(
        cache=options.cache,
        scheduler=options.scheduler,
        prefetch=options.prefetch,
        lookahead=options.lookahead,
        predictor=options.predictor,
        scope=options.cache_scope,
        stream_prefill=options.stream_prefill,
    )
    lookahead = system.max_distance
    model.own_norm = system.predictor == "router-input"
    num_layers = len(model.moe_layers)
    expert_format, dtype = device_format(store, device)
    check_device_kernel(options.device_kernel, device, expert_format)
    model.device_kernel = options.device_kernel
    expert_bytes = sizes.expert_bytes(config.hidden_size, config.moe_width, expert_format)
    buffers = BUFFERED_LAYERS * config.num_experts if system.stream_prefill else 0
    fixed = budget.Footprint(
        dense=model.nbytes,
        kv=model.cache_bytes(options.max_batch, max_context),
        staging=expert_bytes * (2 * STAGING + (IN_FLIGHT if lookahead else 0) + buffers),
        workspace=budget.workspace_bytes(
            config,
            options.max_batch,
            min(options.prefill_chunk, max_context),
            max_context,
            lookahead,
            16,
            store.layout is not None,
        ),
    )
    slots = _slots(system, options, fixed, expert_bytes, num_layers, config.num_experts, frequencies)
    pooled = system.scope == "pooled"
    pool = SlotPool(slots, config.hidden_size, config.moe_width, dtype, STAGING, store.layout, pooled)
    link = Link(device, clock)
    threads.limit_blas(1)
    kernel = get_kernel(options.host_kernel, sample=store.get(0, 0))
    host = HostExecutor(kernel, store.get, cores.total, cores.host, clock)
    wake_s = warmup.wake_latency(host, config.hidden_size)
    one_program = can_be_one_program(options, device, host)
    costs = _costs(
        options, model, pool, link, host, store, INLINE_WAKES * wake_s, lookahead, expert_format, one_program
    )

    def plan_with(costs: CostModel) -> Planner:
        return Planner(
            system,
            num_layers=num_layers,
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            slots_per_layer=slots,
            costs=costs,
            frequencies=frequencies,
            max_in_flight=IN_FLIGHT,
        )

    planner = plan_with(costs)

    def verify(moe_layer: int) -> None:
        if pool.residents(moe_layer) != planner.resident(moe_layer):
            raise RuntimeError(f"MoE layer {moe_layer}: the slots and the planner disagree about what is resident")
        pool.verify(moe_layer, lambda expert: store.get(moe_layer, expert))

    shared = dict(
        model=model,
        planner=planner,
        pool=pool,
        link=link,
        weights=store.get,
        clock=clock,
        lookahead=lookahead,
        verify=verify if options.debug else None,
        machine=VirtualMachine(costs) if options.clock == "virtual" else None,
    )
    if options.executor == "callback":
        forward: Forward = CallbackForward(**shared, host=host)
    else:
        polls = threads.available_cores() > 1 and costs.layer(1) < POLL_WAKES * wake_s
        spin_s = 2 * costs.layer(1) if polls else 0.0
        forward = OverlappedForward(**shared, host=host, wake_s=wake_s, spin_s=spin_s)
        if one_program and (
            planner.all_on_cpu or (options.profile is None and planner.handover_for_all_on_cpu is not None)
        ):
            forward.whole = whole_step(model, host, config.num_experts)
            if planner.all_on_cpu:
                forward.whole.calibrate(clock, WARMUP_CAPACITY, cores.total)
            else:
                costs = decided_by_running(forward, plan_with, costs, WARMUP_CAPACITY, cores.total)
                planner = forward.planner
    forward.fill()
    footprint = dataclasses.replace(fixed, slots=expert_bytes * sum(slots))
    return Parts(
        options,
        system,
        device,
        model,
        forward,
        footprint,
        cores,
        expert_format,
        options.device_kernel
        if options.executor == "callback"
        else programs.runs(pool.some(1)[0], options.device_kernel),
        lookahead,
        slots,
        planner,
        costs,
        pool,
        link,
        host,
    )


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


def _slots(system, options, fixed, expert_bytes, num_layers, num_experts, frequencies) -> list[int]:
    if options.budget_bytes is None:
        ratio = 0.25 if options.cache_ratio is None else options.cache_ratio
    else:
        total = budget.slots_within(options.budget_bytes, fixed, expert_bytes, num_layers * num_experts)
        return system.slots_for_total(total, num_layers, num_experts, frequencies)
    return system.slots_per_layer(ratio, num_layers, num_experts, frequencies)


def _costs(
    options, model, pool, link, host, store, inline_s: float, lookahead: int, expert_format: str, one_program: bool
) -> CostModel:
    if options.profile is not None:
        if isinstance(options.profile, CostModel):
            costs = options.profile
        else:
            costs = load_costs(options.profile, shape_of(model.config, model.config.model_type), expert_format)
        if costs.expert_bytes != pool.expert_bytes:
            raise UserError(
                f"profile {options.profile}: measured with experts of {costs.expert_bytes} bytes, this model's have "
                f"{pool.expert_bytes}; measure it again with this model"
            )
        return costs
    return warmup.measure(model, pool, link, host, store.get, WARMUP_CAPACITY, inline_s, lookahead, one_program)


def _dense_parts(config, model, store, options, system, device, cores, max_context, clock) -> Parts:
    if options.vram_budget is not None:
        raise UserError("the dense executor keeps every expert on the device: it takes no vram_budget")
    module = build_model(config)
    graphdef, abstract = split(module)
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
    forward = DenseForward(graphdef, {name: flat[name] for name in abstract}, weights, clock)
    held = sum(a.nbytes for a in jax.tree.leaves(weights))
    chunk = min(options.prefill_chunk, max_context)
    work = budget.workspace_bytes(config, 1, chunk, max_context, 0, 16, store.layout is not None)
    footprint = budget.Footprint(model.nbytes, model.cache_bytes(1, max_context), 0, work, held)
    slots = [config.num_experts] * len(model.moe_layers)
    expert_format = device_format(store, device)[0]
    return Parts(options, system, device, model, forward, footprint, cores, expert_format, "xla", 0, slots)
