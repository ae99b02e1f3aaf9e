"""The planner: joins placement, cache policies, scheduler and prefetcher, and holds the truth about who is resident.

One decode step, per MoE layer (numbered 0..L-1, of the layers that have experts):

    planner.begin_step(phase)                                # where prompts are streamed: start what it returns of layer 0, see `layer_stream`
    plan = planner.plan(layer, loads, scores, tokens)        # residency is already what it will be after the step
    ... the executor runs plan.device, plan.cpu, plan.fetch, plan.awaited, plan.double_buffered, and starts plan.next_layer_experts ...
    for p in planner.prefetch(layer, shown): ...             # where planner.depth(tokens) is not 0: start the transfer of p.expert of p.layer
    planner.landed(p.layer, p.expert)                        # at a layer boundary, once such a transfer is complete
    planner.finish_step()                                    # after the last layer

A step is event-atomic: nothing that it needs is evicted in it. Times are the cost model's; an engine that has a clock may pass `now`.

`plan` is on the critical path of every layer of every token; who is asked for a schedule, and when nobody need be, is in `answers`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybrimoe_jax.decide.cache import CachePolicy
from hybrimoe_jax.decide.layer_stream import LayerStream
from hybrimoe_jax.decide.plan import Counters, Fetch, LayerPlan, Prefetch, Refused, Victim
from hybrimoe_jax.decide.prefetch.impact import Forecast
from hybrimoe_jax.decide.prefetch.prediction import Accuracy, Prediction, Predictor, RouterOutlook, as_list
from hybrimoe_jax.decide.prefetch.prefetch_planner import PrefetchPlanner
from hybrimoe_jax.decide.residency.inflight import InflightTransfers
from hybrimoe_jax.decide.residency.residency import Residency
from hybrimoe_jax.decide.schedule import Scheduler
from hybrimoe_jax.decide.schedule_cache import ScheduleCache
from hybrimoe_jax.decide.setup import set_up
from hybrimoe_jax.decide.systems import System
from hybrimoe_jax.errors import UserError

_ONE = {1}


class Planner:
    """Decides for all layers of one engine.

    Args:
      system: a `System` or its name.
      num_layers, num_experts, top_k: MoE layers, routed experts in each, experts per token.
      slots_per_layer: device slots of each layer (an int for all alike).
      costs: a `CostModel`.
      lookahead: replaces the system's number of predicted layers ("adaptive" is one).
      frequencies: [num_layers][num_experts] activation counts from other sequences; the static placement and the warm start.
      cache: replaces the system's cache policy, by name (see `cache.parse_policy`) or as a `CachePolicy` subclass; `cache_params` go to its
        constructor.
      scheduler: replaces the system's rule, by name or as a `Scheduler`.
      prefetch, guard: replace the system's, see `systems.System`.
      predictor: replaces the system's, by name or as a `Predictor`.
      max_in_flight: prefetches under way at once, that is staging buffers for them.
      allow_cpu, allow_fetch, allow_steal: limits of the executor, see `schedule.Problem`.
      cold: start with empty slots (a static placement is always loaded).
      scope: replaces the system's; "pooled": all layers share the sum of the slots, and a victim is (layer, expert).
    """

    def __init__(
        self,
        system: System | str,
        num_layers: int,
        num_experts: int,
        top_k: int,
        slots_per_layer: Sequence[int] | int,
        costs: Any,
        lookahead: int | str | None = None,
        frequencies: Sequence[Sequence[float]] | None = None,
        *,
        cache: str | type[CachePolicy] | None = None,
        cache_params: Mapping[str, Any] | None = None,
        scheduler: str | Scheduler | None = None,
        prefetch: str | None = None,
        guard: str | None = None,
        predictor: str | Predictor | None = None,
        max_in_flight: int = 2,
        allow_cpu: bool = True,
        allow_fetch: bool = True,
        allow_steal: bool = True,
        cold: bool = False,
        scope: str | None = None,
    ):
        if max_in_flight < 0:
            raise UserError(f"planner: max_in_flight {max_in_flight} must be at least 0")
        setup = set_up(
            system, num_layers, num_experts, top_k, slots_per_layer, costs, frequencies, cache=cache,
            cache_params=cache_params, scheduler=scheduler, predictor=predictor, prefetch=prefetch,
            lookahead=lookahead, guard=guard, scope=scope,
        )  # fmt: skip
        self.system, self.slots, self.scheduler, self.predictor = system, slots, rule, _ = setup[:4]
        self.policies, self.costs, self.max_in_flight = setup.policies, costs, max_in_flight
        self.num_layers, self.num_experts, self.top_k = num_layers, num_experts, top_k
        self.accuracy = Accuracy(system.max_distance)
        self.counters = Counters()
        flags = {"allow_cpu": allow_cpu, "allow_fetch": allow_fetch, "allow_steal": allow_steal}
        self._inflight = InflightTransfers(num_layers, self.counters)
        start_cold = cold and not setup.fixed
        self._residency = Residency(slots, self.policies, self._inflight, system.guard, start_cold, setup.pooled)
        forecast = Forecast(rule, costs, **flags)
        parts = (self.predictor, forecast, self.accuracy, self._residency)
        self._prefetch_planner = PrefetchPlanner(system, *parts, costs, max_in_flight)
        self._schedule_cache = ScheduleCache(rule, costs, **flags)
        streams = system.stream_prefill and allow_fetch
        self._stream = LayerStream(num_experts, costs, self.counters) if streams else None
        self._streaming = False  # in this step
        self._experts = frozenset(range(num_experts))
        self._next_clock = self._until_next = 0.0  # the latter from the start of the latest MoE block to the next one's
        self._tokens = 0  # of the latest plan's step; 0: nothing is planned
        self.handover_for_all_on_cpu = self._schedule_cache.prove_all_on_cpu(
            top_k, setup.most_resident
        )  # what `costs.handover` must be for `all_on_cpu`
        if self.all_on_cpu:  # whatever a prefetch might bring, it is not worth leaving the program for
            self._prefetch_planner.leave_out(1)

    @property
    def all_on_cpu(self) -> bool:
        """Whether a step of one token gives every expert to the CPU whatever the routing, so that nothing needs to be decided within it."""
        return self._schedule_cache.all_on_cpu is not None

    def streams(self, phase: str) -> bool:
        """Whether a step of this phase, "prefill" or "decode", is streamed layer by layer (see `layer_stream`), so that it must be begun."""
        return self._stream is not None and phase == "prefill"

    def begin_step(self, phase: str, now: float | None = None) -> tuple[int, ...]:
        """Opens a step. Returns the experts of the first MoE layer to move into a buffer at once: none where prompts are not streamed."""
        self._streaming = self.streams(phase)
        if not self._streaming:
            return ()
        self._inflight.clock = self._next_clock if now is None else now
        return self._start_stream(0)

    def initial_residents(self) -> list[list[int]]:
        """Experts to load into each layer's slots before the first step."""
        return [list(experts) for experts in self._residency.initial]

    def resident(self, layer: int) -> frozenset[int]:
        """Experts of `layer` in its slots now."""
        return frozenset(self._residency.resident[layer])

    def plan(
        self,
        layer: int,
        loads: Mapping[int, int],
        scores: Sequence[float] | None,
        tokens: int,
        now: float | None = None,
    ) -> LayerPlan:
        """Plans one layer of one step and moves the residency accordingly.

        Args:
          loads: tokens of each activated expert.
          scores: mean router probability of every expert over the tokens, or None.
          tokens: tokens in the step.
          now: seconds on the caller's clock; by default the predicted end of the previous layer.
        """
        equal = self._check(layer, loads, scores, tokens)
        scores = as_list(scores)
        residency, inflight = self._residency, self._inflight
        inflight.clock = clock = self._next_clock if now is None else now
        self.policies[layer].observe(scores, loads)
        resident, transfers = residency.resident[layer], inflight.in_flight[layer]
        hits = tuple([e for e in loads if e in resident])
        misses = tuple([e for e in loads if e not in resident]) if len(hits) < len(loads) else ()
        in_flight = {e: max(0.0, transfers[e].landing - clock) for e in misses if e in transfers} if transfers else {}
        link_busy = max(0.0, inflight.link_free - clock)

        double_buffered = next_layer_experts = ()
        if self._streaming:
            schedule, double_buffered = self._stream.schedule(
                layer, loads, tokens, resident, in_flight, clock, link_busy
            )
            device = tuple([e for e in schedule.device if e in resident])
            awaited_experts = [e for e in schedule.awaited if e in in_flight]
        else:
            schedule, device = self._schedule_cache.schedule(
                loads, scores, tokens, resident, hits, misses, in_flight, link_busy, equal
            )
            awaited_experts = schedule.awaited

        predictions = residency.predictions[layer]
        if predictions:
            asked = loads.keys()
            for distance, prediction in predictions:
                self.accuracy.update(distance, prediction.loads.keys(), asked)
            predictions.clear()
        useful, late, wasted = inflight.judge(layer, device, {e: in_flight[e] for e in awaited_experts})
        residency.needed[layer] = set(loads)
        fetch = awaited = ()
        if awaited_experts:
            awaited = tuple([residency.admit(layer, expert) for expert in awaited_experts])
        if schedule.fetch:
            if self._streaming:
                fetch = tuple([Fetch(expert, None, True) for expert in schedule.fetch])
            else:
                fetch = tuple([residency.admit(layer, expert) for expert in schedule.fetch])
            inflight.link_free = clock + schedule.link_seconds
        if self._streaming:
            next_layer_experts = self._start_stream(layer + 1)
        makespan = schedule.makespan
        self._until_next = makespan + self.costs.layer(tokens)
        self._next_clock, self._tokens = clock + self._until_next, tokens
        self.counters.count(len(hits), len(misses), len(schedule.cpu), fetch)
        return LayerPlan(
            layer, hits, misses, device, fetch, awaited, schedule.cpu, useful, late, wasted, makespan, schedule,
            double_buffered, next_layer_experts,
        )  # fmt: skip

    def depth(self, tokens: int) -> int:
        """How many layers to look ahead in a step of so many tokens, see `PrefetchPlanner.depth`; 0 in a streamed step, whose link has no time to spare."""
        return 0 if self._streaming else self._prefetch_planner.depth(tokens)

    def should_predict(self, tokens: int) -> bool:
        """Whether any layer is to be predicted in a step of so many tokens."""
        return self.depth(tokens) > 0

    def routers_wanted(self, tokens: int) -> int:
        """How many coming layers' routers the predictor wants applied in a step of so many tokens."""
        return self.depth(tokens) if self.predictor.needs_routers else 0

    def backing_off(self, tokens: int) -> bool:
        """Whether to leave out predicting in this step, see `PrefetchPlanner.backing_off`."""
        return self._prefetch_planner.backing_off(tokens)

    def prefetch(self, layer: int, shown: RouterOutlook) -> tuple[Prefetch, ...]:
        """The transfers to start behind `layer`'s demand fetches, by what `layer` shows of the coming layers; call it right after `plan`, and in every
        layer of a step or in none."""
        if not self._tokens or self._streaming:
            return ()
        return self._prefetch_planner.look(layer, shown, self._tokens, self._until_next)

    def plan_prefetch(self, layer: int, lookahead: Sequence[Prediction]) -> tuple[Prefetch, ...]:
        """The same by given predictions.

        Args:
          lookahead: predictions for layers layer+1, layer+2, ...; those beyond the last layer or the system's lookahead are not used.
        """
        if not self._tokens or self._streaming:
            return ()
        lookahead = [Prediction(loads, as_list(scores)) for loads, scores in lookahead]
        return self._prefetch_planner.start(layer, lookahead, self._tokens, self._until_next)

    def landed(self, layer: int, expert: int, seconds: float | None = None) -> Victim | Refused | None:
        """Tells of a prefetch whose transfer is complete; returns the victim whose slot it takes, None for a free slot, or REFUSED.

        REFUSED: it is dropped, since all that could be evicted is needed in this step, predicted for the coming one, or hotter.
        `seconds`: how long it held the link, where that was measured.
        """
        found = self._residency.land(layer, expert, seconds)
        if not self._streaming:
            self._inflight.clear_link()
        return found

    def waited(self, layer: int, expert: int, seconds: float, wait: float) -> None:
        """Tells of one of the latest plan's `awaited` how long its transfer held the link and it was waited for, where that was measured."""
        self._inflight.waited(layer, expert, seconds, wait)

    def finish_step(self) -> None:
        """Ends the step (one token of each sequence, or one prefill chunk): prefetches for layers that were not planned are wasted."""
        if self._streaming:
            self._streaming = False
            self._stream.clear()
        self._inflight.finish_step()
        self._residency.finish_step()
        self._prefetch_planner.finish_step(self._tokens, self.counters.prefetch_issued)

    def abandon_step(self) -> None:
        """Forgets a step that was broken off: its transfers under way count as wasted and will not be told of by `landed`."""
        self.finish_step()
        self._inflight.abandon()
        self._tokens = 0
        self._inflight.clear_link()

    def _start_stream(self, layer: int) -> tuple[int, ...]:
        """Queues a whole layer behind all that is on the link."""
        if layer >= self.num_layers:
            return ()
        present = self._residency.resident[layer] | self._inflight.in_flight[layer].keys()
        inflight = self._inflight
        experts, inflight.link_free = self._stream.start(layer, present, max(inflight.link_free, inflight.clock))
        return experts

    def _check(self, layer: int, loads: Mapping[int, int], scores: Sequence[float] | None, tokens: int) -> bool:
        """Whether this is one token with loads of 1; UserError for what cannot be."""
        if not 0 <= layer < self.num_layers:
            raise UserError(f"planner: layer {layer} is outside the model's {self.num_layers} MoE layers")
        if tokens < 1:
            raise UserError(f"planner: layer {layer} has {tokens} tokens; a step has at least 1")
        if scores is not None and len(scores) != self.num_experts:
            raise UserError(f"planner: layer {layer} got {len(scores)} scores for {self.num_experts} experts")
        equal = tokens == 1 and set(loads.values()) == _ONE
        if not loads.keys() <= self._experts or not (equal or min(loads.values(), default=1) > 0):
            raise UserError(
                f"planner: layer {layer} got loads {dict(loads)}; experts are 0..{self.num_experts - 1}, loads above 0"
            )
        return equal
