"""The planner: joins placement, cache policies, scheduler and prefetcher, and holds the truth about who is resident.

One decode step, per MoE layer (ordinals 0..L-1 of the layers that have experts):

    plan = planner.plan(layer, loads, scores, tokens)        # residency is already what it will be after the step
    ... the executor runs plan.device, plan.cpu, plan.fetch, plan.waits ...
    ahead = planner.predict(layer, shown)                    # where planner.depth(tokens) is not 0
    for p in planner.plan_prefetch(layer, ahead): ...        # start the transfer of p.expert of p.layer
    planner.landed(p.layer, p.expert)                        # at a layer boundary, once such a transfer is complete
    planner.finish_step()                                    # after the last layer

A step is event-atomic: nothing that it needs is evicted in it. Times are the cost model's; an engine that has a clock may pass `now`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybrimoe_jax.decide.caching import CachePolicy, parse_policy
from hybrimoe_jax.decide.flights import Ledger
from hybrimoe_jax.decide.plan import REFUSED, Counters, LayerPlan, Prefetch, Refused
from hybrimoe_jax.decide.prediction import Accuracy, Prediction, Shown
from hybrimoe_jax.decide.predictors import Predictor, build_predictor
from hybrimoe_jax.decide.prefetch import Forecast, choose_by_impact, choose_next_layer
from hybrimoe_jax.decide.residency import Residency
from hybrimoe_jax.decide.schedule import Problem, Schedule, Scheduler, get_scheduler
from hybrimoe_jax.decide.schedule.alone import SharedCoresScheduler, with_shared_cores
from hybrimoe_jax.decide.systems import MAX_DEPTH, System, get_system
from hybrimoe_jax.decide.view import View
from hybrimoe_jax.errors import UserError

REST_STEPS = 7


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
    ):
        system = get_system(system) if isinstance(system, str) else system
        self.system = system = system.override(
            cache=cache if isinstance(cache, str) else None,
            scheduler=scheduler if isinstance(scheduler, str) else None,
            prefetch=prefetch,
            lookahead=lookahead,
            guard=guard,
            predictor=predictor if isinstance(predictor, str) else None,
        )
        slots = [slots_per_layer] * num_layers if isinstance(slots_per_layer, int) else list(slots_per_layer)
        if len(slots) != num_layers:
            raise UserError(f"planner: slots for {len(slots)} layers, but the model has {num_layers} MoE layers")
        if frequencies is not None and len(frequencies) != num_layers:
            raise UserError(
                f"planner: frequencies of {len(frequencies)} layers, but the model has {num_layers} MoE layers"
            )
        if max_in_flight < 0:
            raise UserError(f"planner: max_in_flight {max_in_flight} must be at least 0")
        self.num_layers, self.num_experts, self.top_k = num_layers, num_experts, top_k
        self.slots, self.costs, self.max_in_flight = slots, costs, max_in_flight
        rule = scheduler if isinstance(scheduler, Scheduler) else get_scheduler(system.scheduler)
        self.scheduler = with_shared_cores(rule, costs)
        policy, parameters = (cache, {}) if isinstance(cache, type) else parse_policy(system.cache)
        parameters = {**parameters, **(cache_params or {})}
        self.policies: list[CachePolicy] = policy.for_layers(
            num_experts, slots, top_k, frequencies=frequencies, **parameters
        )
        self.accuracy = Accuracy(system.reach)
        model = (num_layers, num_experts, top_k, system.reach)
        self.predictor = predictor if isinstance(predictor, Predictor) else build_predictor(system.predictor, *model)
        self.counters = Counters()
        self._flags = {"allow_cpu": allow_cpu, "allow_fetch": allow_fetch, "allow_steal": allow_steal}
        self._forecast = Forecast(self.scheduler, costs, **self._flags)
        start_cold = cold and not policy.fixed
        self._depths: dict[tuple[int, int], int] = {}
        self._resting = self._issued_before = 0
        self._looked = False
        self._ledger = Ledger(num_layers, self.counters)
        self._residency = Residency(slots, self.policies, self._ledger, system.guard, start_cold)
        self._view = None
        if self.scheduler.looks_ahead:
            self._view = View(self._residency, self._forecast, self.accuracy, top_k, max_in_flight)
        self._clock = self._next_clock = self._link_free = 0.0
        self._planned: tuple[Schedule, int] | None = None
        self.foregone = isinstance(self.scheduler, SharedCoresScheduler) and (
            not self.depth(1) and self.scheduler.foregone(costs, top_k, max(slots, default=0), **self._flags)
        )
        """Whether a step of one token gives every expert to the CPU whatever the routing, so that nothing needs to be decided within it."""

    # What an engine asks for.

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
        self._check(layer, loads, scores, tokens)
        scores = _as_list(scores)
        self._clock = clock = self._next_clock if now is None else now
        self.policies[layer].observe(scores, loads)
        residency = self._residency
        resident, flying = residency.resident[layer], self._ledger.flying[layer]
        hits = tuple([e for e in loads if e in resident])
        misses = tuple([e for e in loads if e not in resident])
        in_flight = {e: max(0.0, flying[e].landing - clock) for e in misses if e in flying} if flying else {}
        link_busy = self._link_free - clock
        problem = Problem(
            loads,
            resident,
            self.costs,
            tokens,
            scores,
            in_flight,
            link_busy if link_busy > 0 else 0.0,
            **self._flags_for(loads),
        )
        if self._view is not None:
            self._view.show(problem, layer, misses)
        alone = self.foregone and tokens == 1 and not in_flight
        schedule = self.scheduler.alone(problem) if alone else self.scheduler.schedule(problem)
        device = tuple([e for e in schedule.device if e in resident]) if misses else schedule.device
        for distance, prediction in residency.predictions[layer]:
            self.accuracy.update(distance, prediction.loads, loads)
        residency.predictions[layer].clear()
        useful, late, wasted = self._ledger.judge(layer, device, {e: in_flight[e] for e in schedule.waits})
        residency.needed[layer] = set(loads)
        waits = tuple([residency.admit(layer, expert) for expert in schedule.waits])
        fetch = tuple([residency.admit(layer, expert) for expert in schedule.fetch])

        if self._view is not None:
            self._view.fills.observe(layer, loads, tokens, sum([1 for f in waits + fetch if not f.stream]))
        if fetch:
            self._link_free = clock + schedule.link_seconds
        self._next_clock = clock + schedule.makespan + self.costs.layer(tokens)
        self._planned = (schedule, tokens)
        counters = self.counters
        counters.steps += 1
        counters.activated += len(loads)
        counters.hits += len(hits)
        counters.misses += len(misses)
        counters.cpu += len(schedule.cpu)
        counters.device += len(schedule.device)
        counters.fetched += len(fetch)
        counters.streamed += sum([1 for f in fetch if f.stream])
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
            schedule.makespan,
            schedule,
        )

    def depth(self, tokens: int) -> int:
        """How many layers to look ahead in a step of so many tokens; 0 where looking cannot pay: it costs device time too.

        With equal loads: does any layer get faster by one more resident expert, and can a transfer land within the
        lookahead? Where the CPU outruns device and link (every "device" of a CPU-only machine), the answer is no. An
        adaptive depth is the smallest whose layers, with as many experts resident as there are slots for, take as long
        as a transfer.
        """
        if not self.system.reach or not self._flags["allow_fetch"] or not any(self.slots):
            return 0
        if self.system.prefetch == "next-layer":
            return 1
        active = min(self.num_experts, tokens * self.top_k)
        key = (active, -(-tokens * self.top_k // active))
        if key not in self._depths:
            self._depths[key] = self._depth(*key, tokens)
        return self._depths[key]

    def worth_looking(self, tokens: int) -> bool:
        """Whether any layer is to be predicted in a step of so many tokens."""
        return self.depth(tokens) > 0

    def gates(self, tokens: int) -> int:
        """How many coming layers' routers the predictor wants applied in a step of so many tokens."""
        return self.depth(tokens) if self.predictor.gates else 0

    def predict(self, layer: int, shown: Shown) -> list[Prediction]:
        """What the coming layers will be asked for, nearest first, by what `layer` shows; for `plan_prefetch`."""
        return self.predictor.predict(layer, shown, self.depth(len(shown.ids)))

    def rests(self, tokens: int) -> bool:
        """Whether to leave out predicting in this step: after a step of several tokens in which no prefetch was found worth
        its while, a few are let pass (predicting for hundreds of tokens takes longer than planning)."""
        return tokens > 1 and self._resting > 0

    def plan_prefetch(self, layer: int, lookahead: Sequence[Prediction]) -> tuple[Prefetch, ...]:
        """The transfers to start behind `layer`'s demand loads; call it right after `plan`.

        Args:
          lookahead: predictions for layers layer+1, layer+2, ...; those beyond the last layer or the system's lookahead are not used.
        """
        if not self.system.reach or not self._flags["allow_fetch"] or self._planned is None:
            return ()
        self._looked = True
        depth = self.system.reach if self.system.lookahead != "adaptive" else self.depth(self._planned[1])
        lookahead = lookahead[: min(depth, self.num_layers - 1 - layer)]
        lookahead = [Prediction(loads, _as_list(scores)) for loads, scores in lookahead]
        for distance, prediction in enumerate(lookahead, 1):
            self._residency.predictions[layer + distance].append((distance, prediction))
        room = self.max_in_flight - self._ledger.num_flying
        if room <= 0 or not lookahead:
            return ()
        targets = [self._residency.target(layer + d, d, p) for d, p in enumerate(lookahead, 1)]
        if self.system.prefetch == "next-layer":
            chosen = choose_next_layer(targets[0], room)
        else:
            schedule, tokens = self._planned
            chosen = choose_by_impact(
                targets,
                self._forecast,
                self.accuracy,
                tokens=tokens,
                until_next=schedule.makespan + self.costs.layer(tokens),
                link_free=max(0.0, self._link_free - self._clock),
                room=room,
            )
        for target, expert in chosen:
            self._link_free = max(self._link_free, self._clock) + self._forecast.transfer
            self._ledger.start(target.layer, expert, self._link_free, self._forecast.transfer)
        return tuple(Prefetch(target.layer, expert, target.distance) for target, expert in chosen)

    def landed(self, layer: int, expert: int, seconds: float | None = None) -> int | Refused | None:
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
        self._ledger.finish_step()
        if self._planned is not None and self._planned[1] > 1:
            fruitless = self._looked and self.counters.prefetch_issued == self._issued_before
            self._resting = REST_STEPS if fruitless else max(0, self._resting - 1)
        self._looked, self._issued_before = False, self.counters.prefetch_issued
        self._residency.finish_step()
        self.predictor.finish_step()

    def abandon_step(self) -> None:
        """Forgets a step that was broken off: its transfers under way count as wasted and will not be told of by `landed`."""
        self.finish_step()
        self._ledger.abandon()
        self._planned = None
        self._clear_link()

    # How it is done.

    def _depth(self, active: int, load: int, tokens: int) -> int:
        def makespan(resident: int) -> float:
            return self._forecast.outlook([load] * resident, [load] * (active - resident), tokens).makespan

        most = min(active - 1, max(self.slots) - 1)
        tried = sorted({most * i // 8 for i in range(9)})
        price = self.costs.look if self.predictor.gates else 0.0
        rest, transfer = self.costs.layer(tokens), self._forecast.transfer
        in_time = transfer <= self.system.reach * (makespan(0) + rest)
        if not in_time or not any(makespan(r) - makespan(r + 1) > price for r in tried):
            return 0
        if self.system.lookahead != "adaptive":
            return self.system.reach
        here = round(active * sum(self.slots) / (self.num_layers * self.num_experts))
        layer = makespan(here) + rest
        return next((d for d in range(1, MAX_DEPTH) if d * layer >= transfer), MAX_DEPTH)

    def _check(self, layer: int, loads: Mapping[int, int], scores: Sequence[float] | None, tokens: int) -> None:
        if not 0 <= layer < self.num_layers:
            raise UserError(f"planner: layer {layer} is outside the model's {self.num_layers} MoE layers")
        if tokens < 1:
            raise UserError(f"planner: layer {layer} has {tokens} tokens; a step has at least 1")
        if loads and not (0 <= min(loads) and max(loads) < self.num_experts and min(loads.values()) > 0):
            raise UserError(
                f"planner: layer {layer} got loads {dict(loads)}; experts are 0..{self.num_experts - 1}, loads above 0"
            )
        if scores is not None and len(scores) != self.num_experts:
            raise UserError(f"planner: layer {layer} got {len(scores)} scores for {self.num_experts} experts")

    def _flags_for(self, loads: Mapping[int, int]) -> dict[str, bool]:
        """No demand loads where issuing one keeps the CPU from computing for longer than it takes for the expert itself."""
        costs = self.costs
        if not costs.fetch_host or not loads or not self.scheduler.uses_cpu or not self._flags["allow_cpu"]:
            return self._flags
        if costs.fetch_host < costs.cpu(max(loads.values())):
            return self._flags
        return self._flags | {"allow_fetch": False}

    def _clear_link(self) -> None:
        """With nothing under way the link is free, whatever the cost model had expected."""
        if not self._ledger.num_flying:
            self._link_free = min(self._link_free, self._clock)


def _as_list(scores: Sequence[float] | None) -> Sequence[float] | None:
    """Arrays become lists: indexing a list is several times faster."""
    return scores if scores is None or isinstance(scores, (list, tuple)) else scores.tolist()
