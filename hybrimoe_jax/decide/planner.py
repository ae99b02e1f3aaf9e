"""The planner: joins placement, cache policies, scheduler and prefetcher, and holds the truth about who is resident.

One decode step, per MoE layer (ordinals 0..L-1 of the layers that have experts):

    planner.begin_step(phase)                                # where prompts are streamed: start what it returns of layer 0, see `layer_stream`
    plan = planner.plan(layer, loads, scores, tokens)        # residency is already what it will be after the step
    ... the executor runs plan.device, plan.cpu, plan.fetch, plan.waits, plan.buffered, and starts plan.ahead ...
    for p in planner.prefetch(layer, shown): ...             # where planner.depth(tokens) is not 0: start the transfer of p.expert of p.layer
    planner.landed(p.layer, p.expert)                        # at a layer boundary, once such a transfer is complete
    planner.finish_step()                                    # after the last layer

A step is event-atomic: nothing that it needs is evicted in it. Times are the cost model's; an engine that has a clock may pass `now`.

`plan` is on the critical path of every layer of every token; who is asked for a schedule, and when nobody need be, is in `answers`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybrimoe_jax.decide.answers import Answers
from hybrimoe_jax.decide.caching import CachePolicy, parse_policy
from hybrimoe_jax.decide.flights import Ledger
from hybrimoe_jax.decide.layer_stream import LayerStream
from hybrimoe_jax.decide.plan import REFUSED, Counters, Fetch, LayerPlan, Prefetch, Refused, Victim
from hybrimoe_jax.decide.pool import capacity_of
from hybrimoe_jax.decide.prediction import Accuracy, Prediction, Shown
from hybrimoe_jax.decide.predictors import Predictor, build_predictor
from hybrimoe_jax.decide.prefetch import Forecast, Target
from hybrimoe_jax.decide.residency import Residency
from hybrimoe_jax.decide.schedule import Scheduler, get_scheduler
from hybrimoe_jax.decide.schedule.alone import with_shared_cores
from hybrimoe_jax.decide.scout import Scout
from hybrimoe_jax.decide.systems import System, get_system
from hybrimoe_jax.decide.view import View
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
      cache: replaces the system's cache policy, by name (see `caching.parse_policy`) or as a `CachePolicy` subclass; `cache_params` go to its
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
        system = get_system(system) if isinstance(system, str) else system
        self.system = system = system.override(
            cache=cache if isinstance(cache, str) else None,
            scheduler=scheduler if isinstance(scheduler, str) else None,
            prefetch=prefetch,
            lookahead=lookahead,
            guard=guard,
            predictor=predictor if isinstance(predictor, str) else None,
            scope=scope,
        )
        slots = [slots_per_layer] * num_layers if isinstance(slots_per_layer, int) else list(slots_per_layer)
        _check_sizes(num_layers, slots, frequencies, max_in_flight)
        self.num_layers, self.num_experts, self.top_k = num_layers, num_experts, top_k
        self.slots, self.costs, self.max_in_flight = slots, costs, max_in_flight
        rule = scheduler if isinstance(scheduler, Scheduler) else get_scheduler(system.scheduler)
        self.scheduler = with_shared_cores(rule, costs)
        policy, parameters = (cache, {}) if isinstance(cache, type) else parse_policy(system.cache)
        parameters = {**parameters, **(cache_params or {})}
        pooled = system.scope == "pooled"
        capacities = [capacity_of(sum(slots), num_layers, num_experts)] * num_layers if pooled else slots
        self.policies: list[CachePolicy] = policy.for_layers(
            num_experts, capacities, top_k, frequencies=frequencies, **parameters
        )
        self.accuracy = Accuracy(system.reach)
        model = (num_layers, num_experts, top_k, system.reach)
        self.predictor = predictor if isinstance(predictor, Predictor) else build_predictor(system.predictor, *model)
        self.counters = Counters()
        flags = {"allow_cpu": allow_cpu, "allow_fetch": allow_fetch, "allow_steal": allow_steal}
        self._ledger = Ledger(num_layers, self.counters)
        start_cold = cold and not policy.fixed
        self._residency = Residency(slots, self.policies, self._ledger, system.guard, start_cold, pooled)
        self._forecast = Forecast(self.scheduler, costs, **flags)
        looks = self.scheduler.looks_ahead
        view = View(self._residency, self._forecast, self.accuracy, top_k, max_in_flight) if looks else None
        self._scout = Scout(system, self.predictor, self._forecast, self.accuracy, self._residency, costs, looks)
        self._answers = Answers(self.scheduler, costs, view, **flags)
        streams = system.stream_prefill and allow_fetch
        self._stream = LayerStream(num_experts, costs, self.counters) if streams else None
        self._streaming = False  # in this step
        self._experts = frozenset(range(num_experts))
        self._clock = self._next_clock = self._link_free = 0.0
        self._until_next = 0.0  # from the start of the latest MoE block to the next one's
        self._tokens = 0  # of the latest plan's step; 0: nothing is planned
        if not self.depth(1):
            self._answers.forego(top_k, min(num_experts, sum(slots)) if pooled else max(slots, default=0))

    # What an engine asks for.

    @property
    def foregone(self) -> bool:
        """Whether a step of one token gives every expert to the CPU whatever the routing, so that nothing needs to be decided within it."""
        return self._answers.foregone is not None

    def streams(self, phase: str) -> bool:
        """Whether a step of this phase, "prefill" or "decode", is streamed layer by layer (see `layer_stream`), so that it must be begun."""
        return self._stream is not None and phase == "prefill"

    def begin_step(self, phase: str, now: float | None = None) -> tuple[int, ...]:
        """Opens a step. Returns the experts of the first MoE layer to move into a buffer at once: none where prompts are not streamed."""
        self._streaming = self.streams(phase)
        if not self._streaming:
            return ()
        self._clock = self._next_clock if now is None else now
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
        scores = _as_list(scores)
        self._clock = clock = self._next_clock if now is None else now
        self.policies[layer].observe(scores, loads)
        residency, ledger = self._residency, self._ledger
        resident, flying = residency.resident[layer], ledger.flying[layer]
        hits = tuple([e for e in loads if e in resident])
        misses = tuple([e for e in loads if e not in resident]) if len(hits) < len(loads) else ()
        in_flight = {e: max(0.0, flying[e].landing - clock) for e in misses if e in flying} if flying else {}
        link_busy = self._link_free - clock
        if link_busy < 0.0:
            link_busy = 0.0

        buffered = ahead = ()
        if self._streaming:
            schedule, buffered = self._stream.schedule(layer, loads, tokens, resident, in_flight, clock, link_busy)
            device = tuple([e for e in schedule.device if e in resident])
            awaited = [e for e in schedule.waits if e in in_flight]
        else:
            schedule, device = self._answers.schedule(
                layer, loads, scores, tokens, resident, hits, misses, in_flight, link_busy, equal
            )
            awaited = schedule.waits

        predictions = residency.predictions[layer]
        if predictions:
            asked = loads.keys()
            for distance, prediction in predictions:
                self.accuracy.update(distance, prediction.loads.keys(), asked)
            predictions.clear()
        useful, late, wasted = ledger.judge(layer, device, {e: in_flight[e] for e in awaited})
        residency.needed[layer] = set(loads)
        fetch = waits = ()
        if awaited:
            waits = tuple([residency.admit(layer, expert) for expert in awaited])
        if schedule.fetch:
            if self._streaming:
                fetch = tuple([Fetch(expert, None, True) for expert in schedule.fetch])
            else:
                fetch = tuple([residency.admit(layer, expert) for expert in schedule.fetch])
            self._link_free = clock + schedule.link_seconds
        if self._streaming:
            ahead = self._start_stream(layer + 1)
        if self._answers.view is not None:
            kept = sum([1 for f in waits + fetch if not f.stream])
            self._answers.view.fills.observe(layer, loads, tokens, kept)
        makespan = schedule.makespan
        self._until_next = until_next = makespan + self.costs.layer(tokens)
        self._next_clock, self._tokens = clock + until_next, tokens
        self.counters.count(len(hits), len(misses), len(schedule.cpu), fetch)
        return LayerPlan(
            layer,
            hits,
            misses,
            device,
            fetch,
            waits,
            schedule.cpu,
            useful,
            late,
            wasted,
            makespan,
            schedule,
            buffered,
            ahead,
        )

    def depth(self, tokens: int) -> int:
        """How many layers to look ahead in a step of so many tokens; 0 where looking cannot pay: it costs device time too.

        With equal loads: does any layer get faster by one more resident expert, and can a transfer land within the
        lookahead? Where the CPU outruns device and link (every "device" of a CPU-only machine), the answer is no. An
        adaptive depth is the smallest whose layers, with as many experts resident as there are slots for, take as long
        as a transfer. A streamed step has no time on the link to spare.
        """
        return 0 if self._streaming else self._scout.depth(tokens)

    def worth_looking(self, tokens: int) -> bool:
        """Whether any layer is to be predicted in a step of so many tokens."""
        return self.depth(tokens) > 0

    def gates(self, tokens: int) -> int:
        """How many coming layers' routers the predictor wants applied in a step of so many tokens."""
        return self.depth(tokens) if self.predictor.gates else 0

    def rests(self, tokens: int) -> bool:
        """Whether to leave out predicting in this step: after a step of several tokens in which no prefetch was found worth its
        while, a few are let pass (predicting for hundreds of tokens takes longer than planning)."""
        return self._scout.rests(tokens)

    def prefetch(self, layer: int, shown: Shown) -> tuple[Prefetch, ...]:
        """The transfers to start behind `layer`'s demand loads, by what `layer` shows of the coming layers; call it right after `plan`, and in every
        layer of a step or in none."""
        if not self._tokens or self._streaming:
            return ()
        chosen = self._scout.look(
            layer,
            shown,
            self._tokens,
            self._until_next,
            self._link_left(),
            self.max_in_flight - self._ledger.num_flying,
        )
        return self._start(chosen) if chosen else ()

    def plan_prefetch(self, layer: int, lookahead: Sequence[Prediction]) -> tuple[Prefetch, ...]:
        """The same by given predictions.

        Args:
          lookahead: predictions for layers layer+1, layer+2, ...; those beyond the last layer or the system's lookahead are not used.
        """
        if not self._scout.active or not self._tokens:
            return ()
        lookahead = [Prediction(loads, _as_list(scores)) for loads, scores in lookahead]
        room = self.max_in_flight - self._ledger.num_flying
        chosen = self._scout.choose(layer, lookahead, self._tokens, self._until_next, self._link_left(), room)
        return self._start(chosen)

    def landed(self, layer: int, expert: int, seconds: float | None = None) -> Victim | Refused | None:
        """Tells of a prefetch whose transfer is complete; returns the victim whose slot it takes, None for a free slot, or REFUSED.

        REFUSED: it is dropped, since all that could be evicted is needed in this step, predicted for the coming one, or hotter.
        `seconds`: how long it held the link, where that was measured.
        """
        flight = self._ledger.take(layer, expert)
        if seconds is not None:
            flight.seconds = seconds
        self._clear_link()
        kept, victim = self._residency.admit_landed(layer, expert, flight.open)
        if not kept:
            self._ledger.refuse(flight)
            return REFUSED
        self._ledger.keep(layer, expert, flight)
        return victim

    def waited(self, layer: int, expert: int, seconds: float, wait: float) -> None:
        """Tells of one of the latest plan's `waits` how long its transfer held the link, and how long it was waited for, where that was measured."""
        self._ledger.waited(layer, expert, seconds, wait)

    def finish_step(self) -> None:
        """Ends the step (one token of each sequence, or one prefill chunk): prefetches for layers that were not planned are wasted."""
        if self._streaming:
            self._streaming = False
            self._stream.clear()
        self._ledger.finish_step()
        self._residency.finish_step()
        self._scout.finish_step(self._tokens, self.counters.prefetch_issued)

    def abandon_step(self) -> None:
        """Forgets a step that was broken off: its transfers under way count as wasted and will not be told of by `landed`."""
        self.finish_step()
        self._ledger.abandon()
        self._tokens = 0
        self._clear_link()

    # How it is done.

    def _start(self, chosen: Sequence[tuple[Target, int]]) -> tuple[Prefetch, ...]:
        for target, expert in chosen:
            self._link_free = max(self._link_free, self._clock) + self._forecast.transfer
            self._ledger.start(target.layer, expert, self._link_free, self._forecast.transfer)
        return tuple([Prefetch(target.layer, expert, target.distance) for target, expert in chosen])

    def _start_stream(self, layer: int) -> tuple[int, ...]:
        """Queues a whole layer behind all that is on the link."""
        if layer >= self.num_layers:
            return ()
        present = self._residency.resident[layer] | self._ledger.flying[layer].keys()
        experts, self._link_free = self._stream.start(layer, present, max(self._link_free, self._clock))
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

    def _link_left(self) -> float:
        """Seconds until the link is done with what is queued."""
        left = self._link_free - self._clock
        return left if left > 0.0 else 0.0

    def _clear_link(self) -> None:
        """With nothing under way the link is free, whatever the cost model had expected."""
        if not self._ledger.num_flying and not self._streaming:
            self._link_free = min(self._link_free, self._clock)


def _check_sizes(num_layers: int, slots: Sequence[int], frequencies: Sequence | None, max_in_flight: int) -> None:
    """UserError for what does not fit the model."""
    if len(slots) != num_layers:
        raise UserError(f"planner: slots for {len(slots)} layers, but the model has {num_layers} MoE layers")
    if frequencies is not None and len(frequencies) != num_layers:
        raise UserError(f"planner: frequencies of {len(frequencies)} layers, but the model has {num_layers} MoE layers")
    if max_in_flight < 0:
        raise UserError(f"planner: max_in_flight {max_in_flight} must be at least 0")


def _as_list(scores: Sequence[float] | None) -> Sequence[float] | None:
    """Arrays become lists: indexing a list is several times faster."""
    return scores if scores is None or isinstance(scores, (list, tuple)) else scores.tolist()
