"""One forward pass in torch, layer by layer: the five verbs of `engine.steps.layered`, with the same planner.

Device work is issued first, host experts compute beside it where they have cores of their own, fetched experts follow
their transfers, and prefetches start last. Nothing of torch is read but a layer's routing, one array.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hybrimoe_jax.baselines.torch_attention import Places
from hybrimoe_jax.baselines.torch_experts import Bank, Experts, Work
from hybrimoe_jax.baselines.torch_lanes import Device, Host, Program
from hybrimoe_jax.baselines.torch_linear import Tensor
from hybrimoe_jax.baselines.torch_link import ThreadLink, Transfer
from hybrimoe_jax.baselines.torch_model import Layer, Routed, TorchModel
from hybrimoe_jax.baselines.torch_movement import Movement
from hybrimoe_jax.baselines.torch_slots import Slots
from hybrimoe_jax.decide.plan import LayerPlan
from hybrimoe_jax.decide.planner import Planner
from hybrimoe_jax.engine.finite import check_scores
from hybrimoe_jax.engine.inputs import StepInput
from hybrimoe_jax.engine.lanes.clock import Clock
from hybrimoe_jax.engine.routing import HostRouting, read_routing
from hybrimoe_jax.engine.stats import Lanes, LayerStats, StepStats

AHEAD = 2
"""Demand fetches under way at once."""


@dataclasses.dataclass
class Run:
    """A step under way. The residual stream [B, T, D] is `h` and the `parts` [N, D] of the layer before, float32."""

    step: StepInput
    valid: np.ndarray
    places: Places
    caches: list[dict[str, Tensor]]
    context: int
    routers: int
    looks: bool
    h: Tensor
    stats: StepStats
    layer: int = -1
    began: float = 0.0
    moved: int = 0
    busy: tuple[float, float, float] = (0.0, 0.0, 0.0)
    parts: tuple[Tensor, ...] = ()

    @property
    def tokens(self) -> int:
        return len(self.valid)


def stream(h: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """The residual stream."""
    for part in parts:
        h = h + (part if part.device == h.device else part.to(h.device, non_blocking=True)).view(h.shape)
    return h


class TorchForward:
    """See `engine.step.Forward`.

    Args:
      host_banks: by MoE layer, its experts in host memory. experts: what computes them.
      costs: seconds of everything, for a paced device; None for others.
      expert_bytes: what the statistics count a transfer as.
      debug: check every layer that slots hold what the planner believes.
    """

    def __init__(
        self,
        model: TorchModel,
        planner: Planner,
        slots: Slots,
        host_banks: list[Bank],
        link: ThreadLink,
        device: Device,
        host: Host,
        experts: Experts,
        clock: Clock,
        costs: Any,
        expert_bytes: int,
        debug: bool,
    ):
        self.model, self.planner, self.slots, self.host_banks = model, planner, slots, host_banks
        self.link, self.device, self.host, self.experts, self.clock = link, device, host, experts, clock
        self.costs, self.expert_bytes, self.debug = costs, expert_bytes, debug
        self._mid_step = False
        self.movement = Movement(planner, slots, host_banks, link, clock)

    def forward(self, step: StepInput, caches: list) -> tuple[np.ndarray, list, StepStats]:
        if self._mid_step:
            self.repair()
        self._mid_step = True  # until the step is whole: an interrupt may come at any line
        with torch.inference_mode():
            result = self._forward(step, caches)
        self._mid_step = False
        return result

    def _forward(self, step: StepInput, caches: list) -> tuple[np.ndarray, list, StepStats]:
        started = self.clock.now()
        run = self._begin(step, caches)
        for index, layer in enumerate(self.model.layers):
            if layer.moe_layer is None:
                self._dense_layer(run, index, layer)
                continue
            run.layer, run.began, run.busy = layer.moe_layer, self.clock.now(), self._busy()
            routed, routing = self.front(run, index, layer)
            run.moved = self.movement.land()
            plan = self.plan(run, routing)
            self.carry_out(run, layer, routed, routing, plan)
            self.record(run, routing, plan)
        out = self._logits(run)
        self.planner.finish_step()
        run.stats.seconds = self.clock.now() - started
        return out, run.caches, run.stats

    # the verbs

    def front(self, run: Run, index: int, layer: Layer) -> tuple[Routed, HostRouting]:
        """-> what is routed, and the routing."""
        model, config = self.model, self.model.config
        h, parts, cache = run.h, run.parts, run.caches[index]

        def program() -> tuple[Tensor, Routed]:
            return model.front(layer, stream(h, parts), cache, run.places, run.routers)

        run.h, routed = self._on_device(program, self._front_seconds(run)).wait()
        packed = routed.packed.cpu().numpy()
        routing = read_routing(packed, config.num_experts_per_tok, config.num_experts, run.valid)
        check_scores(routing.scores)
        self.clock.front(run.layer, run.tokens, run.context, run.routers > 0)
        return routed, routing

    def plan(self, run: Run, routing: HostRouting) -> LayerPlan:
        now = self.clock.planning_time()
        plan = self.planner.plan(run.layer, routing.loads, routing.scores, run.tokens, now)
        self.clock.carry_out(plan, routing.loads, run.tokens)
        return plan

    def carry_out(self, run: Run, layer: Layer, routed: Routed, routing: HostRouting, plan: LayerPlan) -> None:
        """The layer's routed and shared parts, `run.parts`."""
        x, transfers = routed.x, {}
        for fetch in plan.fetch[:AHEAD]:
            transfers[fetch.expert] = self.movement.start_fetch(run.layer, fetch)
        acc = self._opening(run, layer, x, routing, plan)
        host_part, pending = self._start_host(run.layer, acc, x, routing, plan)
        self._arrivals(run, acc, x, routing, plan, transfers)
        if self.debug:
            self.movement.verify(run.layer)
        if run.looks and not self.planner.backing_off(run.tokens):
            self.movement.prefetch(run.layer, routing)
        if pending is not None:
            pending.wait()
        run.parts = (acc,) if host_part is None else (acc, host_part)

    def record(self, run: Run, routing: HostRouting, plan: LayerPlan) -> None:
        fetched, awaited = tuple(f.expert for f in plan.fetch), tuple(f.expert for f in plan.awaited)
        spent = Lanes(*(after - before for after, before in zip(self._busy(), run.busy)))
        run.stats.layers.append(
            LayerStats(
                layer=run.layer,
                loads=routing.loads,
                hits=len(plan.hits),
                misses=len(plan.misses),
                cpu=tuple(plan.cpu),
                device=(*plan.device, *fetched, *awaited),
                fetched=fetched,
                bytes_h2d=(run.moved + len(fetched) + len(awaited)) * self.expert_bytes,
                seconds=self.clock.now() - run.began,
                lanes=self.clock.lanes(spent),
                prefetch_useful=plan.useful,
                prefetch_late=plan.late,
                prefetch_wasted=plan.wasted,
            )
        )

    # a step's ends, and its dense layers

    def _begin(self, step: StepInput, caches: list) -> Run:
        valid, ids, positions = step.valid, step.ids, step.positions
        if len(ids) == 1 and len(valid) < ids.shape[1]:  # padding of a single row comes last, and serves nobody here
            ids, positions = ids[:, : len(valid)], positions[:, : len(valid)]
        clock, planner = self.clock, self.planner
        planner.begin_step(step.phase, clock.planning_time())
        clock.begin_step(len(valid), ())
        seconds = self.costs.step(len(valid)) if self.costs is not None else 0.0
        return Run(
            step=step,
            valid=valid,
            places=self.model.rotary.places(positions, step.capacity),
            context=step.context,
            caches=caches,
            routers=planner.routers_wanted(len(valid)),
            looks=planner.should_predict(len(valid)),
            h=self._on_device(lambda: self.model.embed(ids), seconds).wait(),
            stats=StepStats(step.phase, len(valid), 0.0, 0.0, []),
        )

    def _dense_layer(self, run: Run, index: int, layer: Layer) -> None:
        h, parts, cache = run.h, run.parts, run.caches[index]

        def program() -> Tensor:
            after = layer.attend(stream(h, parts), cache, run.places)
            shared = layer.shared(layer.ffn_input(after))
            assert shared is not None
            return after + shared.view(after.shape)

        run.h, run.parts = self._on_device(program, 0.0).wait(), ()

    def _logits(self, run: Run) -> np.ndarray:
        h, parts, last = run.h, run.parts, run.step.last
        return self._on_device(lambda: self.model.logits(stream(h, parts), last), 0.0).wait().cpu().numpy()

    # what plans are carried out with

    def _on_device(self, run, seconds: float, needs: Sequence[Transfer] = ()) -> Program:
        self.movement.last = self.device.submit(Program(run, seconds, needs))
        return self.movement.last

    def _front_seconds(self, run: Run) -> float:
        if self.costs is None:
            return 0.0
        return self.costs.layer(run.tokens, run.context) + (self.costs.look if run.routers else 0.0)

    def _opening(self, run: Run, layer: Layer, x: Tensor, routing: HostRouting, plan: LayerPlan) -> Tensor:
        """The shared experts and the residents that the plan gives to the device, as one program: their sum."""
        places = [self.slots.place(run.layer, expert) for expert in plan.device]
        work = self._work(self.slots.bank, places, plan.device, x, routing)
        seconds = 0.0
        if self.costs is not None:
            loads = routing.loads
            seconds = self.costs.shared(run.tokens) + sum([self.costs.device(loads[e]) for e in plan.device])

        acc = torch.zeros(x.shape, device=x.device) if layer.mlp is None or self.device.later else None

        def program() -> Tensor:
            part = layer.shared(x)
            if part is None or acc is not None:
                assert acc is not None
                part = acc if part is None else acc.add_(part)
            self.experts(work, part)
            return part

        done = self._on_device(program, seconds)
        for place in places:
            self.slots.readers[place] = done
        return done.wait() if acc is None else acc

    def _work(self, bank: Bank, places: list[int], experts: Sequence[int], x: Tensor, routing: HostRouting) -> Work:
        rows, weights = ([of[e] for e in experts] for of in (routing.rows, routing.weights))
        return Work(bank, places, x, rows, weights)

    def _start_host(
        self, moe_layer: int, acc: Tensor, x: Tensor, routing: HostRouting, plan: LayerPlan
    ) -> tuple[Tensor | None, Program | None]:
        """-> the host's part, and the program that adds to it; straight to `acc` where the device is this CPU."""
        if not plan.cpu:
            return None, None
        work = self._work(self.host_banks[moe_layer], list(plan.cpu), plan.cpu, x.cpu(), routing)
        part = acc if not self.host.threaded else torch.zeros(acc.shape)
        done = self.host.submit(work, list(plan.cpu), part, plan.schedule.uses_all_cores)
        return None if part is acc else part, done

    def _arrivals(
        self, run: Run, acc: Tensor, x: Tensor, routing: HostRouting, plan: LayerPlan, transfers: dict[int, Transfer]
    ) -> None:
        """Adds experts that cross the link, in the device's order."""
        on_link, awaited = iter(plan.fetch[len(transfers) :]), {f.expert: f for f in plan.awaited}
        fetches = {fetch.expert: fetch for fetch in plan.fetch}
        for expert in plan.schedule.device:
            if expert in fetches:
                while expert not in transfers:
                    later = next(on_link)
                    transfers[later.expert] = self.movement.start_fetch(run.layer, later)
                transfer = transfers.pop(expert)
                self._arrival(acc, x, routing, transfer)
                if (later := next(on_link, None)) is not None:
                    transfers[later.expert] = self.movement.start_fetch(run.layer, later)
            elif expert in awaited:
                self._arrival(acc, x, routing, self.movement.wait_for(run.layer, awaited[expert]))

    def _arrival(self, acc: Tensor, x: Tensor, routing: HostRouting, transfer: Transfer) -> None:
        work = self._work(self.slots.bank, [transfer.place], [transfer.expert], x, routing)
        seconds = 0.0 if self.costs is None else self.costs.device(routing.loads[transfer.expert])
        done = self._on_device(lambda: self.experts(work, acc), seconds, [transfer])
        self.slots.readers[transfer.place] = done

    def _busy(self) -> tuple[float, float, float]:
        return self.host.busy, self.device.busy, self.link.busy_s

    # between steps

    def repair(self) -> None:
        """Refills the slots with what the planner believes in them, after a step that was broken off."""
        if self.movement.last is not None:
            self.movement.last.join()  # however it ended
        self.device.recover()
        self.link.drain()
        self.clock.drain()
        self.planner.abandon_step()
        self.movement.fill()
        self._mid_step = False
