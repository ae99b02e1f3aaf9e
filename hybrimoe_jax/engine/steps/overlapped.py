"""The overlapped executor: device work is dispatched first, host experts compute while it runs, fetches land beside both.

Measured: a host callback inside one executable blocks all of it, while separate dispatches overlap (82 + 123 ms alone,
145 ms together). So a layer is: shared experts and resident experts dispatched, host experts started, demand fetches issued
and their experts dispatched behind them, prefetches issued into idle link time, and only then the host's part collected.
"""

from __future__ import annotations

import jax
import numpy as np

from hybrimoe_jax.decide.plan import LayerPlan
from hybrimoe_jax.engine import programs
from hybrimoe_jax.engine.device_model import DeviceLayer
from hybrimoe_jax.engine.lanes.compilation import compile_clock
from hybrimoe_jax.engine.lanes.host import HostExecutor, HostWork
from hybrimoe_jax.engine.routing import HostRouting
from hybrimoe_jax.engine.stats import Lanes
from hybrimoe_jax.engine.steps.layered import HybridForward

INLINE_WAKES = 4
"""Host experts shorter than this many wake-ups of a thread are not handed to one."""


class OverlappedForward(HybridForward):
    """See `HybridForward`.

    Args:
      host: the CPU lane.
      wake_s: what handing work to a worker thread and waiting for it costs (measured at load).
      spin_s: how long to poll for a result before sleeping until it comes. A sleeping thread is woken late and with cold
        caches: polling made a decode step of small layers 1.2 times faster (2 cores). 0 where there is but one core.

    Host work whose experts take less than a few times that each is done by this thread once everything else has been
    dispatched: small experts spend most of their time in Python, which two threads cannot run at once.
    """

    def __init__(self, *args, host: HostExecutor, wake_s: float, spin_s: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.host, self.inline_s, self.spin_s = host, INLINE_WAKES * wake_s, spin_s
        self._watch: tuple | None = None

    def begin(self, layer: DeviceLayer, x: jax.Array) -> jax.Array | None:
        self._began, self._working_from = self.clock.now(), self._working()
        if layer.programs.shared is None:
            return None
        return layer.programs.shared(layer.params, x)

    def compute(self, layer, x, early, routing: HostRouting, plan: LayerPlan, lanes: Lanes):
        now, moe_layer, timeline = self.clock.now, layer.moe_layer, self.timeline
        acc = self.zeros(x.shape[0]) if early is None else early
        if timeline is not None and early is not None:
            timeline.watch("device", "shared", self._began, acc, layer=moe_layer)
        acc = self._dispatch(acc, x, plan.device, routing, moe_layer)
        pending = None
        if plan.cpu:
            inline = plan.schedule.cpu_seconds < self.inline_s * len(plan.cpu)
            work = HostWork(
                moe_layer,
                list(plan.cpu),
                np.asarray(x),
                [routing.rows[e] for e in plan.cpu],
                [routing.weights[e] for e in plan.cpu],
            )
            pending = self.host.submit(work, inline, wide=plan.schedule.uses_all_cores)
        moved = None
        link_start = self._working()
        for fetch in plan.fetch:
            issued = now()
            slot = self.load(moe_layer, fetch)
            moved = jax.tree.leaves(slot)
            if timeline is not None:
                timeline.watch(
                    "link", f"fetch {moe_layer}.{fetch.expert}", issued, slot, layer=moe_layer, expert=fetch.expert
                )
            acc = self._add(acc, x, [(fetch.expert, slot)], routing, moe_layer)
        for expert in plan.double_buffered:
            acc = self._add(acc, x, [(expert, self.buffered(moe_layer, expert, lanes))], routing, moe_layer)
        for fetch in plan.awaited:
            acc = self._add(acc, x, [(fetch.expert, self.wait_for(moe_layer, fetch))], routing, moe_layer)
        if self.verify is not None:
            self.verify(moe_layer)
        self.prefetch(moe_layer, routing)
        if pending is None:
            part = self.zeros(x.shape[0])
        else:
            part = pending.result()
            lanes.cpu = pending.busy()
            if timeline is not None:
                for share in pending.parts:
                    for expert, start, end in share.spans:
                        timeline.expert("cpu", moe_layer, expert, start, end, load=routing.loads[expert])
        self._watch = (self._working_from, acc, link_start, moved)
        return acc, part

    def read(self, result: jax.Array, lanes: Lanes | None) -> np.ndarray:
        """Notes on the way when the layer before was done: the next program is dispatched, so waiting costs the device nothing."""
        watched = []
        if lanes is not None and self._watch is not None:
            began, acc, link_start, moved = self._watch
            watched = [("link", link_start, moved[-1])] if moved is not None else []
            watched.append(("device", began, acc))
        self._watch = None
        until = 0.0 if self.link.busy else self.clock.now() + self.spin_s
        while True:
            while watched and (watched[0][2].is_deleted() or watched[0][2].is_ready()):
                lane, start, _ = watched.pop(0)
                spent = max(0.0, self._working() - start)
                setattr(lanes, lane, max(spent, getattr(lanes, lane)))  # a streamed layer's link time is there already
            if result.is_ready():
                return np.asarray(result)
            if self.clock.now() > until:
                jax.block_until_ready(watched[0][2] if watched else result)

    def _working(self) -> float:
        """A clock that stands still while something compiles; lane times are read on it."""
        return self.clock.now() - compile_clock().seconds

    def _dispatch(self, acc, x, experts, routing, moe_layer):
        slots = [(expert, self.pool.get(moe_layer, expert)) for expert in experts]
        if self.timeline is None:
            return self._add(acc, x, slots, routing, moe_layer)
        for slot in slots:  # one call each, so that each expert has its own event
            acc = self._add(acc, x, [slot], routing, moe_layer)
        return acc

    def _add(self, acc, x, slots, routing, moe_layer):
        if not slots:
            return acc
        started = self.clock.now()
        kernel = self.model.device_kernel
        acc = programs.add_device_experts(acc, x, slots, routing.rows, routing.weights, kernel)
        if self.timeline is not None:
            expert = slots[0][0]
            self.timeline.watch(
                "device",
                f"expert {moe_layer}.{expert}",
                started,
                acc,
                layer=moe_layer,
                expert=expert,
                load=routing.loads[expert],
            )
        return acc
