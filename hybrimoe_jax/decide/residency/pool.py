"""Slots that all layers share (FreeToken): any expert of any layer may take any slot, since all have one size.

A step is event-atomic per layer: what the running layer needs is never evicted, nor what a prefetch brought for a layer
to come. What coming layers need without saying so is not known, and may go.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

from hybrimoe_jax.decide.cache import CachePolicy
from hybrimoe_jax.decide.plan import Fetch, Victim
from hybrimoe_jax.decide.residency.inflight import InflightTransfers
from hybrimoe_jax.errors import UserError

_FREE = float("-inf")


def capacity_of(total: int, num_layers: int, num_experts: int) -> int:
    """What each layer's policy takes for its capacity: its share of `total` slots, rounded up."""
    return min(num_experts, -(-total // num_layers)) if num_layers else 0


def initial(policies: Sequence[CachePolicy], total: int) -> list[list[int]]:
    """What fills `total` slots: the most frequent experts of all layers together.

    Where frequencies are unknown, each layer's own first ones.
    """
    first: list[list[int]] = [[] for _ in policies]
    known = [policy.frequencies for policy in policies if policy.frequencies is not None]
    if len(known) == len(policies):
        ranked = [(-count, i, e) for i, frequencies in enumerate(known) for e, count in enumerate(frequencies)]
        for _, layer, expert in sorted(ranked)[:total]:
            first[layer].append(expert)
        return first
    ranked = [(rank, i, e) for i, policy in enumerate(policies) for rank, e in enumerate(policy.initial())]
    for _, layer, expert in sorted(ranked)[:total]:
        first[layer].append(expert)
    return first


class VictimCandidate(NamedTuple):
    """A layer's victim and its value there; candidates sort by value, then layer."""

    value: float
    layer: int
    expert: int


class VictimCandidates:
    """Every layer's own victim; the least valuable makes room, the earliest layer's among equals.

    A victim is remembered until the layer runs again or its residents change, so finding room asks few policies.

    Args:
      policies: of all layers; UserError where their values do not compare.
      resident: the experts of each layer in slots, kept by the caller.
    """

    def __init__(self, policies: Sequence[CachePolicy], resident: Sequence[set[int]]):
        for policy in policies:
            if not policy.comparable:
                raise UserError(
                    f"cache: the values of {type(policy).__name__} mean nothing in other layers; it cannot share slots"
                )
        self.policies, self.resident = policies, resident
        self._known: list[tuple[int, VictimCandidate | None] | None] = [None] * len(policies)  # (step, candidate)

    def changed(self, layer: int) -> None:
        """The layer's residents are others now."""
        self._known[layer] = None

    def of(self, layer: int, protected: Collection[int] = ()) -> VictimCandidate | None:
        """The layer's victim, none of the protected; None where it has none."""
        policy, known = self.policies[layer], self._known[layer]
        if not protected and known is not None and known[0] == policy.step:
            return known[1]
        resident = self.resident[layer]
        victim = policy.victim(resident, protected) if resident else None
        candidate = None if victim is None else VictimCandidate(policy.value(victim), layer, victim)
        if not protected:
            self._known[layer] = policy.step, candidate
        return candidate

    def all(self, protected: Sequence[Collection[int]]) -> Iterator[VictimCandidate]:
        """Every layer's victim, if it has one; `protected`: by layer."""
        for layer, some in enumerate(protected):
            candidate = self.of(layer, some)
            if candidate is not None:
                yield candidate


class Pool:
    """The shared slots.

    Args:
      total: how many. policies: of all layers; UserError where their values do not compare.
      resident: the experts of each layer in slots; kept up to date here.
      inflight: what prefetches brought for steps to come.
      bypass: leave it to the values whether a fetched miss is kept; else every one is.
    """

    def __init__(
        self,
        total: int,
        policies: Sequence[CachePolicy],
        resident: Sequence[set[int]],
        inflight: InflightTransfers,
        bypass: bool = False,
    ):
        self.total, self.policies, self.resident, self.inflight, self.bypass = (
            total,
            policies,
            resident,
            inflight,
            bypass,
        )
        self.used = sum(map(len, resident))
        self._candidates = VictimCandidates(policies, resident)

    def recount(self) -> None:
        """The residents of all layers are others now."""
        self.used = sum(map(len, self.resident))
        for layer in range(len(self.resident)):
            self._candidates.changed(layer)

    def admit(self, layer: int, expert: int, needed: Collection[int]) -> Fetch:
        """Finds a slot for an expert that the running layer brings in."""
        victim = None
        if self.used >= self.total:
            protected: list[Collection[int]] = list(self.inflight.ready)
            protected[layer] = needed
            victim = min(self._candidates.all(protected), default=None)
            if victim is None or (self.bypass and self.policies[layer].value(expert) < victim.value):
                return Fetch(expert, None, True)
        return Fetch(expert, self.move(layer, expert, victim), False)

    def openings(self, protected: Sequence[Collection[int]], worth: Callable[[int, int], float] | None) -> list[float]:
        """The value of what each further prefetch would evict, smallest first, a victim of each layer at most.

        Minus infinity for a free slot, and for all where `worth` is None. `worth`: of (layer, expert).
        """
        values: list[float] = [_FREE] * (self.total - self.used)
        candidates = self._candidates.all(protected)
        values += (
            [_FREE for _ in candidates] if worth is None else sorted([worth(c.layer, c.expert) for c in candidates])
        )
        return values[self.inflight.num_in_flight :]

    def admit_landed(
        self, layer: int, expert: int, protected: Sequence[Collection[int]], may_go: Callable[[int, int], bool]
    ) -> tuple[bool, Victim | None]:
        """Finds a slot for a prefetch that has landed: (whether it got one, its victim).

        The victim is the least valuable of those that `may_go`, (layer, expert).
        """
        victim = None
        if self.used >= self.total:
            candidates = sorted(self._candidates.all(protected))
            victim = next((c for c in candidates if may_go(c.layer, c.expert)), None)
            if victim is None:
                return False, None
        return True, self.move(layer, expert, victim)

    def move(self, layer: int, entered: int, victim: VictimCandidate | None) -> Victim | None:
        """Puts an expert into the victim's slot, or into a free one; returns who left, as plans name it."""
        left = None  # of this layer
        if victim is None:
            self.used += 1
        else:
            left = victim.expert if victim.layer == layer else None
            self.resident[victim.layer].remove(victim.expert)
            self._candidates.changed(victim.layer)
        self.resident[layer].add(entered)
        self._candidates.changed(layer)
        self.policies[layer].moved(entered, left)
        if victim is not None and left is None:
            self.policies[victim.layer].moved(None, victim.expert)
        return None if victim is None else (victim.layer, victim.expert)
