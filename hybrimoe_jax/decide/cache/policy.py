"""The contract of a cache policy: one object per layer, seeing every step before it is scheduled.

A policy keeps a *heat* per expert (larger is hotter) and, for ties, the step in which each was last used. The victim is
the coldest resident that the current step does not need; nothing needed in a step is ever evicted in it (event-atomic:
sequential replay misstates LRU by 27-29 %, arXiv 2608.07911). Policies know nothing of slots or transfers, so the live
engine and a replay use the same objects.

A policy of one's own derives from `CachePolicy` and implements `update`; see `registry` for how it is named.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, Self

from hybrimoe_jax import arguments
from hybrimoe_jax.decide.registry import Parametric
from hybrimoe_jax.errors import UserError, shown


class CachePolicy(Parametric, ABC):
    """One layer's policy. Called with its own parameters alone, a class gives a `registry.Rule`.

    Args:
      num_experts: routed experts of the layer.
      capacity: slots of the layer, 0..num_experts.
      top_k: experts per token.
      frequencies: activation counts per expert from other sequences, where there are any; the warm start.

    Attributes:
      sees: what the values depend on beside the routing: "routing" (nothing), "capacity" or "residents". A replay lets
        caches of several sizes share one object where it can.
      fixed: nothing is ever evicted, so the slots are filled at the start, a cold one too.
      comparable: values of different layers mean the same, so that layers can share their slots (`pooled`).
    """

    sees: Literal["routing", "capacity", "residents"] = "residents"
    fixed = False
    comparable = True

    def __init__(
        self,
        num_experts: int,
        capacity: int,
        top_k: int,
        *,
        frequencies: Sequence[float] | None = None,
    ):
        if not 0 <= capacity <= num_experts:
            raise UserError(f"cache: {capacity} slots do not fit a layer of {num_experts} experts (0 to {num_experts})")
        if not 1 <= top_k <= num_experts:
            raise UserError(f"cache: top-k {top_k} is impossible with {num_experts} experts")
        if frequencies is not None and len(frequencies) != num_experts:
            raise UserError(f"cache: {len(frequencies)} frequencies for {num_experts} experts")
        self.num_experts, self.capacity, self.top_k = num_experts, capacity, top_k
        self.frequencies = None if frequencies is None else [_frequency(e, f) for e, f in enumerate(frequencies)]
        self.heat: list[float] = [0.0] * num_experts
        self.last_used: list[int] = [0] * num_experts
        self.step = 0

    @abstractmethod
    def update(self, scores: Sequence[float] | None, loads: Mapping[int, int]) -> None:
        """Brings `heat` up to date with one step; called by `observe`."""

    @classmethod
    def for_layers(
        cls,
        num_experts: int,
        capacities: Sequence[int],
        top_k: int,
        *,
        frequencies: Sequence[Sequence[float]] | None = None,
        **parameters: Any,
    ) -> Sequence[Self]:
        """The policies of all layers of one model, in order.

        A policy that learns across layers lets them share what it knows here.
        """
        return [
            cls(
                num_experts, slots, top_k, frequencies=None if frequencies is None else frequencies[layer], **parameters
            )
            for layer, slots in enumerate(capacities)
        ]

    def expected(self, expert: int, score: float, load: int) -> float:
        """The heat `expert` will have if its next step comes as predicted.

        `score`: its mean router score; `load`: its tokens (0: not chosen).

        Prefetches are guarded by it. Where a policy cannot know that heat: the value of holding the expert from that
        step on.
        """
        return self.heat[expert] + (1 if load else 0)

    def observe(self, scores: Sequence[float] | None, loads: Mapping[int, int]) -> None:
        """Tells the policy of a step, once, before the step is scheduled.

        Args:
          scores: mean router probability of every expert over the step's tokens; None where only the choice is known.
          loads: tokens of each activated expert.
        """
        self.step += 1
        for expert in loads:
            self.last_used[expert] = self.step
        self.update(scores, loads)

    def victim(self, resident: Iterable[int], protected: Collection[int]) -> int | None:
        """The expert to evict: coldest, then least recently used, then lowest id; None where all are protected."""
        heat, last_used = self.heat, self.last_used
        best, best_heat, best_used = None, 0.0, 0
        for expert in resident:
            if expert in protected:
                continue
            h, used = heat[expert], last_used[expert]
            if best is None or h < best_heat or (h == best_heat and (used, expert) < (best_used, best)):
                best, best_heat, best_used = expert, h, used
        return best

    def admits(self, expert: int, victim: int) -> bool:
        """Whether a fetched miss deserves `victim`'s place; otherwise it is used once and dropped.

        Asked where a cache may bypass.
        """
        return self.value(expert) >= self.value(victim)

    def value(self, expert: int) -> float:
        """How much `expert` is worth keeping; larger is hotter. Comparable within one policy only."""
        return self.heat[expert]

    def loaded(self, experts: Sequence[int]) -> None:
        """Told once of what the slots hold before the first step, if anything."""

    def moved(self, entered: int | None, left: int | None) -> None:
        """Told of every change of residency after that.

        `entered` is None where another layer takes over a shared slot.
        """

    def initial(self) -> list[int]:
        """What to preload: the most frequent experts, ties and unknown frequencies by lowest id."""
        order, frequencies = range(self.num_experts), self.frequencies
        if frequencies is None:
            return list(order[: self.capacity])
        return sorted(order, key=lambda expert: (-frequencies[expert], expert))[: self.capacity]


def _frequency(expert: int, value: Any) -> float:
    """A plain float costs no more than a comparison: there is one for every expert of every layer."""
    if type(value) is float and 0.0 <= value < math.inf:
        return value
    found = arguments.number(f"cache: the frequency of expert {expert},", value)
    if found < 0:
        raise UserError(f"cache: the frequency of expert {expert}, {shown(value)} must be at least 0")
    return found
