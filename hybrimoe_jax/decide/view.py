"""What a scheduler that looks ahead is shown beyond its layer: the next layer as predicted, and what filling a slot is worth.

When the expert is asked for again while it stays, the layer is shorter by what one more resident expert saves. Only the first time counts:
had it not been there, that step could have fetched it in its turn. So

  fill = saving x (chance that it is asked for during a stay - the same of its victim), chance = 1 - (1 - rate) ^ steps of a stay

with rates counted over the last steps (exponentially decayed, per layer) and the stay taken from the measured turnover of the slots.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from hybrimoe_jax.decide.prefetch.impact import Accuracy, Forecast
from hybrimoe_jax.decide.residency.residency import Residency
from hybrimoe_jax.decide.schedule import Coming, Problem

_LARGE = 1e100


class Fills:
    """Rates of use and turnover of every layer.

    Args:
      slots: slots of each layer.
      decay: what a step counts for one step later; 1 / (1 - decay) steps are also the longest stay that is believed in.
    """

    def __init__(self, slots: Iterable[int], decay: float = 0.98):
        self.slots, self.decay = list(slots), decay
        layers = range(len(self.slots))
        self._uses: list[dict[int, float]] = [{} for _ in layers]
        self._steps = [0.0 for _ in layers]
        self._admitted = [0.0 for _ in layers]
        self._unit = [1.0 for _ in layers]  # what a step of now counts; growing it decays all others

    def observe(self, layer: int, loads: Mapping[int, int], tokens: int, admitted: int) -> None:
        """Counts a step: tokens of each activated expert, and how many experts entered the slots."""
        unit, uses = self._unit[layer], self._uses[layer]
        for expert, load in loads.items():
            uses[expert] = uses.get(expert, 0.0) + unit * load / tokens
        self._steps[layer] += unit
        self._admitted[layer] += unit * admitted
        self._unit[layer] = unit / self.decay
        if unit > _LARGE:
            self._uses[layer] = {expert: count / unit for expert, count in uses.items()}
            self._steps[layer] /= unit
            self._admitted[layer] /= unit
            self._unit[layer] /= unit

    def rate(self, layer: int, expert: int) -> float:
        """The share of recent tokens that asked for the expert."""
        steps = self._steps[layer]
        return self._uses[layer].get(expert, 0.0) / steps if steps else 0.0

    def stay(self, layer: int) -> float:
        """Steps that an expert can be expected to stay."""
        longest = 1.0 / (1.0 - self.decay)
        admitted = self._admitted[layer]
        return min(longest, self.slots[layer] * self._steps[layer] / admitted) if admitted else longest

    def chance(self, layer: int, expert: int) -> float:
        """The probability that the expert is asked for during a stay, steps being independent."""
        return 1.0 - (1.0 - min(1.0, self.rate(layer, expert))) ** self.stay(layer)

    def fills(
        self, layer: int, misses: Iterable[int], victim: tuple[int, int] | None, saving: float
    ) -> dict[int, float]:
        """Seconds by expert. `victim`, (layer, expert), would make room (None: a slot is free); `saving` is what a hit is worth, in seconds."""
        floor = self.chance(*victim) if victim is not None else 0.0
        return {expert: saving * (self.chance(layer, expert) - floor) for expert in misses}


class View:
    """Shows problems what lies beyond them. The arguments are the planner's; at most `max_in_flight` prefetches are under way at once."""

    def __init__(self, residency: Residency, forecast: Forecast, accuracy: Accuracy, top_k: int, max_in_flight: int):
        self.residency, self.forecast, self.accuracy = residency, forecast, accuracy
        self.top_k, self.max_in_flight = top_k, max_in_flight
        self.fills = Fills(residency.slots)

    def show(self, problem: Problem, layer: int, misses: Sequence[int]) -> None:
        """Sets the problem's `fill` and `coming`."""
        problem.fill = self._fill(problem, layer, misses) if misses else None
        if layer + 1 < len(self.residency.slots) and self.residency.predictions[layer + 1]:
            problem.coming = self._coming(layer + 1, problem)

    def _fill(self, problem: Problem, layer: int, misses: Sequence[int]) -> dict[int, float] | None:
        k = self.top_k
        room, victim = self.residency.next_victim(layer, set(problem.loads))
        if not room:
            return None  # it would be streamed and not kept
        hits = min(k - 1, k * (len(problem.loads) - len(misses)) // len(problem.loads))
        slower = self.forecast.outlook([1] * hits, [1] * (k - hits), 1).makespan
        faster = self.forecast.outlook([1] * (hits + 1), [1] * (k - hits - 1), 1).makespan
        return self.fills.fills(layer, misses, victim, max(0.0, slower - faster))

    def _coming(self, layer: int, problem: Problem) -> Coming:
        distance, prediction = self.residency.predictions[layer][-1]
        loads, room = prediction.loads, self.max_in_flight - self.residency.inflight.num_in_flight
        present = self.residency.resident[layer] | self.residency.inflight.in_flight[layer].keys()
        here = [load for expert, load in loads.items() if expert in present]
        absent = [load for expert, load in loads.items() if expert not in present]
        gap, chance = problem.costs.layer(problem.tokens), self.accuracy.probability(distance)
        return Coming(here, absent, problem.tokens, gap, max(0, room), chance)
