"""Slots that all layers share: the least valuable of the layers' own victims makes room, the earliest among equals.

A layer's victim is remembered until the layer runs again or its residents change, so finding room asks few policies.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from hybrimoe_jax.decide.cache.policy import CachePolicy
from hybrimoe_jax.errors import UserError


class VictimCandidate(NamedTuple):
    """A layer's victim and its value there; candidates sort by value, then layer."""

    value: float
    layer: int
    expert: int


class VictimCandidates:
    """Every layer's own victim.

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
