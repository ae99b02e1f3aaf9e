"""One forward pass: attention and routing on the device, a plan per MoE layer, then the plan carried out.

`HybridForward` holds what the two hybrid executors share: the layer loop, the read-back, planning, landing and
statistics. They differ in how a planned layer is computed (`overlapped.py`, `callback.py`).
"""

from __future__ import annotations

import abc

import jax
import jax.numpy as jnp
import numpy as np

from hybrimoe_jax.decide.plan import REFUSED, Fetch, LayerPlan
from hybrimoe_jax.decide.planner import Planner
from hybrimoe_jax.engine import programs
from hybrimoe_jax.engine.device_model import DeviceLayer, DeviceModel
from hybrimoe_jax.engine.fused.decode import WholeStep
from hybrimoe_jax.engine.lanes.clock import WallClock
from hybrimoe_jax.engine.lanes.compilation import compile_clock
from hybrimoe_jax.engine.lanes.slots import SlotPool
from hybrimoe_jax.engine.lanes.transfer import Link
from hybrimoe_jax.engine.routing import HostRouting, read_routing
from hybrimoe_jax.engine.stats import Lanes, LayerStats, StepStats
from hybrimoe_jax.engine.step import Forward, StepInput


class HybridForward(Forward):
    """Everything of the hybrid executors but the computing of a planned layer.

    Args:
      lookahead: distances whose routers a trace is given. trace, timeline: recorders, or None.
      verify: called with the MoE layer before its experts run (debug), or None.
      machine: a `VirtualMachine` where times are computed and not measured: it says what has landed and what time it is.
    """

    def __init__(
        self,
        model: DeviceModel,
        planner: Planner,
        pool: SlotPool,
        link: Link,
        weights,
        clock: WallClock,
        lookahead: int,
        trace=None,
        timeline=None,
        verify=None,
        machine=None,
    ):
        self.model, self.planner, self.pool, self.link, self.weights = model, planner, pool, link, weights
        self.clock, self.lookahead, self.trace, self.timeline, self.verify = clock, lookahead, trace, timeline, verify
        self.machine = machine
        self.whole: WholeStep | None = None
        """Runs the decode steps whose plan is all on the CPU, where the executor has it."""
        self._zeros: dict[int, jax.Array] = {}
        self._torn = self._looks = False

    @abc.abstractmethod
    def compute(self, layer, x, early, routing: HostRouting, plan: LayerPlan, lanes: Lanes) -> tuple[jax.Array, object]:
        """Carries out a plan: -> (device part [N, D], host part [N, D]); may return before the device has finished."""

    def begin(self, layer: DeviceLayer, x: jax.Array) -> jax.Array | None:
        """Dispatches what needs no plan (the shared experts) before the routing is read."""
        return None

    def read(self, result: jax.Array, lanes: Lanes | None) -> np.ndarray:
        """Waits for the next program's result, already dispatched; `lanes` are those of the layer before it, if any."""
        return np.asarray(result)

    def zeros(self, rows: int) -> jax.Array:
        if rows not in self._zeros:
            width = self.model.config.hidden_size
            self._zeros[rows] = jax.device_put(jnp.zeros((rows, width), jnp.float32), self.model.device)
        return self._zeros[rows]

    def forward(self, step, caches):
        if self._torn:
            self.repair()
        trace = self.trace
        if trace is not None:
            trace.begin_step()
        self._torn = True  # until the step is whole: an interrupt may come at any line
        try:
            result = self._step(step, caches)
            self._torn = False
        except BaseException:
            if trace is not None:
                trace.abandon_step()
            raise
        return result

    def repair(self) -> None:
        """After a step that was broken off (Ctrl-C in a notebook): refills the slots with what the planner believes in them."""
        self.settle()
        self.link.drain()
        if self.machine is not None:
            self.machine.drain()
        self.planner.abandon_step()
        self.pool.clear()
        self.fill()

    def fill(self) -> None:
        """Loads every expert that the planner calls resident into an empty pool."""
        for layer in range(len(self.model.moe_layers)):
            for expert in sorted(self.planner.resident(layer)):
                self.pool.write(layer, expert, self.link.put(self.weights(layer, expert)), None)

    def settle(self) -> None:
        """Plans what the latest step has left to be planned; call it before asking the planner anything."""
        if self.whole is not None:
            self.whole.settle()

    def rest(self) -> None:
        if self.whole is not None:
            self.whole.rest()

    def _runs_whole(self, step: StepInput) -> bool:
        """Whether the step is one program. Recorders want its layers one by one; a prefetch still under way must land first."""
        watched = self.trace is not None or self.timeline is not None
        one = step.ids.size == 1 and step.last is not None and not self.planner.streams(step.phase)
        return one and not watched and not self.link.busy

    def _step(self, step, caches):
        if self.whole is not None and self._runs_whole(step):
            return self.whole.step(step, caches, self.planner, self.clock)
        self.settle()
        model, machine = self.model, self.machine
        now = self.clock.now if machine is None else lambda: machine.now
        start, compiled = now(), compile_clock().seconds
        rows, valid = step.ids.size, step.valid
        first = self.planner.begin_step(step.phase, None if machine is None else machine.now)
        self._stream(0, first)
        if machine is not None:
            machine.step(len(valid), first)
            context = step.context
        span = step.span
        self._looks = self.planner.should_predict(len(valid))
        distance = self.lookahead if self.trace is not None else self.planner.routers_wanted(len(valid))
        positions = jax.device_put(step.positions, model.device)  # once, not at every layer's call
        nothing = self.zeros(rows)
        h, acc, host = programs.embed(model.table, step.ids), nothing, nothing
        record = StepStats(step.phase, len(valid), 0.0, 0.0, [])
        caches, lanes = list(caches), None
        for index, layer in enumerate(model.layers):
            began = now()
            if layer.moe_layer is None:
                h, caches[index] = layer.programs.dense(layer.params, h, acc, host, caches[index], positions, span)
                acc = host = nothing
                continue
            routers = model.lookahead_routers(layer.moe_layer, distance)
            h, x, caches[index], packed = layer.programs.front(
                layer.params, routers, h, acc, host, caches[index], positions, span
            )
            early = self.begin(layer, x)
            routing = read_routing(
                self.read(packed, lanes), model.config.num_experts_per_tok, model.config.num_experts, valid
            )
            if machine is None:
                moved = self.land(layer.moe_layer)
                plan = self.planner.plan(layer.moe_layer, routing.loads, routing.scores, len(valid))
            else:
                before = machine.lanes()
                machine.front(layer.moe_layer, len(valid), context, self.planner.routers_wanted(len(valid)) > 0)
                moved = self.land(layer.moe_layer)
                plan = self.planner.plan(layer.moe_layer, routing.loads, routing.scores, len(valid), machine.now)
                machine.run(plan, routing.loads, len(valid))
            if self.trace is not None:
                self.trace(layer.moe_layer, step, routing)
            lanes = Lanes()
            self._stream(layer.moe_layer + 1, plan.next_layer_experts)
            acc, host = self.compute(layer, x, early, routing, plan, lanes)
            lanes.link += self.link.end_stream(layer.moe_layer)
            fetched = tuple(f.expert for f in plan.fetch)
            streamed, first = len(first) + len(plan.next_layer_experts), ()
            moved += (len(fetched) + len(plan.awaited) + streamed) * self.pool.expert_bytes
            record.layers.append(
                LayerStats(
                    layer.moe_layer,
                    routing.loads,
                    len(plan.hits),
                    len(plan.misses),
                    tuple(plan.cpu),
                    (*plan.device, *fetched, *plan.double_buffered, *(f.expert for f in plan.awaited)),
                    fetched,
                    moved,
                    now() - began,
                    lanes if machine is None else Lanes(*(b - a for a, b in zip(before, machine.lanes()))),
                    plan.useful,
                    plan.late,
                    plan.wasted,
                    streamed,
                )
            )
        if step.last is not None:
            logits = programs.last_logits(model.norm, model.head, h, acc, host, step.last, eps=model.eps)
        else:
            logits = programs.all_logits(model.norm, model.head, h, acc, host, eps=model.eps)
        logits = np.array(self.read(logits, lanes), copy=True)
        self.planner.finish_step()
        record.seconds = now() - start
        record.compile_s = compile_clock().seconds - compiled if machine is None else 0.0
        return logits, caches, record

    def land(self, moe_layer: int) -> int:
        """Commits the prefetches that have landed before layer `moe_layer` is planned; returns the bytes they moved."""
        if not self.link.busy:
            return 0
        moved = 0
        if self.machine is None:
            landed = self.link.landed()
        else:
            landed = [self.link.wait(*key) for key in self.machine.landed()]
        for transfer in landed:
            if self.trace is not None:
                self.trace.landed(moe_layer, transfer.layer, transfer.expert)
            moved += transfer.nbytes
            self._note(transfer)
            measured = transfer.seconds if self.machine is None else None
            victim = self.planner.landed(transfer.layer, transfer.expert, measured)
            if victim is not REFUSED:
                self.pool.write(transfer.layer, transfer.expert, transfer.staged, victim)
        return moved

    def load(self, moe_layer: int, fetch: Fetch):
        """A planned demand fetch: the expert's arrays in its slot, or in a staging slot when it is only streamed."""
        return self._place(moe_layer, fetch, self.link.put(self.weights(moe_layer, fetch.expert)))

    def wait_for(self, moe_layer: int, fetch: Fetch):
        """The same for an expert that a prefetch is already moving: waits until it has landed."""
        began = self.clock.now()
        transfer = self.link.wait(moe_layer, fetch.expert)
        if self.machine is None:
            self.planner.waited(moe_layer, fetch.expert, transfer.seconds, self.clock.now() - began)
        self._note(transfer)
        return self._place(moe_layer, fetch, transfer.staged)

    def buffered(self, moe_layer: int, expert: int, lanes: Lanes):
        """The arrays of an expert of the layer's buffer: waits until it has landed. The link's seconds are counted here."""
        transfer = self.link.streamed(moe_layer, expert)
        lanes.link += transfer.seconds
        self._note(transfer, "stream")
        return transfer.staged

    def _stream(self, moe_layer: int, experts) -> None:
        """Starts to move a layer's experts into the buffer that the layer before the last has left."""
        if experts:
            self.link.stream(moe_layer, {expert: self.weights(moe_layer, expert) for expert in experts})

    def prefetch(self, moe_layer: int, routing: HostRouting) -> None:
        """Starts the transfers that the planner wants for coming layers."""
        if not self._looks or self.planner.backing_off(len(routing.valid)):
            return  # later routers may have been applied for a trace alone
        for wanted in self.planner.prefetch(moe_layer, routing.shown()):
            self.link.prefetch(wanted.layer, wanted.expert, self.weights(wanted.layer, wanted.expert))
            if self.machine is not None:
                self.machine.prefetch(wanted.layer, wanted.expert)

    def _place(self, moe_layer, fetch, staged):
        if fetch.stream:
            return self.pool.stream(staged)
        return self.pool.write(moe_layer, fetch.expert, staged, fetch.victim)

    def _note(self, transfer, kind: str = "prefetch") -> None:
        if self.timeline is not None:
            self.timeline.transfer(kind, transfer.layer, transfer.expert, transfer.issued, transfer.landed)
