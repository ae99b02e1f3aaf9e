"""Prefetching: which experts of the coming layers are worth moving while the link is idle.

A predictor (`predictors`) says what layers i+1, i+2, ... will be asked for while layer i runs. *Impact* (HybriMoE,
arXiv 2504.05897, section 4.3): the makespan of the predicted layer without a candidate minus the makespan with it
resident, both by the scheduler that the engine runs. What the paper leaves open is decided so: an impact is discounted
by the measured probability that a prediction at its distance comes true; a candidate is neither resident nor in flight;
it must land before its layer starts, and before any nearer layer starts that is expected to need the link itself,
behind the demand fetches of this step; it is moved only where a resident expert may make room for it. The chosen are
sent nearest layer first.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from hybrimoe_jax.decide.costs import Costs
from hybrimoe_jax.decide.prefetch.prediction import Accuracy, Prediction
from hybrimoe_jax.decide.schedule import Problem, Scheduler
from hybrimoe_jax.errors import RuleError

# Simulating a prefill step of 64 experts takes 0.2 ms: a candidate of each of the highest few loads is tried, not each
# candidate.
TRIALS = 3
_MEMO_LIMIT = 8192


class Outlook(NamedTuple):
    """A predicted layer's makespan, and how long its demand fetches hold the link; seconds."""

    makespan: float
    link: float


class Forecast:
    """Simulates predicted layers by the engine's own scheduler.

    Times depend on the loads alone, so they are remembered by them.

    Args:
      scheduler, costs: the engine's.
    """

    def __init__(self, scheduler: Scheduler, costs: Costs):
        self.scheduler, self.costs = scheduler.forecaster(), costs
        self.transfer = costs.transfer(scheduler.uses_cpu)
        self._memo: dict[tuple[Any, ...], Outlook] = {}

    def outlook(self, resident: Sequence[int], absent: Sequence[int], tokens: int) -> Outlook:
        """The layer with these loads on resident and absent experts (any order), the link free at its start."""
        key = (tuple(sorted(resident)), tuple(sorted(absent)), tokens)
        return self._memo.get(key) or self._simulate(key, *key)

    def equal(self, resident: int, absent: int, load: int, tokens: int) -> Outlook:
        """The same for so many experts of equal load."""
        key = (resident, absent, load, tokens)
        return self._memo.get(key) or self._simulate(key, (load,) * resident, (load,) * absent, tokens)

    def _simulate(self, key: tuple[Any, ...], resident: Sequence[int], absent: Sequence[int], tokens: int) -> Outlook:
        loads = dict(enumerate((*resident, *absent)))
        try:
            schedule = self.scheduler.schedule(Problem(loads, range(len(resident)), self.costs, tokens))
        except RuleError as error:
            error.layer = "to come"
            raise
        if len(self._memo) >= _MEMO_LIMIT:
            self._memo.clear()
        known = self._memo[key] = Outlook(schedule.makespan, schedule.link_seconds)
        return known


@dataclasses.dataclass(slots=True)
class Target:
    """A coming layer as the prefetcher sees it.

    Attributes:
      layer, distance: which layer, and how many layers ahead.
      prediction: what it is expected to be asked for.
      present: its experts that are resident or in flight.
      openings: the value of what each further prefetch into this layer would evict, smallest first (minus infinity: a
        free slot); called only when a candidate is looked at.
      worth: a candidate's value, to be at least that of what it evicts.
    """

    layer: int
    distance: int
    prediction: Prediction
    present: Collection[int]
    openings: Callable[[], list[float]]
    worth: Callable[[int], float]

    def candidates(self) -> list[int]:
        """Predicted experts that are not there: highest load, then highest score, then lowest id first."""
        loads, scores = self.prediction
        absent = [expert for expert in loads if expert not in self.present]
        if len(absent) < 2:
            return absent
        if scores is None:
            absent.sort(key=lambda e: (-loads[e], e))
        else:
            absent.sort(key=lambda e: (-loads[e], -scores[e], e))
        return absent


class _State:
    """A target during the choice: the loads not yet prefetched, and what is left to evict.

    `equal`: the load of all, where it is the same.
    """

    def __init__(self, target: Target, forecast: Forecast, tokens: int, deadline: float, base: Outlook, equal: int):
        self.target, self.forecast, self.tokens, self.deadline, self.base = target, forecast, tokens, deadline, base
        self.candidates, self.equal, loads = target.candidates(), equal, target.prediction.loads
        self.num_here = len(loads) - len(self.candidates)
        self.here = [] if equal else [load for expert, load in loads.items() if expert in target.present]
        self.gain, self.best = 0.0, -1

    @functools.cached_property
    def openings(self) -> list[float]:
        """See `Target`; asked for once, and only where a candidate is looked at."""
        return self.target.openings()

    def find_best(self, probability: float) -> None:
        """Sets `best` to the expert of the greatest discounted impact, its `gain`; that is 0 where nothing gains."""
        self.gain = 0.0
        if self.equal:
            impact = (self.base.makespan - self._with_one().makespan) * probability if self.candidates else 0.0
            if impact > 0:
                first = next((e for e in self.candidates if self._may_enter(e)), None)
                if first is not None:
                    self.gain, self.best = impact, first
            return
        loads = self.target.prediction.loads
        absent = [loads[expert] for expert in self.candidates]
        tried: set[int] = set()
        for i, expert in enumerate(self.candidates):
            load = loads[expert]
            if load in tried or not self._may_enter(expert):
                continue
            tried.add(load)
            with_it = self.forecast.outlook([*self.here, load], absent[:i] + absent[i + 1 :], self.tokens)
            impact = (self.base.makespan - with_it.makespan) * probability
            if impact > self.gain:
                self.gain, self.best = impact, expert
            if len(tried) == TRIALS:
                return

    def take(self) -> int:
        """Counts the best candidate as resident from now on."""
        expert = self.best
        if self.equal:
            self.base = self._with_one()
            self.num_here += 1
            self.candidates.remove(expert)
        else:
            loads = self.target.prediction.loads
            self.here.append(loads[expert])
            self.candidates.remove(expert)
            self.base = self.forecast.outlook(self.here, [loads[e] for e in self.candidates], self.tokens)
        self.openings.pop(0)
        return expert

    def _may_enter(self, expert: int) -> bool:
        return bool(self.openings) and self.target.worth(expert) >= self.openings[0]

    def _with_one(self) -> Outlook:
        """The layer with one more of the equal candidates there."""
        return self.forecast.equal(self.num_here + 1, len(self.candidates) - 1, self.equal, self.tokens)


def choose_by_impact(
    targets: Sequence[Target],
    forecast: Forecast,
    accuracy: Accuracy,
    *,
    tokens: int,
    until_next: float,
    link_free: float,
    room: int,
) -> list[tuple[Target, int]]:
    """The prefetches to start now, at most `room`, in sending order.

    Args:
      targets: the coming layers, nearest first, without gaps.
      tokens: tokens in the step.
      until_next: seconds until the nearest target's MoE block starts.
      link_free: seconds until the link is done with the transfers already queued.
    """
    transfer, rest = forecast.transfer, forecast.costs.layer(tokens)
    states: list[_State] = []
    start, quiet_until = until_next, float("inf")  # the link is expected to be idle until then
    for target in targets:
        deadline = start if start < quiet_until else quiet_until
        fits = link_free + transfer <= deadline
        if not fits and target is targets[-1]:
            break
        equal, base = _outlook_of(target, forecast, tokens)
        if fits:
            state = _State(target, forecast, tokens, deadline, base, equal)
            state.find_best(accuracy.probability(target.distance))
            if state.gain > 0:
                states.append(state)
        if base.link > 0 and start < quiet_until:
            quiet_until = start
        start += base.makespan + rest
        if link_free + transfer > quiet_until:
            break
    if not states:
        return []

    chosen: list[tuple[_State, int]] = []
    while states and len(chosen) < room:
        state = max(states, key=lambda s: (s.gain, -s.target.distance))
        if not _in_time(chosen, state, link_free, transfer):
            states.remove(state)
            continue
        chosen.append((state, state.take()))
        state.find_best(accuracy.probability(state.target.distance))
        if state.gain <= 0:
            states.remove(state)
    chosen.sort(key=lambda pair: pair[0].target.distance)
    return [(state.target, expert) for state, expert in chosen]


def _outlook_of(target: Target, forecast: Forecast, tokens: int) -> tuple[int, Outlook]:
    """The load of all the predicted experts where it is the same (else 0), and the layer's outlook.

    Without further prefetches.
    """
    loads, present = target.prediction.loads, target.present
    distinct = set(loads.values())
    if len(distinct) == 1:
        (load,) = distinct
        here = sum([expert in present for expert in loads])
        return load, forecast.equal(here, len(loads) - here, load, tokens)
    here = [load for expert, load in loads.items() if expert in present]
    return 0, forecast.outlook(here, [load for expert, load in loads.items() if expert not in present], tokens)


def _in_time(chosen: list[tuple[_State, int]], extra: _State, link_free: float, transfer: float) -> bool:
    """Whether every chosen transfer and one more for `extra` land by their deadlines, nearest layer sent first."""
    queue = sorted([*(state for state, _ in chosen), extra], key=lambda state: state.target.distance)
    return all(link_free + (i + 1) * transfer <= state.deadline for i, state in enumerate(queue))


def choose_next_layer(target: Target, room: int) -> list[tuple[Target, int]]:
    """The next layer's predicted misses by falling score (as AdapMoE does).

    Nothing is simulated, and it does not matter how busy the link is.
    """
    scores = target.prediction.scores
    candidates = target.candidates()
    if scores is not None:
        candidates.sort(key=lambda e: (-scores[e], e))
    openings = target.openings() if candidates else []
    chosen: list[tuple[Target, int]] = []
    for expert in candidates:
        if len(chosen) < min(room, len(openings)) and target.worth(expert) >= openings[len(chosen)]:
            chosen.append((target, expert))
    return chosen
