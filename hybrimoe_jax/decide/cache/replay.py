"""Replays recorded routing through cache policies, one token a step, event-atomic: what a step needs is never evicted in it.

Every miss is fetched; whether it is kept is left to the policy (`admits`) in a cache with `bypass`, and always so in others. Caches start
cold, but for a fixed placement.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from hybrimoe_jax.decide.cache.policy import CachePolicy
from hybrimoe_jax.decide.cache.victims import VictimCandidates


class Visit(NamedTuple):
    """One layer of one step: the experts it needs (distinct), and the router's score of every expert where known."""

    layer: int
    experts: Sequence[int]
    scores: Sequence[float] | None = None


class Outcome(NamedTuple):
    """Activated experts found resident and not, and how many of the latter were not kept."""

    hits: int
    misses: int
    bypassed: int


def slots_for(ratio: float, num_experts: int, top_k: int) -> int:
    """Slots of a layer in comparisons: max(top_k, round(ratio * num_experts)), so that a step's own experts always fit."""
    return max(top_k, round(ratio * num_experts))


def replay(
    policies: Sequence[CachePolicy], visits: Iterable[Visit], caches: Sequence[PerLayer | Pooled]
) -> list[Outcome]:
    """Runs `visits`, in order, through the policies of all layers, and every cache by what they say.

    Several caches over the same policies need policies that do not see residents (`CachePolicy.sees`): each decides as if alone.
    """
    if len(caches) > 1 and any(policy.sees == "residents" for policy in policies):
        raise ValueError("a policy that sees residents serves one cache")
    hits, misses, bypassed = ([0] * len(caches) for _ in range(3))
    for layer, experts, scores in visits:
        loads = dict.fromkeys(experts, 1)
        policies[layer].observe(scores, loads)
        for i, cache in enumerate(caches):
            resident, order = cache.resident[layer], experts
            if (
                cache.bypass
            ):  # the hottest misses are offered a slot first: one that is never used again must not take the last
                order = sorted(experts, key=policies[layer].value, reverse=True)
            for expert in order:
                if expert in resident:
                    hits[i] += 1
                else:
                    misses[i] += 1
                    bypassed[i] += not cache.admit(layer, expert, loads)
    return [Outcome(*counts) for counts in zip(hits, misses, bypassed)]


class PerLayer:
    """Each layer has `slots` of its own. `resident`: the experts of each layer in its slots."""

    def __init__(self, policies: Sequence[CachePolicy], slots: int, *, bypass: bool = False):
        self.policies, self.slots, self.bypass = policies, slots, bypass
        self.resident: list[set[int]] = [set(p.initial()[:slots]) if p.fixed else set() for p in policies]

    def admit(self, layer: int, expert: int, needed: Collection[int]) -> bool:
        """Finds a slot for a missed expert; False where it is not kept."""
        policy, resident, victim = self.policies[layer], self.resident[layer], None
        if len(resident) >= self.slots:
            victim = policy.victim(resident, needed)
            if victim is None or (self.bypass and not policy.admits(expert, victim)):
                return False
            resident.remove(victim)
        resident.add(expert)
        policy.moved(expert, victim)
        return True


class Pooled:
    """All layers share `slots`, see `offers`.

    The current step's needs in layers yet to come are unknown, so only the layer that runs is protected.
    """

    def __init__(self, policies: Sequence[CachePolicy], slots: int, *, bypass: bool = False):
        self.policies, self.slots, self.bypass, self.used = policies, slots, bypass, 0
        self.resident: list[set[int]] = [set() for _ in policies]
        self._candidates = VictimCandidates(policies, self.resident)
        if all(policy.fixed for policy in policies):
            self._fill()

    def admit(self, layer: int, expert: int, needed: Collection[int]) -> bool:
        """Finds a slot for a missed expert; False where it is not kept."""
        if self.used >= self.slots:
            offers = self._candidates.all([needed if i == layer else () for i in range(len(self.policies))])
            victim = min(offers, default=None)
            if victim is None or (self.bypass and self.policies[layer].value(expert) < victim.value):
                return False
            self.resident[victim.layer].remove(victim.expert)
            self._candidates.changed(victim.layer)
            own = victim.layer == layer
            if not own:
                self.policies[victim.layer].moved(None, victim.expert)
            self.policies[layer].moved(expert, victim.expert if own else None)
        else:
            self.used += 1
            self.policies[layer].moved(expert, None)
        self.resident[layer].add(expert)
        self._candidates.changed(layer)
        return True

    def _fill(self) -> None:
        """A fixed placement: the most frequent experts of all layers."""
        every = [(-policy.value(e), i, e) for i, policy in enumerate(self.policies) for e in range(policy.num_experts)]
        for _, layer, expert in sorted(every)[: self.slots]:
            self.resident[layer].add(expert)
            self.used += 1
