"""Experts on their way into slots: what lands, what is fetched, what is started for coming layers."""

from __future__ import annotations

import torch

from hybrimoe_jax.baselines.torch_experts import Bank
from hybrimoe_jax.baselines.torch_lanes import Program
from hybrimoe_jax.baselines.torch_link import ThreadLink, Transfer
from hybrimoe_jax.baselines.torch_slots import Slots
from hybrimoe_jax.decide.plan import Fetch, Refused
from hybrimoe_jax.decide.planner import Planner
from hybrimoe_jax.engine.lanes.clock import Clock
from hybrimoe_jax.engine.routing import HostRouting


class Movement:
    """What steps move experts with; the planner says which. Args as of `TorchForward`.

    Attributes: `last`: the device's latest program.
    """

    def __init__(self, planner: Planner, slots: Slots, host_banks: list[Bank], link: ThreadLink, clock: Clock):
        self.planner, self.slots, self.host_banks, self.link, self.clock = planner, slots, host_banks, link, clock
        self.last: Program | None = None

    def land(self) -> int:
        """Prefetches that have landed become resident: how many landed."""
        moved = 0
        if not self.link.busy:
            return moved
        for transfer in self.clock.landed(self.link):  # pyright: ignore[reportArgumentType]  has what clocks ask
            moved += 1
            measured = self.clock.transfer_seconds(transfer)  # pyright: ignore[reportArgumentType]
            victim = self.planner.landed(transfer.layer, transfer.expert, measured)
            if isinstance(victim, Refused):
                self.slots.drop(transfer.layer, transfer.expert)
            else:
                self.slots.keep(transfer.layer, transfer.expert, victim)
        return moved

    def start_fetch(self, moe_layer: int, fetch: Fetch) -> Transfer:
        """Starts a planned demand fetch."""
        slots = self.slots
        place = slots.staging() if fetch.stream else slots.enter(moe_layer, fetch.expert, fetch.victim)
        return self.link.fetch(Transfer(moe_layer, fetch.expert, place, slots.readers.get(place), self.last))

    def wait_for(self, moe_layer: int, fetch: Fetch) -> Transfer:
        """A prefetch that this layer runs: waits until it has landed, and gives it its slot."""
        began = self.clock.now()
        transfer = self.link.wait(moe_layer, fetch.expert)
        measured = self.clock.transfer_seconds(transfer)  # pyright: ignore[reportArgumentType]  has what clocks ask
        if measured is not None:
            self.planner.waited(moe_layer, fetch.expert, measured, self.clock.now() - began)
        if fetch.stream:
            self.slots.drop(moe_layer, fetch.expert)
        else:
            self.slots.keep(moe_layer, fetch.expert, fetch.victim)
        return transfer

    def prefetch(self, moe_layer: int, routing: HostRouting) -> None:
        """Starts the transfers that the planner wants for coming layers."""
        for wanted in self.planner.prefetch(moe_layer, routing.shown()):
            place = self.slots.reserve(wanted.layer, wanted.expert)
            self.link.prefetch(Transfer(wanted.layer, wanted.expert, place, self.slots.readers.get(place)))
            self.clock.prefetch(wanted.layer, wanted.expert)

    def verify(self, moe_layer: int) -> None:
        """Debug: RuntimeError where a slot does not hold the expert it should."""
        if self.last is not None:
            self.last.wait()
        if self.slots.residents(moe_layer) != self.planner.resident(moe_layer):
            raise RuntimeError(f"MoE layer {moe_layer}: the slots and the planner disagree about what is resident")
        for expert in self.slots.residents(moe_layer):
            held = self.slots.bank.data[self.slots.place(moe_layer, expert)].cpu()
            if not torch.equal(held, self.host_banks[moe_layer].data[expert]):
                raise RuntimeError(f"slot of MoE layer {moe_layer} does not hold expert {expert}")

    def fill(self) -> None:
        """Loads every expert that the planner calls resident into empty slots."""
        self.slots.clear()
        with torch.inference_mode():
            for layer in range(self.planner.num_layers):
                for expert in sorted(self.planner.resident(layer)):
                    place = self.slots.enter(layer, expert, None)
                    self.slots.bank.data[place].copy_(self.host_banks[layer].data[expert])
