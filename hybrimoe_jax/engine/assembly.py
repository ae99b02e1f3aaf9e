"""Putting an engine together: memory, lanes, costs, planner and executor.

They are made in the order in which they depend on each other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from hybrimoe_jax.decide.planner import Planner
from hybrimoe_jax.decide.systems import System
from hybrimoe_jax.engine import device_memory, exhaustion, mappings, probes, programs, warmup
from hybrimoe_jax.engine.allotment import IN_FLIGHT, STAGING, Allotment
from hybrimoe_jax.engine.checks import check_options, device_format, device_kernel, given_costs
from hybrimoe_jax.engine.config import EngineConfig
from hybrimoe_jax.engine.dense_assembly import dense_parts
from hybrimoe_jax.engine.device_model import DeviceModel
from hybrimoe_jax.engine.fused import select
from hybrimoe_jax.engine.fused.choice import WayChoice
from hybrimoe_jax.engine.fused.forward import FusedForward
from hybrimoe_jax.engine.lanes import threads
from hybrimoe_jax.engine.lanes.clock import PacedClock, VirtualClock, WallClock
from hybrimoe_jax.engine.lanes.host import HostExecutor
from hybrimoe_jax.engine.lanes.host_memory import open_host_memory
from hybrimoe_jax.engine.lanes.host_pace import HostPace
from hybrimoe_jax.engine.lanes.paced_link import PacedLink
from hybrimoe_jax.engine.lanes.pacing import Pacing
from hybrimoe_jax.engine.lanes.slots import SeparateSlots, SlotPool
from hybrimoe_jax.engine.lanes.stacked import StackedSlots
from hybrimoe_jax.engine.lanes.transfer import PATIENCE, Link
from hybrimoe_jax.engine.measurements import DecodeChoice, KeptMeasurements, Measurements
from hybrimoe_jax.engine.parts import Parts
from hybrimoe_jax.engine.start_cache import start_folder
from hybrimoe_jax.engine.steps.callback import CallbackForward
from hybrimoe_jax.engine.steps.layered import LayeredForward
from hybrimoe_jax.engine.steps.overlapped import INLINE_WAKES, OverlappedForward
from hybrimoe_jax.formats.packing import PackedMatrix
from hybrimoe_jax.host_kernels import get_kernel
from hybrimoe_jax.host_kernels.native import library
from hybrimoe_jax.machine.costs import CostModel
from hybrimoe_jax.machine.identity import machine_facts
from hybrimoe_jax.machine.profile import MachineCosts
from hybrimoe_jax.machine.virtual import VirtualMachine
from hybrimoe_jax.models.products import native_here
from hybrimoe_jax.models.target import default_device
from hybrimoe_jax.trace.tokens import load_recording

WARMUP_CAPACITY = 256
NO_BEARING = ("seed", "profile", "verify", "start_cache", "measure_again", "vram_budget")
"""Options that no measurement depends on; a profile counts by its costs, a budget by its slots."""
POLL_WAKES = 8
"""Results are polled for where a layer takes less than this many wake-ups of a thread; longer waits are better slept
through, since a polling thread slows the device's on two hyperthreads of one core."""


def assemble(config, dense, store, options: EngineConfig, max_context: int, frequencies) -> Parts:
    """Args as of `Engine`. Raises UserError where the options cannot be met."""
    mappings.spare()
    cores = threads.split_threads(options.threads, options.executor, options.paced is not None)
    device_memory.limit_allocator(options)
    threads.set_async_dispatch(options.executor)
    check_options(options, config, store.format)
    device = default_device()
    cores = threads.beside(cores, device.platform)
    options = dataclasses.replace(options, vram_budget=device_memory.budget_on(device, options))
    native = options.executor != "dense" and native_here()
    model = exhaustion.without_slots(lambda: DeviceModel(config, dense, device, native=native))
    if options.executor == "dense":
        return exhaustion.without_slots(lambda: dense_parts(model, store, options, device, cores, max_context))
    made = _HybridAssembly(model, store, options, options.chosen_system, device, cores, max_context, frequencies)
    return exhaustion.with_fewer_slots(made.parts, made.give_up_before_the_start)


class _HybridAssembly:
    """Each part is made once those that it depends on are there: the order of the attributes.

    What takes device memory beside the model is made by `parts`, again with fewer slots where there was not enough.
    """

    def __init__(self, model, store, options: EngineConfig, system: System, device, cores, max_context, frequencies):
        self.model, self.store, self.options, self.system = model, store, options, system
        self.recording = load_recording(system.recording)
        self.cores, self.frequencies, self.device, config = cores, frequencies, device, model.config
        self.expert_format = device_format(store.format, device.platform, options, config)
        model.own_norm = system.predictor == "router-input"
        model.device_kernel = device_kernel(options.device_kernel, self.expert_format)
        self.dtype = np.dtype(np.float32) if self.expert_format == "f32" else store.dtype
        self.given = given_costs(options, config, self.expert_format)
        self.expert_bytes = self.given.shape.expert_bytes(self.given.format)
        model.sends_input = self._stacked()
        memory = Allotment(model, store.layout, options, system, self.expert_bytes, self.dtype, max_context)
        self.fixed, self.slots = memory.fixed, memory.slots(frequencies)
        self.given_up = 0

    def _make(self) -> None:
        """Slots and lanes, and what is measured of them."""
        options, store, device, given, config = self.options, self.store, self.device, self.given, self.model.config
        pooled, wall = self.system.scope == "pooled", self._wall(given.costs)
        self.pool = self._pool(self.dtype, pooled)
        here = options.clock == "wall" and options.paced is None
        found = given.costs.host_memory if here and isinstance(given.costs, CostModel) else None
        memory = open_host_memory(options.host_memory, found, store, device)
        self.link = PacedLink(device, wall, memory) if isinstance(wall, PacedClock) else Link(device, wall, memory)
        threads.limit_blas(1)
        kernel = get_kernel(options.host_kernel, sample=store.get(0, 0))
        self.host = HostExecutor(kernel, store.get, self.cores.total, self.cores.host, wall, pace=wall.host)
        self.wake_s = probes.wake_latency(self.host, config.hidden_size)
        self.fusible = select.can_fuse(options, device, self.host)
        self.measuring_s = 0.0
        self.kept = KeptMeasurements(start_folder(options.start_cache), self._facts(given.costs))
        self.measured = Measurements() if options.measure_again else self.kept.read()
        self.costs = given.costs or self._measured_costs()
        self.link.patience_s = PATIENCE * (self.wake_s + self.costs.transfer(True))
        self.host.expected = self.wake_s, self.costs
        self.clock = wall if options.clock == "wall" else VirtualClock(VirtualMachine(self.costs))

    def give_up_before_the_start(self, why: str) -> None:
        """Lets go of what was made, and has fewer slots made the next time."""
        self._keep_fewer(why)
        made = self.__dict__
        for part in (made.pop("host", None), made.pop("link", None)):
            if part is not None:
                part.close()
        made.pop("pool", None)

    def _shrink(self, layered: LayeredForward, why: str) -> tuple[Planner, list[int]]:
        """Has an executor go on with fewer slots: a planner that goes on counting, and the slots of each layer."""
        if self.given_up:
            raise exhaustion.still(why)
        self._keep_fewer(why)
        planner = self._planner(layered.planner)
        layered.start_anew(planner, self._verifier(planner) if self.options.debug else None, self.slots)
        return planner, self.slots

    def _keep_fewer(self, why: str) -> None:
        total = sum(self.slots)
        if not total:
            raise exhaustion.still(why)
        kept, config = exhaustion.fewer(total), self.model.config
        self.slots = self.system.slots_for_total(kept, len(self.slots), config.num_experts, self.frequencies)
        self.given_up = total - sum(self.slots)
        exhaustion.say(why, self.given_up, total)

    def _wall(self, given: CostModel | MachineCosts | None) -> WallClock:
        """This machine's clock, or that of its device slowed to the given costs."""
        if self.options.paced is None or given is None:
            return WallClock()
        return PacedClock(Pacing(given), HostPace(given, time.perf_counter))

    def _pool(self, dtype, pooled: bool) -> SlotPool:
        """Slots as the device wants them."""
        config = self.model.config
        lies = (self.slots, config.hidden_size, config.moe_width, dtype, STAGING, self.store.layout, pooled)
        if self.model.sends_input:
            return StackedSlots(*lies, kernel=self.model.device_kernel, num_experts=config.num_experts)
        return SeparateSlots(*lies, kernel=self.model.device_kernel)

    def _stacked(self) -> bool:
        """Whether all slots are to lie in one buffer."""
        options, gpu = self.options, self.device.platform != "cpu" or self.options.paced is not None
        if options.slots == "auto":
            return gpu and options.executor != "callback"
        return options.slots == "stacked"

    def parts(self) -> Parts:
        self._make()
        layered = forward = self._layered()
        if self.fusible and self._may_fuse(layered.planner):
            forward = self._select(layered)
            layered = forward.layered if isinstance(forward, FusedForward) else forward
        layered.fill()
        if self.measuring_s:
            self.kept.write(self.measured)
        kernel = self.model.device_kernel
        if self.options.executor != "callback":
            kernel = programs.runs(self.pool.arrays(self.pool.some(1)[0]), kernel)
        return Parts(
            options=self.options,
            system=self.system,
            device=self.device,
            model=self.model,
            forward=forward,
            clock=self.clock,
            footprint=dataclasses.replace(self.fixed, slots=self.expert_bytes * sum(self.slots)),
            cores=self.cores,
            expert_format=self.expert_format,
            device_kernel=kernel,
            slots=self.slots,
            slots_given_up=self.given_up,
            shrink=functools.partial(self._shrink, layered),
            measuring_s=self.measuring_s,
            lookahead=self.system.max_distance,
            wake_s=self.wake_s,
            fusible=self.fusible,
            planner=layered.planner,
            costs=self.costs,
            pool=self.pool,
            link=self.link,
            host=self.host,
        )

    def _measured_costs(self) -> CostModel:
        """What is kept, or what the warm-up measures."""
        costs = self.measured.costs
        if costs is None:
            lanes = probes.EngineLanes(self.model, self.pool, self.link, self.host, self.store.get)
            inline_s, distance = INLINE_WAKES * self.wake_s, self.system.max_distance
            with self._measuring():
                costs = warmup.measure(lanes, inline_s, distance, self.fusible)
            self.measured = Measurements(costs)
        return costs

    def _facts(self, given: CostModel | MachineCosts | None) -> list[str]:
        """All that a measurement may depend on."""
        fields = (field.name for field in dataclasses.fields(self.options) if field.name not in NO_BEARING)
        return [
            *machine_facts([library.path()]),
            *(repr(part) for part in (self.cores, self.system, self.slots, self.fusible, self.store.format)),
            *(repr(part) for part in (self.model.config, self.expert_format, given, self.host.kernel.describe())),
            *(f"{name} {getattr(self.options, name)!r}" for name in fields),
            f"{self.device.platform} {self.device.device_kind} {self.pool.expert_bytes}",
            *(f"{name} {_form(array)}" for layer in self.model.layers for name, array in layer.params.items()),
        ]

    def _planner(self, before: Planner | None = None) -> Planner:
        return Planner(
            self.system,
            num_layers=len(self.model.moe_layers),
            num_experts=self.model.config.num_experts,
            top_k=self.model.config.num_experts_per_tok,
            slots_per_layer=self.slots,
            costs=self.costs,
            frequencies=self.frequencies,
            max_in_flight=IN_FLIGHT,
            recording=self.recording,
            counts_of=before,
        )

    def _layered(self) -> LayeredForward:
        planner, layer_s = self._planner(), self.costs.layer(1)
        lanes = (self.model, planner, self.pool, self.link, self.host, self.store.get, self.clock, self.expert_bytes)
        verify = self._verifier(planner) if self.options.debug else None
        if self.options.executor == "callback":
            return CallbackForward(*lanes, self.system.max_distance, verify)
        polls = threads.available_cores() > 1 and layer_s < POLL_WAKES * self.wake_s
        spin_s = 2 * layer_s if polls else 0.0
        return OverlappedForward(*lanes, self.system.max_distance, verify, wake_s=self.wake_s, spin_s=spin_s)

    def _may_fuse(self, planner: Planner) -> bool:
        """Whether plans give single tokens' experts to the CPU, or would if leaving the program cost enough.

        A given profile is believed: it says what the machine is, and so what is planned.
        """
        return planner.all_on_cpu or (self.options.profile is None and planner.handover_for_all_on_cpu is not None)

    def _select(self, layered: LayeredForward) -> LayeredForward | FusedForward:
        """The executor, with a planner that starts anew: fused decode where it was the faster or may turn out so."""
        kept, planner = self.measured.decode, layered.planner
        if kept is not None and not kept.fused and not planner.all_on_cpu:
            return layered
        fused = select.fused_decode(layered)
        if kept is not None and planner.all_on_cpu:
            fused.threads, fused.max_steps = kept.threads, kept.max_steps
            return FusedForward(fused, layered, WayChoice(kept.fused, kept.fused_s, kept.layered_s))
        with self._measuring():
            fused.calibrate(self.clock, WARMUP_CAPACITY, self.cores.total)
            times = select.time_ways(fused, layered, WARMUP_CAPACITY)
        faster, needed = select.is_faster(times), planner.handover_for_all_on_cpu
        if faster and needed is not None and isinstance(self.costs, CostModel):
            # what was seen: leaving the program costs more than it is believed to save
            self.costs = dataclasses.replace(self.costs, handover=max(self.costs.handover, needed))
        medians = statistics.median(times.fused), statistics.median(times.layered)
        measured = self.costs if isinstance(self.costs, CostModel) and self.measured.costs else None
        self.measured = Measurements(measured, DecodeChoice(faster, fused.threads, fused.max_steps, *medians))
        layered = self._layered()
        if not layered.planner.all_on_cpu:
            return layered
        return FusedForward(fused, layered, WayChoice(faster, *medians))

    @contextlib.contextmanager
    def _measuring(self) -> Iterator[None]:
        clock = self.host.clock
        start, compiled = clock.now(), clock.compile_seconds()
        yield
        self.measuring_s += clock.now() - start - (clock.compile_seconds() - compiled)

    def _verifier(self, planner: Planner) -> Callable[[int], None]:
        def verify(moe_layer: int) -> None:
            if self.pool.residents(moe_layer) != planner.resident(moe_layer):
                raise RuntimeError(f"MoE layer {moe_layer}: the slots and the planner disagree about what is resident")
            self.pool.verify(moe_layer, lambda expert: self.store.get(moe_layer, expert))

        return verify


def _form(array: jax.Array | PackedMatrix) -> str:
    return repr(array.layout) if isinstance(array, PackedMatrix) else f"{array.dtype} {array.shape}"
