"""Who is resident: the slots of all layers, who makes room for whom, and which experts nothing may push out.

A step is event-atomic: what it needs is never evicted in it. A prefetch that has landed is held to more: it may not
push out what the coming step is predicted to need, what another prefetch brought for it, nor (the guard) an expert
hotter than itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from functools import partial

from hybrimoe_jax.decide.cache import CachePolicy
from hybrimoe_jax.decide.plan import REFUSED, Fetch, Refused, Victim
from hybrimoe_jax.decide.prefetch.impact import Target
from hybrimoe_jax.decide.prefetch.prediction import Prediction
from hybrimoe_jax.decide.residency import pool
from hybrimoe_jax.decide.residency.inflight import InflightTransfers

_FREE = float("-inf")
_NONE: frozenset[int] = frozenset()


class Residency:
    """Slots, policies and contents of every layer.

    Args:
      slots: slots of each layer. policies: their cache policies.
      inflight: the transfers under way, and what they brought for steps to come.
      guard: "value", "expected" or "none", see `systems.System`.
      cold: start empty.
      pooled: all layers share the sum of the slots, see `pool`.
      bypass: leave it to the policies whether a fetched miss is kept (`CachePolicy.admits`); else every one is.
    """

    def __init__(
        self,
        slots: Sequence[int],
        policies: Sequence[CachePolicy],
        inflight: InflightTransfers,
        guard: str,
        cold: bool = False,
        pooled: bool = False,
        bypass: bool = False,
    ):
        self.slots, self.policies, self.inflight = slots, policies, inflight
        self.guard, self.bypass = guard, bypass
        if cold:
            initial: list[list[int]] = [[] for _ in policies]
        elif pooled:
            initial = pool.initial(policies, sum(slots))
        else:
            initial = [policy.initial()[:room] for policy, room in zip(policies, slots)]
        for policy, experts in zip(policies, initial):
            policy.loaded(experts)
        self.resident: list[set[int]] = [set(experts) for experts in initial]
        self.needed: list[Set[int]] = [_NONE for _ in slots]  # activated in the current step
        # (distance, prediction), newest last
        self.predictions: list[list[tuple[int, Prediction]]] = [[] for _ in slots]
        self.pool = pool.Pool(sum(slots), policies, self.resident, inflight, bypass) if pooled else None

    def replace(self, resident: Sequence[set[int]]) -> None:
        """Other residents, of which the policies know already.

        ValueError where the slots do not hold them; the old ones stay then.
        """
        if len(resident) != len(self.slots):
            raise ValueError(f"residents of {len(resident)} layers for {len(self.slots)}")
        if self.pool is None:
            fits = all(len(some) <= room for some, room in zip(resident, self.slots))
        else:
            fits = sum(map(len, resident)) <= self.pool.total
        if not fits:
            raise ValueError("more residents than slots")
        for mine, some in zip(self.resident, resident):
            mine.clear()
            mine.update(some)
        if self.pool is not None:
            self.pool.recount()

    def admit(self, layer: int, expert: int) -> Fetch:
        """Finds a slot for an expert that this step brings in."""
        if self.pool is not None:
            return self.pool.admit(layer, expert, self.needed[layer])
        resident = self.resident[layer]
        victim = None
        if len(resident) >= self.slots[layer]:
            policy = self.policies[layer]
            victim = policy.victim(resident, self.needed[layer]) if resident else None
            if victim is None or (self.bypass and not policy.admits(expert, victim)):
                return Fetch(expert, None, True)
        self._move(layer, expert, victim)
        return Fetch(expert, victim, False)

    def land(self, layer: int, expert: int, seconds: float | None) -> Victim | Refused | None:
        """See `Planner.landed`."""
        inflight = self.inflight
        transfer = inflight.take(layer, expert)
        if seconds is not None:
            transfer.seconds = seconds
        kept, victim = self.admit_landed(layer, expert, transfer.open)
        if not kept:
            inflight.refuse(transfer)
            return REFUSED
        inflight.keep(layer, expert, transfer)
        return victim

    def admit_landed(self, layer: int, expert: int, coming: bool) -> tuple[bool, Victim | None]:
        """Finds a slot for a prefetch that has landed: (whether it got one, its victim).

        `coming`: its step is yet to come.
        """
        if self.pool is not None:
            floor = self._worth(layer, self._newest(layer) if coming else None)(expert)
            return self.pool.admit_landed(
                layer,
                expert,
                [self._protected(i, self._newest(i)) for i in range(len(self.slots))],
                lambda i, e: self.guard == "none" or self._worth_there(i, e) <= floor,
            )
        victim = None
        if len(self.resident[layer]) >= self.slots[layer]:
            victim = self._make_way(layer, expert, coming)
            if victim is None:
                return False, None
        self._move(layer, expert, victim)
        return True, victim

    def _move(self, layer: int, entered: int, left: int | None) -> None:
        resident = self.resident[layer]
        if left is not None:
            resident.remove(left)
        resident.add(entered)
        self.policies[layer].moved(entered, left)

    def finish_step(self) -> None:
        for layer, predictions in enumerate(self.predictions):
            self.needed[layer] = _NONE
            predictions.clear()

    def target(self, layer: int, distance: int, prediction: Prediction) -> Target:
        """A coming layer as the prefetcher sees it."""
        resident, in_flight = self.resident[layer], self.inflight.in_flight[layer]
        present = resident | in_flight.keys() if in_flight else resident
        openings, worth = partial(self._openings, layer, prediction), partial(self._value, layer, prediction)
        return Target(layer, distance, prediction, present, openings, worth)

    def _openings(self, layer: int, prediction: Prediction) -> list[float]:
        """The value of what each further prefetch would evict, smallest first; minus infinity for a free slot."""
        if self.pool is not None:
            protected = [self._protected(i, self._newest(i)) for i in range(len(self.slots))]
            return self.pool.openings(protected, None if self.guard == "none" else self._worth_there)
        resident = self.resident[layer]
        values: list[float] = [_FREE] * (self.slots[layer] - len(resident))
        protected = self._protected(layer, prediction)
        if resident and self.policies[layer].victim(resident, protected) is not None:
            evictable = [e for e in resident if e not in protected]
            if self.guard == "none":
                values += [_FREE] * len(evictable)
            else:
                worth = self._worth(layer, prediction)
                values += sorted([worth(e) for e in evictable])
        return values[len(self.inflight.in_flight[layer]) :]

    def _worth_there(self, layer: int, expert: int) -> float:
        return self._worth(layer, self._newest(layer))(expert)

    def _value(self, layer: int, prediction: Prediction, expert: int) -> float:
        return self._worth(layer, prediction)(expert)

    def _make_way(self, layer: int, expert: int, coming: bool) -> int | None:
        """The policy's victim for a landed prefetch, passing over those hotter than it.

        None where there is no other.
        """
        policy, resident = self.policies[layer], self.resident[layer]
        prediction = self._newest(layer)
        protected = self._protected(layer, prediction)
        worth = self._worth(layer, prediction if coming else None)
        victim = policy.victim(resident, protected) if resident else None
        if self.guard != "none":
            floor = worth(expert)
            while victim is not None and worth(victim) > floor:
                protected.add(victim)
                victim = policy.victim(resident, protected)
        return victim

    def _newest(self, layer: int) -> Prediction | None:
        """What the layer was last predicted to be asked for in this step."""
        predictions = self.predictions[layer]
        return predictions[-1][1] if predictions else None

    def _protected(self, layer: int, prediction: Prediction | None) -> set[int]:
        """Experts that no prefetch may evict: needed now, predicted, or brought in for the coming step."""
        protected = {*self.needed[layer], *self.inflight.ready[layer]}
        if prediction is not None:
            protected.update(prediction.loads)
        return protected

    def _worth(self, layer: int, prediction: Prediction | None) -> Callable[[int], float]:
        """The function that the guard compares experts by."""
        policy = self.policies[layer]
        if self.guard != "expected" or prediction is None:
            return policy.value
        loads, scores = prediction
        return lambda e: policy.expected(e, scores[e] if scores is not None else 0.0, loads.get(e, 0))
