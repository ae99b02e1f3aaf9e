"""The planner: joins cache policies, scheduler and prefetcher, and holds the truth about who is resident.

One step, per MoE layer (numbered 0..L-1, of the layers that have experts):

    planner.begin_step(phase)                     # what to stream of layer 0 at once, see `layer_stream`
    plan = planner.plan(layer, loads, scores, tokens)      # residency is now what it will be after the step
    ...                                           # the executor carries the plan out
    for p in planner.prefetch(layer, outlook):    # where planner.should_predict(tokens): start these transfers
        ...
    planner.landed(p.layer, p.expert)             # at a layer boundary, once such a transfer is complete
    planner.finish_step()                         # after the last layer

A step is event-atomic: nothing that it needs is evicted in it. Times are the cost model's; an engine that has a clock
may pass `now`. `plan` is on the critical path of every layer of every token; `schedule_cache` tells who is asked for a
schedule, and when nobody need be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybrimoe_jax.decide.cache import CachePolicy
from hybrimoe_jax.decide.costs import Costs
from hybrimoe_jax.decide.layer_stream import LayerStream
from hybrimoe_jax.decide.plan import Counters, Fetch, LayerPlan, Prefetch, Refused, Victim
from hybrimoe_jax.decide.prefetch.impact import Forecast
from hybrimoe_jax.decide.prefetch.prediction import Accuracy, RouterOutlook, Scores, as_list
from hybrimoe_jax.decide.prefetch.prefetch_planner import PrefetchPlanner
from hybrimoe_jax.decide.residency.inflight import InflightTransfers
from hybrimoe_jax.decide.residency.residency import Residency
from hybrimoe_jax.decide.resolve import resolve_system
from hybrimoe_jax.decide.schedule_cache import ScheduleCache
from hybrimoe_jax.decide.systems import System
from hybrimoe_jax.errors import RuleError, UserError

_ONE = {1}


class Planner:
    """Decides for all layers of one engine.

    Args:
      system: a `System` or its name; `System.override` replaces its parts.
      num_layers, num_experts, top_k: MoE layers, routed experts in each, experts per token.
      slots_per_layer: device slots of each layer (an int for all alike).
      costs: seconds for everything, see `schedule.Problem`.
      frequencies: [num_layers][num_experts] activation counts of other sequences: the static placement, the warm start.
      policies: the layers' cache policies, in place of those that the system names.
      recording: the routing that a predictor `recorded:TRACE` is counted on, see `predictors.build_predictor`.
      max_in_flight: prefetches under way at once, that is staging buffers for them.
      cold: start with empty slots (a static placement is always loaded).
      counts_of: the planner whose place this one takes; what it has counted goes on.
    """

    def __init__(
        self,
        system: System | str,
        num_layers: int,
        num_experts: int,
        top_k: int,
        slots_per_layer: Sequence[int] | int,
        costs: Costs,
        *,
        frequencies: Sequence[Sequence[float]] | None = None,
        policies: Sequence[CachePolicy] | None = None,
        recording: Any = None,
        max_in_flight: int = 2,
        cold: bool = False,
        counts_of: Planner | None = None,
    ):
        if max_in_flight < 0:
            raise UserError(f"planner: max_in_flight {max_in_flight} must be at least 0")
        model = (num_layers, num_experts, top_k)
        parts = resolve_system(system, *model, slots_per_layer, costs, frequencies, policies, recording)
        self.num_layers, self.num_experts, self.top_k = model
        self.system, self.slots, self.scheduler, self.predictor, self.policies = parts
        self.costs, self.max_in_flight = costs, max_in_flight
        self.accuracy, self.counters = Accuracy(parts.system.max_distance), Counters()
        if counts_of is not None:
            self.accuracy, self.counters = counts_of.accuracy, counts_of.counters
        self._inflight = InflightTransfers(num_layers, self.counters)
        self._residency = Residency(
            self.slots, self.policies, self._inflight, parts.system.guard, cold and not parts.fixed, parts.pooled
        )
        self._prefetch_planner = PrefetchPlanner(
            parts.system, self.predictor, Forecast(self.scheduler, costs), self.accuracy, self._residency, max_in_flight
        )
        self._schedule_cache = ScheduleCache(self.scheduler, costs)
        self._layer_stream = LayerStream(num_experts, costs, self.counters) if parts.system.stream_prefill else None
        self._stream: LayerStream | None = None  # of this step
        self._experts = frozenset(range(num_experts))
        self._next_clock = self._until_next = 0.0  # the latter: from the latest MoE block's start to the next one's
        self._tokens = 0  # of the latest plan's step; 0: nothing is planned
        self.began_with: str | None = None  # the digest of a cache state
        # What `costs.handover` must be for `all_on_cpu`; None where nothing would do.
        self.handover_for_all_on_cpu = self._schedule_cache.prove_all_on_cpu(top_k, parts.most_resident)
        if self.all_on_cpu:  # whatever a prefetch might bring, it is not worth leaving the program for
            self._prefetch_planner.leave_out(1)

    @property
    def all_on_cpu(self) -> bool:
        """Whether a step of one token gives every expert to the CPU whatever the routing: nothing is decided in it."""
        return self._schedule_cache.all_on_cpu is not None

    def resident(self, layer: int) -> frozenset[int]:
        """Experts of `layer` in its slots now."""
        return frozenset(self._residency.resident[layer])

    def keeps_residents(self, tokens: int) -> bool:
        """Whether every plan of a step of so many tokens leaves all residents to the device, see `Scheduler`."""
        activated = min(self.num_experts, tokens * self.top_k)
        return not self.costs.shares_cores and self.scheduler.keeps_residents(self.costs, tokens, activated)

    def streams(self, phase: str) -> bool:
        """Whether a step of this phase, "prefill" or "decode", is streamed layer by layer, see `layer_stream`."""
        return self._layer_stream is not None and phase == "prefill"

    def begin_step(self, phase: str, now: float | None = None) -> tuple[int, ...]:
        """Opens a step.

        Returns the experts of the first MoE layer to move into a buffer at once, none unless streamed.
        """
        self._stream = self._layer_stream if self.streams(phase) else None
        if self._stream is None:
            return ()
        self._inflight.clock = self._next_clock if now is None else now
        return self._start_stream(self._stream, 0)

    def plan(
        self,
        layer: int,
        loads: Mapping[int, int],
        scores: Scores | None,
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
        unit_loads = self._check(layer, loads, scores, tokens)
        scores = as_list(scores)
        residency, inflight, stream = self._residency, self._inflight, self._stream
        inflight.clock = clock = self._next_clock if now is None else now
        self.policies[layer].observe(scores, loads)
        resident, transfers = residency.resident[layer], inflight.in_flight[layer]
        hits = tuple([e for e in loads if e in resident])
        misses = tuple([e for e in loads if e not in resident]) if len(hits) < len(loads) else ()
        in_flight = {e: max(0.0, transfers[e].landing - clock) for e in misses if e in transfers} if transfers else {}
        link_busy = max(0.0, inflight.link_free - clock)

        if stream is not None:
            double_buffered, schedule, device, awaited = stream.schedule(
                layer, loads, tokens, resident, in_flight, clock, link_busy
            )
        else:
            double_buffered = ()
            try:
                schedule, device = self._schedule_cache.schedule(
                    loads, scores, tokens, resident, hits, misses, in_flight, link_busy, unit_loads
                )
            except RuleError as error:
                error.layer = layer  # which a scheduler is not told
                raise
            awaited = schedule.awaited

        if residency.predictions[layer]:
            self._compare_predictions(layer, loads)
        useful, late, wasted = inflight.judge(layer, device, {e: in_flight[e] for e in awaited})
        residency.needed[layer] = set(loads)
        kept = tuple([residency.admit(layer, expert) for expert in awaited]) if awaited else ()
        fetch = self._fetch(layer, schedule.fetch) if schedule.fetch else ()
        if fetch:
            inflight.link_free = clock + schedule.link_seconds
        next_layer_experts = () if stream is None else self._start_stream(stream, layer + 1)
        self._until_next = schedule.makespan + self.costs.layer(tokens)
        self._next_clock, self._tokens = clock + self._until_next, tokens
        self.counters.count(len(hits), len(misses), len(schedule.cpu), fetch)
        return LayerPlan(
            layer, hits, misses, device, fetch, kept, schedule.cpu, useful, late, wasted, schedule.makespan, schedule,
            double_buffered, next_layer_experts,
        )  # fmt: skip

    def depth(self, tokens: int) -> int:
        """How many layers to predict in a step of so many tokens, see `PrefetchPlanner.depth`.

        0 in a streamed step, whose link has no time to spare.
        """
        return 0 if self._stream is not None else self._prefetch_planner.depth(tokens)

    def should_predict(self, tokens: int) -> bool:
        """Whether any layer is to be predicted in a step of so many tokens."""
        return self.depth(tokens) > 0

    def routers_wanted(self, tokens: int) -> int:
        """How many coming layers' routers the predictor wants applied in a step of so many tokens."""
        return self.depth(tokens) if self.predictor.needs_routers else 0

    def backing_off(self, tokens: int) -> bool:
        """Whether to leave out predicting in this step, see `PrefetchPlanner.backing_off`."""
        return self._prefetch_planner.backing_off(tokens)

    def prefetch(self, layer: int, outlook: RouterOutlook) -> tuple[Prefetch, ...]:
        """The transfers to start behind `layer`'s demand fetches, by what `layer` shows of the coming layers.

        Call it right after `plan`, and in every layer of a step or in none.
        """
        if not self._tokens or self._stream is not None:
            return ()
        return self._prefetch_planner.prefetch(layer, outlook, self._tokens, self._until_next)

    def landed(self, layer: int, expert: int, seconds: float | None = None) -> Victim | Refused | None:
        """Tells of a prefetch whose transfer is complete.

        Returns the victim whose slot it takes, None for a free slot, or REFUSED.

        REFUSED: it is dropped, since all that could be evicted is needed in this step, predicted for the coming one, or
        hotter. `seconds`: how long it held the link, where that was measured.
        """
        found = self._residency.land(layer, expert, seconds)
        if self._stream is None:
            self._inflight.clear_link()
        return found

    def waited(self, layer: int, expert: int, seconds: float, wait: float) -> None:
        """Tells what was measured of one of the latest plan's `awaited`.

        `seconds`: how long its transfer held the link; `wait`: how long it was waited for.
        """
        self._inflight.waited(layer, expert, seconds, wait)

    def finish_step(self) -> None:
        """Ends the step (one token of each sequence, or one prefill chunk).

        Prefetches for layers that were not planned are wasted.
        """
        self._stream = None
        self._inflight.finish_step()
        self._residency.finish_step()
        self._prefetch_planner.finish_step(self._tokens, self.counters.prefetch_issued)

    def abandon_step(self) -> None:
        """Forgets a step that was broken off: its transfers under way are wasted, and never told of by `landed`."""
        self.finish_step()
        self._inflight.abandon()
        self._tokens = 0
        self._inflight.clear_link()

    def under_way(self) -> list[tuple[int, int]]:
        """Prefetches that have not landed, (layer, expert), in the order in which they should."""
        transfers = [
            (t.landing, layer, e) for layer, some in enumerate(self._inflight.in_flight) for e, t in some.items()
        ]
        return [(layer, expert) for _, layer, expert in sorted(transfers)]

    def learned(self) -> dict[str, Any]:
        """The objects that steps have taught something: what a `cache_state` packs, and fills again."""
        return {"policies": list(self.policies), "predictor": self.predictor, "accuracy": self.accuracy}

    @property
    def back_off(self) -> int:
        """For how many more steps of several tokens predicting is left out."""
        return self._prefetch_planner.back_off

    def go_on(self, resident: Sequence[set[int]], back_off: int, began_with: str) -> None:
        """Goes on from a cache state, whose digest is `began_with`; `learned` has been filled already.

        ValueError where the slots do not hold the residents.
        """
        self._residency.replace(resident)
        self._prefetch_planner.back_off, self.began_with = back_off, began_with

    def _compare_predictions(self, layer: int, loads: Mapping[int, int]) -> None:
        """Counts what was predicted of the layer as true or not."""
        predictions = self._residency.predictions[layer]
        for distance, prediction in predictions:
            self.accuracy.update(distance, prediction.loads.keys(), loads.keys())
        predictions.clear()

    def _fetch(self, layer: int, experts: Sequence[int]) -> tuple[Fetch, ...]:
        """The demand fetches. In a streamed step nothing enters the slots."""
        if self._stream is not None:
            return tuple([Fetch(expert, None, True) for expert in experts])
        return tuple([self._residency.admit(layer, expert) for expert in experts])

    def _start_stream(self, stream: LayerStream, layer: int) -> tuple[int, ...]:
        """Queues a whole layer behind all that is on the link."""
        if layer >= self.num_layers:
            return ()
        inflight = self._inflight
        present = self._residency.resident[layer] | inflight.in_flight[layer].keys()
        experts, inflight.link_free = stream.start(layer, present, max(inflight.link_free, inflight.clock))
        return experts

    def _check(self, layer: int, loads: Mapping[int, int], scores: Scores | None, tokens: int) -> bool:
        """Whether this is one token with loads of 1; UserError for what cannot be."""
        if not 0 <= layer < self.num_layers:
            raise UserError(f"planner: layer {layer} is outside the model's {self.num_layers} MoE layers")
        if tokens < 1:
            raise UserError(f"planner: layer {layer} has {tokens} tokens; a step has at least 1")
        if scores is not None and len(scores) != self.num_experts:
            raise UserError(f"planner: layer {layer} got {len(scores)} scores for {self.num_experts} experts")
        unit_loads = tokens == 1 and set(loads.values()) == _ONE
        if not loads.keys() <= self._experts or not (unit_loads or min(loads.values(), default=1) > 0):
            raise UserError(
                f"planner: layer {layer} got loads {dict(loads)}; experts are 0..{self.num_experts - 1}, loads above 0"
            )
        return unit_loads
