"""One forward pass, layer by layer.

A MoE layer is five verbs:

    front       attention, norm and router on the device, and the coming layers' routers on the same state;
                the routing is read
    land        transfers that have arrived go into their slots
    plan        routing -> decide: a `LayerPlan`
    carry_out   the plan, by the executor: `overlapped` or `callback`
    record      statistics and trace

Which clock a step runs on it does not ask: see `lanes.clock`.
"""

from __future__ import annotations

import abc

import jax
import jax.numpy as jnp
import numpy as np

from hybrimoe_jax.decide.plan import LayerPlan
from hybrimoe_jax.decide.planner import Planner
from hybrimoe_jax.engine import programs
from hybrimoe_jax.engine.device_model import DeviceLayer, DeviceModel
from hybrimoe_jax.engine.finite import check_scores
from hybrimoe_jax.engine.inputs import StepInput
from hybrimoe_jax.engine.lanes.clock import Clock
from hybrimoe_jax.engine.lanes.host import HostExecutor
from hybrimoe_jax.engine.lanes.slots import SlotPool
from hybrimoe_jax.engine.lanes.transfer import Link
from hybrimoe_jax.engine.programs import Routed
from hybrimoe_jax.engine.routing import HostRouting, read_routing
from hybrimoe_jax.engine.stats import Lanes, LayerStats, StepStats
from hybrimoe_jax.engine.step import Pass
from hybrimoe_jax.engine.steps.movement import Movement

TRACE_LOOKAHEAD = 6
"""Distances that a trace records whatever the system looks ahead, so that it can replay every system."""


class LayeredForward(Movement):
    """Everything of the layered executors but how a plan is carried out.

    Args:
      weights: (MoE layer, expert) -> HostExpert.
      clock: of the statistics and of what lands; `link` and `host` keep this machine's.
      expert_bytes: what the statistics count a transfer as.
      lookahead: distances whose routers a trace is given.
      verify: called with a MoE layer before its experts are done with (debug), or None.
    """

    def __init__(
        self,
        model: DeviceModel,
        planner: Planner,
        pool: SlotPool,
        link: Link,
        host: HostExecutor,
        weights,
        clock: Clock,
        expert_bytes: int,
        lookahead: int,
        verify=None,
    ):
        super().__init__(planner, pool, link, weights, clock)
        self.model, self.host, self.expert_bytes, self.verify = model, host, expert_bytes, verify
        self._usual_lookahead = self._lookahead = lookahead
        self._zeros: dict[int, jax.Array] = {}
        self._no_host_part: dict[int, jax.Array] = {}
        self._mid_step = False

    def forward(self, step, caches):
        if self._mid_step:
            self.repair()
        trace = self.trace
        if trace is not None:
            trace.begin_step()
        self._mid_step = True  # until the step is whole: an interrupt may come at any line
        try:
            result = self._forward(step, caches)
            self._mid_step = False
        except BaseException:
            if trace is not None:
                trace.abandon_step()
            raise
        return result

    def _forward(self, step: StepInput, caches: list) -> tuple[np.ndarray, list, StepStats]:
        run = self._begin(step, caches)
        for index, layer in enumerate(self.model.layers):
            if layer.moe_layer is None:
                self._dense_layer(run, index, layer)
                continue
            run.moe_layer = layer.moe_layer
            # An early block finds its experts by itself: until the plan none of this layer's may come or go.
            run.early = run.may_be_early and not self.link.moves(None if self.pool.pooled else run.moe_layer)
            routed, block, routing = self.front(run, index, layer)
            self.land(run)
            plan = self.plan(run, routing)
            run.lanes = Lanes()
            self.carry_out(run, run.lanes, layer, routed, block, routing, plan)
            self.record(run, run.lanes, routing, plan)
        return self._finish(run)

    # the verbs

    def front(self, run: Pass, index: int, layer: DeviceLayer) -> tuple[Routed, jax.Array | None, HostRouting]:
        """-> what is routed, and what of the block needs no plan, both still to be computed; and the routing."""
        model, config, run.began = self.model, self.model.config, self.clock.now()
        distance, whole = self._lookahead if self.trace is not None else run.routers, model.sends_input
        run.h, routed, run.caches[index], packed = layer.programs.front(
            layer.params,
            model.lookahead_routers(run.moe_layer, distance),
            run.h,
            run.device_part,
            run.host_part,
            run.caches[index],
            run.positions,
            run.span,
            whole,
            self.clock.pacing.front(run.tokens, run.context, run.routers > 0),
        )
        if whole:
            packed.copy_to_host_async()
        block = self.dispatch_block(run, layer, routed)
        packed, width = self.read(packed, run.lanes), config.hidden_size if whole else 0
        routing = read_routing(packed, config.num_experts_per_tok, config.num_experts, run.valid, width)
        self.clock.front(run.moe_layer, run.tokens, run.context, run.routers > 0)
        return routed, block, routing

    def plan(self, run: Pass, routing: HostRouting) -> LayerPlan:
        """Asks the planner, and starts the next layer's stream if it wants one."""
        if run.step.checked:
            check_scores(routing.scores)
        now = self.clock.planning_time()
        plan = self.planner.plan(run.moe_layer, routing.loads, routing.scores, run.tokens, now)
        self.clock.carry_out(plan, routing.loads, run.tokens)
        self._stream(run.moe_layer + 1, plan.next_layer_experts)
        run.streamed += len(plan.next_layer_experts)
        return plan

    @abc.abstractmethod
    def carry_out(
        self, run: Pass, lanes: Lanes, layer: DeviceLayer, routed: Routed, block, routing: HostRouting, plan: LayerPlan
    ) -> None:
        """Sets the run's `device_part` and `host_part` [N, D], and what the `lanes` took.

        It may return before the device has finished.
        """

    def record(self, run: Pass, lanes: Lanes, routing: HostRouting, plan: LayerPlan) -> None:
        """Hands the layer over to the statistics and the trace."""
        if self.trace is not None:
            self.trace(run.moe_layer, run.step, routing)
        lanes.link += self.link.end_stream(run.moe_layer)
        fetched, awaited = tuple(f.expert for f in plan.fetch), tuple(f.expert for f in plan.awaited)
        experts = len(fetched) + len(awaited) + run.streamed
        run.stats.layers.append(
            LayerStats(
                layer=run.moe_layer,
                loads=routing.loads,
                hits=len(plan.hits),
                misses=len(plan.misses),
                cpu=tuple(plan.cpu),
                device=(*plan.device, *fetched, *plan.double_buffered, *awaited),
                fetched=fetched,
                bytes_h2d=(run.moved + experts) * self.expert_bytes,
                seconds=self.clock.now() - run.began,
                lanes=self.clock.lanes(lanes),
                prefetch_useful=plan.useful,
                prefetch_late=plan.late,
                prefetch_wasted=plan.wasted,
                layer_streamed=run.streamed,
            )
        )
        run.streamed = 0

    # a step's ends, and its dense layers

    def _begin(self, step: StepInput, caches: list) -> Pass:
        clock, model, planner, valid = self.clock, self.model, self.planner, step.valid
        started, compiled = clock.now(), clock.compile_seconds()
        first = planner.begin_step(step.phase, clock.planning_time())
        self._stream(0, first)
        clock.begin_step(len(valid), first)
        self._lookahead_on = planner.should_predict(len(valid))
        return Pass(
            step=step,
            valid=valid,
            span=step.span,
            context=step.context,
            routers=planner.routers_wanted(len(valid)),
            positions=jax.device_put(step.positions, model.device),  # once, not at every layer's call
            h=programs.embed(model.table, step.ids, clock.pacing.step(len(valid))),
            device_part=self.zeros(step.ids.size),
            host_part=self.no_host_part(step.ids.size),
            caches=caches,
            stats=StepStats(step.phase, len(valid), 0.0, 0.0, []),
            started=started,
            compiled=compiled,
            streamed=len(first),
            may_be_early=self.early(len(valid), step.ids.size),
        )

    def _dense_layer(self, run: Pass, index: int, layer: DeviceLayer) -> None:
        cache, parts = run.caches[index], (run.device_part, run.host_part)
        run.h, run.caches[index] = layer.programs.dense(layer.params, run.h, *parts, cache, run.positions, run.span)
        rows = run.step.ids.size
        run.device_part, run.host_part = self.zeros(rows), self.no_host_part(rows)

    def _finish(self, run: Pass) -> tuple[np.ndarray, list, StepStats]:
        model, clock, stats = self.model, self.clock, run.stats
        outer, stream = (model.norm, model.head), (run.h, run.device_part, run.host_part)
        if run.step.last is None:
            result = programs.all_logits(*outer, *stream, eps=model.eps)
        else:  # a GPU need not send a vocabulary of logits for a token; the CPU backend's are here already
            finish = programs.last_token if run.step.greedy and model.sends_input else programs.last_logits
            result = finish(*outer, *stream, run.step.last, eps=model.eps)
        result = np.array(self.read(result, run.lanes), copy=True)
        self.planner.finish_step()
        stats.seconds = clock.now() - run.started
        stats.compile_s = clock.compile_seconds() - run.compiled
        return result, run.caches, stats

    # what executors carry plans out with

    def dispatch_block(self, run: Pass, layer: DeviceLayer, routed: Routed) -> jax.Array | None:
        """Dispatches what needs no plan before the routing is read: shared experts, and residents if `early`."""
        return None

    def early(self, tokens: int, rows: int) -> bool:
        """Whether residents are dispatched before the routing is read, in a step of so many tokens and rows."""
        return False

    def read(self, result: jax.Array, lanes: Lanes | None) -> np.ndarray:
        """Waits for the next program's result, already dispatched; `lanes` are those of the layer before it, if any."""
        return np.asarray(result)

    def zeros(self, rows: int) -> jax.Array:
        if rows not in self._zeros:
            width = self.model.config.hidden_size
            self._zeros[rows] = jax.device_put(jnp.zeros((rows, width), jnp.float32), self.model.device)
        return self._zeros[rows]

    def no_host_part(self, rows: int) -> jax.Array:
        """Zeros for a layer that the host has no part of.

        They are bound to no device, as the host's part is: else each program would be compiled once more, in the middle
        of a run, when a layer first has no host experts.
        """
        if rows not in self._no_host_part:
            self._no_host_part[rows] = jnp.zeros((rows, self.model.config.hidden_size), jnp.float32)
        return self._no_host_part[rows]

    # between steps

    def attach(self, trace, timeline) -> None:
        self.trace, self.timeline = trace, self.clock.attach(timeline)
        self.host.detailed = self.timeline is not None
        self._lookahead = self._usual_lookahead if trace is None else max(self._usual_lookahead, TRACE_LOOKAHEAD)

    def synchronize(self) -> None:
        """Its steps end before they return."""

    def between_steps(self) -> Planner:
        """Brings all to where nothing is under way and the slots hold what the planner says; the planner."""
        if self._mid_step:
            self.repair()
        self.settle()
        return self.planner

    def repair(self) -> None:
        """Refills the slots with what the planner believes in them.

        Called after a step that was broken off (Ctrl-C in a notebook).
        """
        self.link.drain()
        self.clock.drain()
        self.planner.abandon_step()
        self.fill()
        self._mid_step = False

    def start_anew(self, planner: Planner, verify, slots: list[int]) -> None:
        """Goes on with another planner, for other slots of each layer, after a step that was broken off or between two.

        The caller's list of caches has the newest ones, whichever layer a step has come to.
        """
        self._mid_step = True  # until the slots are filled again
        self.link.drain()
        self.planner.abandon_step()
        self.planner, self.verify = planner, verify
        self.pool.resize(slots)
        self.repair()
