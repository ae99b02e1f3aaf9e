"""The overlapped executor: device work is dispatched first, host experts compute while it runs.

Fetches land beside both.

Measured: a host callback inside one executable blocks all of it, while separate dispatches overlap (82 + 123 ms alone,
145 ms together). So a layer is: shared experts dispatched, and the residents with them where the costs prove that every
plan gives them to the device; then, once the routing is read, demand fetches issued, other residents dispatched, host
experts started, the fetched experts dispatched behind their transfers, prefetches issued into idle link time, and only
then the host's part collected.
"""

from __future__ import annotations

import jax
import numpy as np

from hybrimoe_jax.decide.plan import LayerPlan
from hybrimoe_jax.engine import programs
from hybrimoe_jax.engine.device_model import DeviceLayer
from hybrimoe_jax.engine.lanes.host import HostWork, Pending
from hybrimoe_jax.engine.lanes.slots import Experts, Place
from hybrimoe_jax.engine.lanes.stacked import StackedSlots, finder
from hybrimoe_jax.engine.lanes.transfer import Transfer
from hybrimoe_jax.engine.programs import Routed
from hybrimoe_jax.engine.routing import HostRouting
from hybrimoe_jax.engine.stats import Lanes
from hybrimoe_jax.engine.steps.layered import LayeredForward

AHEAD = 2
"""Demand fetches under way at once: one moves while the next waits behind it."""
INLINE_WAKES = 4
"""Host experts shorter than this many wake-ups of a thread are not handed to one."""


class OverlappedForward(LayeredForward):
    """See `LayeredForward`.

    Args:
      wake_s: what handing work to a worker thread and waiting for it costs (measured at load).
      spin_s: how long to poll for a result before sleeping until it comes. A sleeping thread is woken late and with
        cold caches:
        polling made a decode step of small layers 1.2 times faster (2 cores). 0 where there is but one core.

    Host work whose experts take less than a few times that each is done by this thread once everything else has been
    dispatched: small experts spend most of their time in Python, which two threads cannot run at once.
    """

    def __init__(self, *args, wake_s: float, spin_s: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.inline_s, self.spin_s = INLINE_WAKES * wake_s, spin_s
        self._wall = self.link.clock
        self._unfinished: tuple | None = None
        """Of the layer before: when its device work began and its result, when its fetches began and the last of
        them."""
        self._found: list[int] = []
        """The residents that the layer's block runs, for the timeline: known once there is a plan."""

    def early(self, tokens: int, rows: int) -> bool:
        found = finder(self.pool, rows) is not None
        return found and self.clock.real and self.planner.keeps_residents(tokens)

    def dispatch_block(self, run, layer: DeviceLayer, routed: Routed) -> jax.Array | None:
        self._working_from, self._found = self._working(), []
        if self.timeline is not None:
            self.timeline.watch("device", f"attention {run.moe_layer}", run.began, routed.x, layer=run.moe_layer)
        pool = finder(self.pool, len(routed.x))
        if pool is not None:
            return self._block(run, pool, layer, routed, []) if run.early else None
        if layer.programs.shared is None:
            return None
        dispatched = self._wall.now()
        block = layer.programs.shared(layer.params, routed.x, self.clock.pacing.block(run.tokens, len(routed.x)))
        if self.timeline is not None:
            self.timeline.watch("device", "shared", dispatched, block, layer=run.moe_layer)
        return block

    def carry_out(self, run, lanes, layer, routed: Routed, block, routing: HostRouting, plan: LayerPlan) -> None:
        moe_layer, transfers = run.moe_layer, {}
        for fetch in plan.fetch[:AHEAD]:  # before the compute that would be queued in front of them
            transfers[fetch.expert] = self.start_fetch(moe_layer, fetch, block)
        acc = self._residents(run, layer, routed, block, routing, plan)
        pending = self._start_host(routed, plan, routing, moe_layer)
        link_start = self._working()
        acc, fetched = self._add_arrivals(acc, routed, plan, routing, moe_layer, lanes, transfers)
        if self.verify is not None:
            self.verify(moe_layer)
        self.prefetch(moe_layer, routing)
        run.host_part = self._collect_host(pending, len(routed.x), routing, moe_layer, lanes)
        run.device_part = acc
        self._unfinished = (self._working_from, acc, link_start, fetched)

    def read(self, result: jax.Array, lanes: Lanes | None) -> np.ndarray:
        """Notes on the way when the layer before was done.

        The next program is dispatched, so waiting costs the device nothing.
        """
        watched = []
        if lanes is not None and self._unfinished is not None:
            began, acc, link_start, fetched = self._unfinished
            watched = [("link", link_start, fetched[-1])] if fetched is not None else []
            watched.append(("device", began, acc))
        self._unfinished = None
        until = 0.0 if self.link.busy else self._wall.now() + self.spin_s
        while True:
            while watched and (watched[0][2].is_deleted() or watched[0][2].is_ready()):
                lane, start, _ = watched.pop(0)
                spent = max(0.0, self._working() - start)
                setattr(lanes, lane, max(spent, getattr(lanes, lane)))  # a streamed layer's link time is there already
            if result.is_ready():  # pyright: ignore[reportAttributeAccessIssue]  # jax's stubs lack it
                return np.asarray(result)
            if self._wall.now() > until:
                wait = self.link.settle if watched and watched[0][0] == "link" else jax.block_until_ready
                wait(watched[0][2] if watched else result)

    def _working(self) -> float:
        """A clock that stands still while something compiles; lane times are read on it."""
        return self._wall.now() - self._wall.compile_seconds()

    def _block(self, run, pool: StackedSlots, layer: DeviceLayer, routed: Routed, left_out: list[int]) -> jax.Array:
        """Shared experts and residents as one program."""
        dispatched = self._wall.now()
        block = pool.block(layer, routed, left_out, self.clock.pacing.block(run.tokens, len(routed.x)))
        if self.timeline is not None:
            about = {"layer": run.moe_layer, "experts": self._found}
            self.timeline.watch("device", "shared and residents", dispatched, block, **about)
        return block

    def _residents(self, run, layer, routed: Routed, block, routing: HostRouting, plan: LayerPlan) -> jax.Array:
        """The shared experts and the residents that the plan gives to the device."""
        pool = finder(self.pool, len(routed.x))
        if pool is not None:
            if block is None:
                left_out = [expert for expert in plan.hits if expert not in plan.device]
                block = self._block(run, pool, layer, routed, left_out)
            self._found += plan.device
            return block
        moe_layer, acc = run.moe_layer, self.zeros(len(routed.x)) if block is None else block
        experts = [(expert, self.pool.get(moe_layer, expert)) for expert in plan.device]
        if self.timeline is None:
            return self._add(acc, routed, experts, routing, moe_layer)
        for one in experts:  # one call each, so that each expert has its own event
            acc = self._add(acc, routed, [one], routing, moe_layer)
        return acc

    def _start_host(self, routed, plan: LayerPlan, routing: HostRouting, moe_layer: int) -> Pending | None:
        if not plan.cpu:
            return None
        inline = plan.schedule.cpu_seconds < self.inline_s * len(plan.cpu)
        rows, weights = ([of[e] for e in plan.cpu] for of in (routing.rows, routing.weights))
        x = np.asarray(routed.x) if routing.x is None else routing.x
        work = HostWork(moe_layer, list(plan.cpu), x, rows, weights)
        return self.host.submit(work, inline, wide=plan.schedule.uses_all_cores)

    def _add_arrivals(self, acc, routed, plan: LayerPlan, routing, moe_layer: int, lanes: Lanes, transfers: dict):
        """Adds the experts that cross the link, in the order of the device's queue, each once it is there.

        -> acc, and the arrays of the last demand fetch if they may be on their way still.

        `transfers`: the demand fetches that have been started, by expert. A few are always under way, so that the link
        does not wait for this thread, and no more, since each takes an expert's room.
        """
        on_link, arrays, awaited = iter(plan.fetch[len(transfers) :]), None, {f.expert: f for f in plan.awaited}
        fetches = {fetch.expert: fetch for fetch in plan.fetch}
        for expert in plan.schedule.device:
            if expert in fetches:
                while expert not in transfers:
                    later = next(on_link)
                    transfers[later.expert] = self.start_fetch(moe_layer, later, acc)
                transfer = transfers.pop(expert)
                place = self.fetched(moe_layer, fetches[expert], transfer)
                arrays = self._note_fetch(transfer, place, lanes) or arrays
                if (later := next(on_link, None)) is not None:
                    transfers[later.expert] = self.start_fetch(moe_layer, later, acc)
            elif expert in awaited:
                place = self.wait_for(moe_layer, awaited[expert])
            elif expert in plan.double_buffered:
                acc = self._add_staged(acc, routed, expert, routing, moe_layer, lanes)
                continue
            else:
                continue  # a resident
            acc = self._add(acc, routed, [(expert, place)], routing, moe_layer)
        return acc, arrays

    def _note_fetch(self, transfer: Transfer, place: Place, lanes: Lanes) -> list[jax.Array]:
        """Where the link knows how long the transfer took, that is noted; else -> what to watch."""
        layer, expert = transfer.layer, transfer.expert
        if transfer.landed:
            lanes.link += transfer.seconds
            self._note(transfer, "fetch")
            return []
        arrays = self.pool.buffers(place)
        if self.timeline is not None:
            name = f"fetch {layer}.{expert}"
            self.timeline.watch("link", name, transfer.issued, arrays, layer=layer, expert=expert)
        return arrays

    def _add_staged(self, acc, routed, expert: int, routing, moe_layer: int, lanes: Lanes):
        """An expert of the layer's buffer, which is in no slot."""
        staged, dispatched = self.double_buffered(moe_layer, expert, lanes), self._wall.now()
        of, kernel = (routing.rows, routing.weights), self.model.device_kernel
        acc = programs.add_device_experts(acc, routed.x, [(expert, staged)], *of, kernel, self.clock.pacing)
        self._watch_expert(dispatched, acc, expert, routing, moe_layer)
        return acc

    def _collect_host(self, pending: Pending | None, rows: int, routing: HostRouting, moe_layer: int, lanes: Lanes):
        if pending is None:
            return self.no_host_part(rows)
        part = pending.result()
        lanes.cpu = pending.busy()
        if self.timeline is not None:
            for share in pending.parts:
                for expert, start, end in share.spans:
                    self.timeline.expert("cpu", moe_layer, expert, start, end, load=routing.loads[expert])
        return part

    def _add(self, acc, routed, experts: Experts, routing: HostRouting, moe_layer: int):
        if not experts:
            return acc
        dispatched = self._wall.now()
        acc = self.pool.add(acc, routed, experts, routing.rows, routing.weights, self.clock.pacing)
        self._watch_expert(dispatched, acc, experts[0][0], routing, moe_layer)
        return acc

    def _watch_expert(self, dispatched: float, acc, expert: int, routing: HostRouting, moe_layer: int) -> None:
        if self.timeline is not None:
            about = {"layer": moe_layer, "expert": expert, "load": routing.loads[expert]}
            self.timeline.watch("device", f"expert {moe_layer}.{expert}", dispatched, acc, **about)
