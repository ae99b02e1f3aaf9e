"""The overlapped executor: device work is dispatched first, host experts compute while it runs, fetches land beside both.

Measured: a host callback inside one executable blocks all of it, while separate dispatches overlap (82 + 123 ms alone,
145 ms together). So a layer is: shared experts and resident experts dispatched, host experts started, demand loads issued
and their experts dispatched behind them, prefetches issued into idle link time, and only then the host's part collected.
"""

from __future__ import annotations

import jax
import numpy as np

from hybrimoe_jax.decide.plan import LayerPlan
from hybrimoe_jax.record.stats import Lanes
from hybrimoe_jax.runtime import programs
from hybrimoe_jax.runtime.compilation import compile_clock
from hybrimoe_jax.runtime.device_model import DeviceLayer
from hybrimoe_jax.runtime.executors import HybridForward
from hybrimoe_jax.runtime.host import HostExecutor, HostWork
from hybrimoe_jax.runtime.routing import HostRouting

LONE = 1.5
"""From this ratio of predicted CPU to device time on, prefill gives the host the device's cores too."""


class OverlappedForward(HybridForward):
    """See `HybridForward`. Args: host: the CPU lane; inline_s: host work predicted shorter than this is not handed to a
    worker thread (waking one costs about as much; measured at load)."""

    def __init__(self, *args, host: HostExecutor, inline_s: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.host, self.inline_s = host, inline_s
        self._watch: tuple | None = None

    def begin(self, layer: DeviceLayer, x: jax.Array) -> jax.Array | None:
        self._began, self._working_from = self.clock.now(), self._working()
        if layer.programs.shared is None:
            return None
        return layer.programs.shared(layer.params, x)

    def compute(self, layer, x, early, routing: HostRouting, plan: LayerPlan, lanes: Lanes):
        now, ordinal, timeline = self.clock.now, layer.ordinal, self.timeline
        acc = self.zeros(x.shape[0]) if early is None else early
        if timeline is not None and early is not None:
            timeline.watch("device", "shared", self._began, acc, layer=ordinal)
        acc = self._dispatch(acc, x, plan.device, routing, ordinal)
        pending = None
        if plan.cpu:
            predicted = sum(self.planner.costs.cpu(routing.loads[e], i == 0) for i, e in enumerate(plan.cpu))
            inline = predicted < self.inline_s
            work = HostWork(
                ordinal,
                list(plan.cpu),
                np.asarray(x),
                [routing.rows[e] for e in plan.cpu],
                [routing.weights[e] for e in plan.cpu],
            )
            lone = plan.schedule.cpu_seconds > LONE * plan.schedule.device_seconds
            pending = self.host.submit(work, inline, wide=lone and x.shape[0] > programs.DENSE_ROWS)
        moved = None
        link_start = self._working()
        for fetch in plan.fetch:
            issued = now()
            slot = moved = self.load(ordinal, fetch)
            if timeline is not None:
                timeline.watch(
                    "link", f"fetch {ordinal}.{fetch.expert}", issued, slot, layer=ordinal, expert=fetch.expert
                )
            acc = self._add(acc, x, [(fetch.expert, slot)], routing, ordinal)
        for fetch in plan.waits:
            acc = self._add(acc, x, [(fetch.expert, self.wait_for(ordinal, fetch))], routing, ordinal)
        if self.verify is not None:
            self.verify(ordinal)
        self.prefetch(ordinal, routing)
        if pending is None:
            part = self.zeros(x.shape[0])
        else:
            part = pending.result()
            lanes.cpu = pending.busy()
            if timeline is not None:
                for share in pending.parts:
                    for expert, start, end in share.spans:
                        timeline.expert("cpu", ordinal, expert, start, end, load=routing.loads[expert])
        self._watch = (self._working_from, acc, link_start, moved)
        return acc, part

    def settle(self, lanes: Lanes) -> None:
        """The next program is already dispatched, so waiting here costs the device nothing."""
        if self._watch is None:
            return
        began, acc, link_start, moved = self._watch
        self._watch = None
        if moved is not None:
            if not any(part.is_deleted() for part in moved):
                jax.block_until_ready(moved)
            lanes.link = max(0.0, self._working() - link_start)
        jax.block_until_ready(acc)
        lanes.device = max(0.0, self._working() - began)

    def _working(self) -> float:
        """A clock that stands still while something compiles; lane times are read on it."""
        return self.clock.now() - compile_clock().seconds

    def _dispatch(self, acc, x, experts, routing, ordinal):
        slots = [(expert, self.pool.get(ordinal, expert)) for expert in experts]
        if self.timeline is None:
            return self._add(acc, x, slots, routing, ordinal)
        for slot in slots:  # one call each, so that each expert has its own event
            acc = self._add(acc, x, [slot], routing, ordinal)
        return acc

    def _add(self, acc, x, slots, routing, ordinal):
        if not slots:
            return acc
        started = self.clock.now()
        acc = programs.add_device_experts(acc, x, slots, routing.rows, routing.weights)
        if self.timeline is not None:
            expert = slots[0][0]
            self.timeline.watch(
                "device",
                f"expert {ordinal}.{expert}",
                started,
                acc,
                layer=ordinal,
                expert=expert,
                load=routing.loads[expert],
            )
        return acc
