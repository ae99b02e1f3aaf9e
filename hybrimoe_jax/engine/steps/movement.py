"""Experts on their way into slots: what lands, what is fetched, what is started for coming layers."""

from __future__ import annotations

import jax

from hybrimoe_jax.decide.plan import Fetch, Refused
from hybrimoe_jax.decide.planner import Planner
from hybrimoe_jax.engine.lanes.clock import Clock
from hybrimoe_jax.engine.lanes.slots import Place, SlotPool
from hybrimoe_jax.engine.lanes.transfer import Link, Transfer
from hybrimoe_jax.engine.routing import HostRouting
from hybrimoe_jax.engine.stats import Lanes
from hybrimoe_jax.engine.step import Forward, Pass
from hybrimoe_jax.models.moe import DeviceExpert


class Movement(Forward):
    """What layered steps move experts with; the planner says which. See `LayeredForward` for the arguments."""

    def __init__(self, planner: Planner, pool: SlotPool, link: Link, weights, clock: Clock):
        self.planner, self.pool, self.link, self.weights, self.clock = planner, pool, link, weights, clock
        self.trace = self.timeline = None
        self._lookahead_on = False

    def land(self, run: Pass) -> None:
        """Writes prefetches that have landed into their slots."""
        run.moved = 0
        if not self.link.busy:
            return
        for transfer in self.clock.landed(self.link):
            if self.trace is not None:
                self.trace.landed(run.moe_layer, transfer.layer, transfer.expert)
            run.moved += 1
            self._landed(transfer)

    def settle(self) -> None:
        """Waits for all prefetches under way, between two steps, and gives them slots."""
        for transfer in self.clock.settled(self.link, self.planner.under_way()):
            if self.trace is not None:
                self.trace.landed_between_steps(transfer.layer, transfer.expert)
            self._landed(transfer)

    def _landed(self, transfer: Transfer) -> None:
        self._note(transfer)
        measured = self.clock.transfer_seconds(transfer)
        victim = self.planner.landed(transfer.layer, transfer.expert, measured)
        if not isinstance(victim, Refused):
            self.pool.write(transfer.layer, transfer.expert, transfer.staged, victim)

    def start_fetch(self, moe_layer: int, fetch: Fetch, after: jax.Array | None = None) -> Transfer:
        """Starts a planned demand fetch, behind `after` where copies wait for compute."""
        return self.link.fetch(moe_layer, fetch.expert, self.weights(moe_layer, fetch.expert), after)

    def fetched(self, moe_layer: int, fetch: Fetch, transfer: Transfer) -> Place:
        """The expert in its slot, or in a staging slot when it is only streamed."""
        return self._place(moe_layer, fetch, self.link.arrived(transfer))

    def wait_for(self, moe_layer: int, fetch: Fetch) -> Place:
        """The same for an expert that a prefetch is already moving: waits until it has landed."""
        now = self.link.clock.now
        began = now()
        transfer = self.link.wait(moe_layer, fetch.expert)
        measured = self.clock.transfer_seconds(transfer)
        if measured is not None:
            self.planner.waited(moe_layer, fetch.expert, measured, now() - began)
        self._note(transfer)
        return self._place(moe_layer, fetch, transfer.staged)

    def double_buffered(self, moe_layer: int, expert: int, lanes: Lanes) -> DeviceExpert:
        """The arrays of an expert of the layer's buffer: waits until it has landed.

        The link's seconds are counted here.
        """
        transfer = self.link.streamed(moe_layer, expert)
        lanes.link += transfer.seconds
        self._note(transfer, "stream")
        return transfer.staged

    def prefetch(self, moe_layer: int, routing: HostRouting) -> None:
        """Starts the transfers that the planner wants for coming layers."""
        if not self._lookahead_on or self.planner.backing_off(len(routing.valid)):
            return  # later routers may have been applied for a trace alone
        for wanted in self.planner.prefetch(moe_layer, routing.shown()):
            self.link.prefetch(wanted.layer, wanted.expert, self.weights(wanted.layer, wanted.expert))
            self.clock.prefetch(wanted.layer, wanted.expert)

    def _stream(self, moe_layer: int, experts) -> None:
        """Starts to move a layer's experts into the buffer that the layer before the last has left."""
        if experts:
            self.link.stream(moe_layer, {expert: self.weights(moe_layer, expert) for expert in experts})

    def _place(self, moe_layer: int, fetch: Fetch, staged) -> Place:
        if fetch.stream:
            return self.pool.stream(staged)
        return self.pool.write(moe_layer, fetch.expert, staged, fetch.victim)

    def _note(self, transfer, kind: str = "prefetch") -> None:
        if self.timeline is not None:
            began = max(transfer.began, transfer.free)
            self.timeline.transfer(kind, transfer.layer, transfer.expert, began, transfer.landed)

    def fill(self) -> None:
        """Loads every expert that the planner calls resident into an empty pool."""
        self.pool.clear()
        for layer in range(self.planner.num_layers):
            for expert in sorted(self.planner.resident(layer)):
                self.pool.write(layer, expert, self.link.put(self.weights(layer, expert)), None)
