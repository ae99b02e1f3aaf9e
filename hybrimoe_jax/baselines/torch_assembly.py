"""Putting the torch engine together: host memory, slots, lanes, costs, planner, in the order in which they depend."""

from __future__ import annotations

import dataclasses
import time
import weakref
from typing import Any

import torch

from hybrimoe_jax.baselines.torch_costs import Probe, wake_latency
from hybrimoe_jax.baselines.torch_experts import Bank, ExpertKind, Experts
from hybrimoe_jax.baselines.torch_forward import TorchForward
from hybrimoe_jax.baselines.torch_lanes import CudaDevice, Device, Host, InlineDevice, PacedDevice
from hybrimoe_jax.baselines.torch_link import INLINE_WAKES, CudaLink, PacedLink, ThreadLink
from hybrimoe_jax.baselines.torch_model import TorchModel
from hybrimoe_jax.baselines.torch_slots import IN_FLIGHT, STAGING, Slots
from hybrimoe_jax.checkpoint.reader import Checkpoint
from hybrimoe_jax.decide.planner import Planner
from hybrimoe_jax.decide.systems import System
from hybrimoe_jax.engine import budget
from hybrimoe_jax.engine.config import EngineConfig
from hybrimoe_jax.engine.lanes.clock import Clock, PacedClock, VirtualClock, WallClock
from hybrimoe_jax.engine.lanes.host_pace import HostPace
from hybrimoe_jax.engine.lanes.pacing import Pacing
from hybrimoe_jax.engine.lanes.workers import PATIENCE
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.layout import is_format
from hybrimoe_jax.machine.costs import CostModel
from hybrimoe_jax.machine.profile import load_costs
from hybrimoe_jax.machine.shapes import parse_cost_shape, shape_of
from hybrimoe_jax.machine.virtual import VirtualMachine
from hybrimoe_jax.trace.tokens import load_recording

CHOOSING_S = 2.0
"""No form of computing experts is measured any more once choosing took so long."""


@dataclasses.dataclass(kw_only=True)
class Parts:
    """What a torch engine is made of."""

    system: System
    model: TorchModel
    forward: TorchForward
    clock: Clock
    footprint: budget.Footprint
    slots: list[int]
    host_bytes: int
    experts: Experts
    costs: Any
    device: Device
    link: ThreadLink
    host: Host
    notes: list[str]

    def close(self) -> None:
        for part in (self.device, self.link, self.host):
            part.close()

    def overshoot(self, reset: bool = False) -> dict[str, dict[str, float]]:
        """How well each lane of a paced device kept its pace."""
        if not isinstance(self.device, PacedDevice) or not isinstance(self.link, PacedLink):
            return {}
        assert self.host.pace is not None
        lates = {"link": self.link.pace.late, "cpu": self.host.pace.late}
        seen = {"device": self.device.overshoot()} | {lane: dataclasses.asdict(late) for lane, late in lates.items()}
        if reset:
            self.device.reset()
            for late in lates.values():
                late.reset()
        return seen


def system_of(options: EngineConfig) -> System:
    """UserError for a system of which this engine lacks a part."""
    system = options.chosen_system
    if system.stream_prefill:
        raise UserError(f"the PyTorch engine streams no whole layers: system {system.name} needs stream_prefill=False")
    return system


def assemble(
    checkpoint: Checkpoint, options: EngineConfig, device: torch.device, precision: str, max_context: int, trial: Any
) -> Parts:
    """Args: options: of our own engine, as far as it has them. device: torch's. precision: see `torch_linear`.

    trial: parts left out to see what they bring (of `torch_offload.ABLATIONS`).
    """
    config, system = checkpoint.config, system_of(options)
    kind = ExpertKind.of(checkpoint.format, config.hidden_size, config.moe_width, precision, device)
    if "kernels" in trial and kind.int4 is not None:
        kind = dataclasses.replace(kind, int4=None)
    frequencies = checkpoint.frequencies()
    given, cost_bytes = given_costs(options, config, checkpoint.format, kind)
    own_norm = system.predictor == "router-input"
    dense = checkpoint.dense(verify=options.verify)
    model = TorchModel(config, dense, getattr(torch, precision), device, max_context, own_norm)
    expert_bytes = Bank(kind, 0, torch.device("cpu")).expert_bytes
    host = host_banks(checkpoint, kind, pinned=device.type == "cuda" and "pinned" not in trial, verify=options.verify)
    experts = Experts(kind)
    if "forms" not in trial:
        experts.choose_forms(host[0], CHOOSING_S)
    slots, footprint = memory(options, system, model, experts, expert_bytes, max_context, frequencies)
    moved = cost_bytes if cost_bytes is not None else expert_bytes
    if options.cost_shape is not None:  # of that model slots and buffers count, as in our own engine
        buffers = moved * (STAGING + IN_FLIGHT)
        footprint = budget.Footprint(dense=0, kv=0, staging=buffers, workspace=0, slots=moved * sum(slots))

    places = Slots(Bank(kind, sum(slots) + STAGING + IN_FLIGHT, device), len(host))
    clock, lane, link, cpu = lanes(options, device, given, host, places.bank, experts)
    costs = given
    if given is None:
        probe = Probe(model, host, places.bank, link, experts)
        costs = probe.costs(system.max_distance)
    wake_s = wake_latency()
    link.patience_s = PATIENCE * (wake_s + costs.transfer(True))
    if type(link) is ThreadLink:
        link.inline_s, link.expected_s = INLINE_WAKES * wake_s, costs.transfer(True)
    planner = Planner(
        system,
        num_layers=len(host),
        num_experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        slots_per_layer=slots,
        costs=costs,
        frequencies=frequencies,
        recording=load_recording(system.recording),
        max_in_flight=IN_FLIGHT,
    )
    paced = costs if options.paced is not None else None
    layered = (model, planner, places, host, link, lane, cpu, experts, clock, paced, moved, options.debug)
    forward = TorchForward(*layered)
    forward.movement.fill()
    host_bytes = len(host) * config.num_experts * moved
    notes = notes_of(options, device, checkpoint.format, kind)
    return Parts(
        system=system,
        model=model,
        forward=forward,
        clock=clock,
        footprint=footprint,
        slots=slots,
        host_bytes=host_bytes,
        experts=experts,
        costs=costs,
        device=lane,
        link=link,
        host=cpu,
        notes=notes,
    )


def given_costs(options: EngineConfig, config: Any, format: str, kind: ExpertKind) -> tuple[Any, int | None]:
    """The costs of a profile, or None where they are to be measured; and an expert's bytes where these count."""
    shape, fmt = shape_of(config, config.model_type), format
    if options.cost_shape is not None:
        shape, fmt = parse_cost_shape(options.cost_shape)
    counted = shape.expert_bytes(fmt)
    if options.paced is not None:
        return load_costs(options.paced.profile, shape, fmt).slowed(options.paced.slowdown), counted
    if options.profile is None:
        return None, None
    costs = options.profile if isinstance(options.profile, CostModel) else load_costs(options.profile, shape, fmt)
    return costs, counted


def memory(
    options: EngineConfig,
    system: System,
    model: TorchModel,
    experts: Experts,
    expert_bytes: int,
    max_context: int,
    frequencies,
) -> tuple[list[int], budget.Footprint]:
    """-> slots of each MoE layer, and the device's bytes."""
    config, layers = model.config, len(model.moe_layers)
    chunk, workspace = min(options.prefill_chunk, max_context), 0
    if options.budget_bytes is not None:
        experts.most_rows = chunk
        workspace = model.workspace_bytes(chunk, max_context, system.max_distance)
    fixed = budget.Footprint(
        dense=model.nbytes,
        kv=model.cache_bytes(options.max_batch, max_context),
        staging=expert_bytes * (STAGING + IN_FLIGHT),
        workspace=workspace,
    )
    if options.budget_bytes is not None:
        total = budget.slots_within(options.budget_bytes, fixed, expert_bytes, layers * config.num_experts)
        slots = system.slots_for_total(total, layers, config.num_experts, frequencies)
    else:
        ratio = 0.25 if options.cache_ratio is None else options.cache_ratio
        slots = system.slots_per_layer(ratio, layers, config.num_experts, frequencies)
    return slots, dataclasses.replace(fixed, slots=expert_bytes * sum(slots))


class HostBanks(list[Bank]):
    """The experts of each MoE layer in host memory; can be held weakly. `checkpoint`: that they are of."""

    checkpoint: Checkpoint


_held: weakref.WeakValueDictionary[tuple, HostBanks] = weakref.WeakValueDictionary()
"""Of the process: engines of one open checkpoint share its experts, which nobody writes to."""


def host_banks(checkpoint: Checkpoint, kind: ExpertKind, pinned: bool, verify: bool) -> HostBanks:
    """Every MoE layer's experts in host memory: those of another engine where one has the same open checkpoint."""
    key = id(checkpoint), kind, pinned
    if (found := _held.get(key)) is not None:
        return found
    store, cpu = checkpoint.experts(lazy=True, verify=verify, keep=False), torch.device("cpu")
    banks = HostBanks()
    banks.checkpoint = checkpoint  # so that the number stays its own
    for layer in range(store.num_layers):
        bank = Bank(kind, store.num_experts, cpu, pinned)
        for expert in range(store.num_experts):
            bank.fill(expert, store.get(layer, expert))
        banks.append(bank)
    _held[key] = banks
    return banks


def lanes(options: EngineConfig, device: torch.device, given, host: list[Bank], slots: Bank, experts: Experts):
    """-> clock, device, link and host lane."""
    if options.paced is not None:
        clock = PacedClock(Pacing(given), HostPace(given, time.perf_counter))
        return clock, PacedDevice(), PacedLink(host, slots, clock), Host(experts, True, clock.host)
    clock = WallClock() if options.clock == "wall" else VirtualClock(VirtualMachine(given))
    if device.type == "cuda":
        return clock, CudaDevice(), CudaLink(host, slots), Host(experts, True)
    return clock, InlineDevice(), ThreadLink(host, slots), Host(experts, False)


def notes_of(options: EngineConfig, device: torch.device, format: str, kind: ExpertKind) -> list[str]:
    """What a reader of the figures must know."""
    notes = []
    if device.type == "cpu" and options.paced is None and options.clock == "wall":
        notes.append(
            "no GPU and no profile: this measures PyTorch on the CPU, where a transfer is a copy in memory; "
            'device="paced:PROFILE" paces it to a machine'
        )
    if is_format(format) and kind.int4 is None:
        held = str(kind.dtype).removeprefix("torch.")
        why = "" if kind.dtype == torch.bfloat16 else '; torch has fast kernels for precision="bfloat16"'
        notes.append(f"{format} experts are widened to {held} at load{why}")
    elif format == "bf16" and kind.dtype == torch.float32:
        notes.append('bf16 experts are widened to float32 at load; precision="bfloat16" keeps them')
    elif kind.dtype == torch.bfloat16:
        notes.append(f"{kind.note}; activations are rounded to bfloat16, so tokens may differ from the dense model's")
    return notes
