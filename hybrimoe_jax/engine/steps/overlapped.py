"""The overlapped executor: device work is dispatched first, host experts compute while it runs.

Fetches land beside both.

Measured: a host callback inside one executable blocks all of it, while separate dispatches overlap (82 + 123 ms alone,
145 ms together). So a layer is: shared experts and resident experts dispatched, host experts started, demand fetches
issued and their experts dispatched behind them, prefetches issued into idle link time, and only then the host's part
collected.
"""

from __future__ import annotations

import jax
import numpy as np

from hybrimoe_jax.decide.plan import LayerPlan
from hybrimoe_jax.engine import programs
from hybrimoe_jax.engine.device_model import DeviceLayer
from hybrimoe_jax.engine.lanes.host import HostWork, Pending
from hybrimoe_jax.engine.routing import HostRouting
from hybrimoe_jax.engine.stats import Lanes
from hybrimoe_jax.engine.steps.layered import LayeredForward

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

    def dispatch_shared(self, layer: DeviceLayer, x: jax.Array) -> jax.Array | None:
        self._dispatched, self._working_from = self._wall.now(), self._working()
        if layer.programs.shared is None:
            return None
        return layer.programs.shared(layer.params, x)

    def carry_out(self, run, lanes, layer, x, shared, routing: HostRouting, plan: LayerPlan) -> None:
        moe_layer = run.moe_layer
        acc = self.zeros(x.shape[0]) if shared is None else shared
        if self.timeline is not None and shared is not None:
            self.timeline.watch("device", "shared", self._dispatched, acc, layer=moe_layer)
        acc = self._add_residents(acc, x, plan, routing, moe_layer)
        pending = self._start_host(x, plan, routing, moe_layer)
        link_start = self._working()
        acc, fetched = self._add_fetched(acc, x, plan, routing, moe_layer)
        acc = self._add_landing(acc, x, plan, routing, moe_layer, lanes)
        if self.verify is not None:
            self.verify(moe_layer)
        self.prefetch(moe_layer, routing)
        run.host_part = self._collect_host(pending, x.shape[0], routing, moe_layer, lanes)
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
                fetching = bool(watched) and watched[0][0] == "link"
                (self.link.settle if fetching else jax.block_until_ready)(watched[0][2] if watched else result)

    def _working(self) -> float:
        """A clock that stands still while something compiles; lane times are read on it."""
        return self._wall.now() - self._wall.compile_seconds()

    def _add_residents(self, acc, x, plan: LayerPlan, routing: HostRouting, moe_layer: int):
        slots = [(expert, self.pool.get(moe_layer, expert)) for expert in plan.device]
        if self.timeline is None:
            return self._add(acc, x, slots, routing, moe_layer)
        for slot in slots:  # one call each, so that each expert has its own event
            acc = self._add(acc, x, [slot], routing, moe_layer)
        return acc

    def _start_host(self, x, plan: LayerPlan, routing: HostRouting, moe_layer: int) -> Pending | None:
        if not plan.cpu:
            return None
        inline = plan.schedule.cpu_seconds < self.inline_s * len(plan.cpu)
        rows, weights = ([of[e] for e in plan.cpu] for of in (routing.rows, routing.weights))
        work = HostWork(moe_layer, list(plan.cpu), np.asarray(x), rows, weights)
        return self.host.submit(work, inline, wide=plan.schedule.uses_all_cores)

    def _add_fetched(self, acc, x, plan: LayerPlan, routing: HostRouting, moe_layer: int):
        """-> acc with the demand fetches' experts, and the last fetch's arrays if there is one."""
        fetched = None
        for fetch in plan.fetch:
            issued = self._wall.now()
            slot = self.fetch(moe_layer, fetch)
            fetched = jax.tree.leaves(slot)
            if self.timeline is not None:
                name = f"fetch {moe_layer}.{fetch.expert}"
                self.timeline.watch("link", name, issued, slot, layer=moe_layer, expert=fetch.expert)
            acc = self._add(acc, x, [(fetch.expert, slot)], routing, moe_layer)
        return acc, fetched

    def _add_landing(self, acc, x, plan: LayerPlan, routing: HostRouting, moe_layer: int, lanes: Lanes):
        """Adds the experts that are on their way already, each once it is there."""
        for expert in plan.double_buffered:
            slot = self.double_buffered(moe_layer, expert, lanes)
            acc = self._add(acc, x, [(expert, slot)], routing, moe_layer)
        for fetch in plan.awaited:
            acc = self._add(acc, x, [(fetch.expert, self.wait_for(moe_layer, fetch))], routing, moe_layer)
        return acc

    def _collect_host(self, pending: Pending | None, rows: int, routing: HostRouting, moe_layer: int, lanes: Lanes):
        if pending is None:
            return self.zeros(rows)
        part = pending.result()
        lanes.cpu = pending.busy()
        if self.timeline is not None:
            for share in pending.parts:
                for expert, start, end in share.spans:
                    self.timeline.expert("cpu", moe_layer, expert, start, end, load=routing.loads[expert])
        return part

    def _add(self, acc, x, slots, routing: HostRouting, moe_layer: int):
        if not slots:
            return acc
        started, kernel = self._wall.now(), self.model.device_kernel
        acc = programs.add_device_experts(acc, x, slots, routing.rows, routing.weights, kernel)
        if self.timeline is not None:
            expert = slots[0][0]
            about = {"layer": moe_layer, "expert": expert, "load": routing.loads[expert]}
            self.timeline.watch("device", f"expert {moe_layer}.{expert}", started, acc, **about)
        return acc
