"""Prefetching: how far ahead it pays to predict, when it is worth the trouble, and which transfers to start.

Predicting and choosing cost several times what planning a layer does, so they are done only where a transfer could be
started at all: with a buffer free, and with the link free early enough for one more expert to land before the farthest
layer in sight could start. Elsewhere the predictor learns from the layer and predicts nothing, which changes no
decision; the accuracy by distance is that of the predictions asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

from hybrimoe_jax.decide.plan import Prefetch
from hybrimoe_jax.decide.prefetch.impact import Forecast, Target, choose_by_impact, choose_next_layer
from hybrimoe_jax.decide.prefetch.prediction import Accuracy, Prediction, Predictor, RouterOutlook
from hybrimoe_jax.decide.residency.residency import Residency
from hybrimoe_jax.decide.systems import MAX_DEPTH, System

BACK_OFF_STEPS = 7


class PrefetchPlanner:
    """The planner's part that prefetches. Args as of `Planner`."""

    def __init__(
        self,
        system: System,
        predictor: Predictor,
        forecast: Forecast,
        accuracy: Accuracy,
        residency: Residency,
        max_in_flight: int,
    ):
        self.system, self.predictor, self.forecast, self.accuracy = system, predictor, forecast, accuracy
        self.residency, self.inflight, self.costs = residency, residency.inflight, forecast.costs
        self.max_in_flight = max_in_flight
        self.num_layers, self.num_experts, self.top_k = predictor.num_layers, predictor.num_experts, predictor.top_k
        self.active = system.max_distance > 0
        self._depths: dict[int, int] = {}  # by the tokens of a step
        self._longest: float | None = None
        self.back_off = 0
        self._issued_before: int = 0
        self._predicted = False

    def depth(self, tokens: int) -> int:
        """How many layers to predict in a step of so many tokens; 0 where that cannot pay: it costs device time too.

        With equal loads: does any layer get faster by one more resident expert, and can a transfer land within the
        lookahead? Where the CPU outruns device and link (every "device" of a CPU-only machine), the answer is no. An
        adaptive depth is the smallest whose layers, with as many experts resident as there are slots for, take as long
        as a transfer.
        """
        depth = self._depths.get(tokens)
        if depth is None:
            if not self.active or not any(self.residency.slots):
                depth = 0
            elif self.system.prefetch == "next-layer":
                depth = 1
            else:
                active = min(self.num_experts, tokens * self.top_k)
                depth = self._depth(active, -(-tokens * self.top_k // active), tokens)
            self._depths[tokens] = depth
        return depth

    def leave_out(self, tokens: int) -> None:
        """Predicts no more in steps of so many tokens."""
        self._depths[tokens] = 0

    def backing_off(self, tokens: int) -> bool:
        """Whether to leave out predicting in this step.

        After a step of several tokens in which no prefetch was found worth its while, a few are let pass (predicting
        for hundreds of tokens takes longer than planning).
        """
        return tokens > 1 and self.back_off > 0

    @property
    def room(self) -> int:
        """How many more transfers may be under way."""
        return self.max_in_flight - self.inflight.num_in_flight

    def prefetch(self, layer: int, shown: RouterOutlook, tokens: int, until_next: float) -> tuple[Prefetch, ...]:
        """Predicts from what `layer` shows, if a transfer could be started, and starts those that are worth it.

        Args as of `start`.
        """
        if not self.active:
            return ()
        depth = min(self.depth(tokens), self.num_layers - 1 - layer)
        self._predicted = True
        possible = self.room > 0 and depth > 0 and self._fits(depth, tokens, until_next)
        found = self.predictor.predict(layer, shown, depth if possible else 0)
        return self.start(layer, found, tokens, until_next) if possible else ()

    def start(
        self, layer: int, lookahead: Sequence[Prediction], tokens: int, until_next: float
    ) -> tuple[Prefetch, ...]:
        """Chooses the transfers to start behind `layer` and queues them, in sending order.

        Args:
          lookahead: predictions of the layers after `layer`, as many as are to be looked at.
          tokens: in the step. until_next: seconds until the next layer's MoE block.
        """
        chosen = self._choose(layer, lookahead, tokens, until_next) if self.active else ()
        for target, expert in chosen:
            self.inflight.start(target.layer, expert, self.forecast.transfer)
        return tuple([Prefetch(target.layer, expert, target.distance) for target, expert in chosen])

    def _choose(
        self, layer: int, lookahead: Sequence[Prediction], tokens: int, until_next: float
    ) -> list[tuple[Target, int]]:
        self._predicted = True
        residency, targets = self.residency, list[Target]()
        for distance, prediction in enumerate(lookahead, 1):
            residency.predictions[layer + distance].append((distance, prediction))
            targets.append(residency.target(layer + distance, distance, prediction))
        room = self.room
        if room <= 0 or not targets:
            return []
        if self.system.prefetch == "next-layer":
            return choose_next_layer(targets[0], room)
        return choose_by_impact(
            targets,
            self.forecast,
            self.accuracy,
            tokens=tokens,
            until_next=until_next,
            link_free=self.inflight.link_left,
            room=room,
        )

    def finish_step(self, tokens: int, issued: int) -> None:
        """The step had so many tokens, and so many prefetches have been issued since the start."""
        if tokens > 1:
            fruitless = self._predicted and issued == self._issued_before
            self.back_off = BACK_OFF_STEPS if fruitless else max(0, self.back_off - 1)
        self._predicted, self._issued_before = False, issued
        self.predictor.finish_step()

    def _fits(self, depth: int, tokens: int, until_next: float) -> bool:
        """Whether a transfer queued now can land before the layer `depth` ahead starts.

        Every layer in between is taken to last as long as it ever may.
        """
        if tokens > 1 or self.system.prefetch == "next-layer":
            return True
        if self._longest is None:
            k = self.top_k
            numbers = [(here, absent) for here in range(k + 1) for absent in range(k + 1 - here)]
            self._longest = max(self.forecast.equal(*numbers_, 1, 1).makespan for numbers_ in numbers)
        landing = self.inflight.link_left + self.forecast.transfer
        return landing <= until_next + (depth - 1) * (self._longest + self.costs.layer(1))

    def _depth(self, active: int, load: int, tokens: int) -> int:
        def makespan(resident: int) -> float:
            return self.forecast.equal(resident, active - resident, load, tokens).makespan

        slots = self.residency.slots
        most = min(active - 1, max(slots) - 1)
        tried = sorted({most * i // 8 for i in range(9)})
        price = self.costs.look if self.predictor.needs_routers else 0.0
        rest, transfer = self.costs.layer(tokens), self.forecast.transfer
        in_time = transfer <= self.system.max_distance * (makespan(0) + rest)
        if not in_time or not any(makespan(r) - makespan(r + 1) > price for r in tried):
            return 0
        if self.system.lookahead != "adaptive":
            return self.system.max_distance
        here = round(active * sum(slots) / (self.num_layers * self.num_experts))
        layer = makespan(here) + rest
        return next((d for d in range(1, MAX_DEPTH) if d * layer >= transfer), MAX_DEPTH)
