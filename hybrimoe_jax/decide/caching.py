"""Which resident expert makes room: one cache policy object per layer, seeing every step before it is scheduled.

A policy keeps a *heat* per expert (larger is hotter) and, for ties, the step in which each was last used. The victim is the coldest
resident that the current step does not need; nothing needed in a step is ever evicted in it (event-atomic: sequential replay misstates
LRU by 27-29 %, arXiv 2608.07911). Policies know nothing of slots or transfers, so the live engine and a replay use the same objects.

MRS ("minus recent score") is HybriMoE's (arXiv 2504.05897, section 4.4): S <- alpha TopP(s) + (1 - alpha) S, where s are the router's scores
of all experts in this iteration and TopP keeps the p highest; the lowest S is evicted. An expert that almost made the top k stays warm,
which recency and frequency, seeing only what was chosen, cannot do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence

from hybrimoe_jax.errors import UserError


class CachePolicy(ABC):
    """One layer's policy.

    Args:
      num_experts: routed experts of the layer.
      capacity: slots of the layer, 0..num_experts.
      top_k: experts per token.
      frequencies: activation counts per expert from other sequences, where there are any; the warm start.
    """

    def __init__(self, num_experts: int, capacity: int, top_k: int, *, frequencies: Sequence[float] | None = None):
        if not 0 <= capacity <= num_experts:
            raise UserError(f"cache: {capacity} slots do not fit a layer of {num_experts} experts (0 to {num_experts})")
        if not 1 <= top_k <= num_experts:
            raise UserError(f"cache: top-k {top_k} is impossible with {num_experts} experts")
        if frequencies is not None and len(frequencies) != num_experts:
            raise UserError(f"cache: {len(frequencies)} frequencies for {num_experts} experts")
        self.num_experts, self.capacity, self.top_k = num_experts, capacity, top_k
        self.frequencies = None if frequencies is None else [float(f) for f in frequencies]
        self.heat: list[float] = [0.0] * num_experts
        self.last_used: list[int] = [0] * num_experts
        self.step = 0

    @abstractmethod
    def update(self, scores: Sequence[float] | None, loads: Mapping[int, int]) -> None:
        """Brings `heat` up to date with one step; called by `observe`."""

    @abstractmethod
    def expected(self, expert: int, score: float, load: int) -> float:
        """The heat `expert` will have if its next step comes as predicted: mean router score `score`, `load` tokens (0: not chosen)."""

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

    def value(self, expert: int) -> float:
        """How much `expert` is worth keeping; larger is hotter. Comparable within one policy only."""
        return self.heat[expert]

    def moved(self, entered: int, left: int | None) -> None:  # noqa: B027 - most policies have nothing to note
        """Told of every change of residency after the start, for policies that keep queues."""

    def initial(self) -> list[int]:
        """What to preload: the most frequent experts, ties and unknown frequencies by lowest id."""
        order = range(self.num_experts)
        if self.frequencies is not None:
            order = sorted(order, key=lambda expert: (-self.frequencies[expert], expert))
        return list(order[: self.capacity])


class LRU(CachePolicy):
    """Least recently used."""

    def update(self, scores, loads):
        for expert in loads:
            self.heat[expert] = self.step

    def expected(self, expert, score, load):
        return self.step + 1 if load else self.heat[expert]


class LFU(CachePolicy):
    """Least frequently used: steps that needed the expert. `decay` per step below 1 forgets old ones."""

    def __init__(self, num_experts, capacity, top_k, *, frequencies=None, decay: float = 1.0):
        super().__init__(num_experts, capacity, top_k, frequencies=frequencies)
        if not 0 < decay <= 1:
            raise UserError(f"cache lfu: decay {decay} is outside (0, 1]")
        self.decay = decay

    def update(self, scores, loads):
        if self.decay != 1:
            self.heat = [heat * self.decay for heat in self.heat]
        for expert in loads:
            self.heat[expert] += 1

    def expected(self, expert, score, load):
        return self.heat[expert] * self.decay + (1 if load else 0)


class MRS(CachePolicy):
    """Minus recent score. `alpha` weighs the newest scores, `p` is how many of them count (default 2 x top-k).

    Where a step brings no scores, the shares of its loads stand in, which makes p effectively the number of activated experts.
    """

    def __init__(self, num_experts, capacity, top_k, *, frequencies=None, alpha: float = 0.5, p: int | None = None):
        super().__init__(num_experts, capacity, top_k, frequencies=frequencies)
        p = 2 * top_k if p is None else p
        if not 0 < alpha <= 1:
            raise UserError(f"cache mrs: alpha {alpha} is outside (0, 1]")
        if p < 1:
            raise UserError(f"cache mrs: p {p} must be at least 1")
        self.alpha, self.p = alpha, min(p, num_experts)

    def update(self, scores, loads):
        alpha, keep = self.alpha, 1 - self.alpha
        self.heat = heat = [keep * s for s in self.heat]
        if scores is None:
            total = sum(loads.values()) or 1
            for expert, load in loads.items():
                heat[expert] += alpha * load / total
        else:
            for expert in sorted(range(self.num_experts), key=scores.__getitem__, reverse=True)[: self.p]:
                heat[expert] += alpha * scores[expert]

    def expected(self, expert, score, load):
        return self.alpha * score + (1 - self.alpha) * self.heat[expert]


class Static(CachePolicy):
    """A fixed placement: the most frequent experts stay for good, and nothing is ever evicted."""

    def __init__(self, num_experts, capacity, top_k, *, frequencies=None):
        super().__init__(num_experts, capacity, top_k, frequencies=frequencies)
        if self.frequencies is not None:
            self.heat = list(self.frequencies)

    def update(self, scores, loads):
        pass

    def victim(self, resident, protected):
        return None

    def expected(self, expert, score, load):
        return self.heat[expert]


POLICIES: dict[str, type[CachePolicy]] = {"mrs": MRS, "lru": LRU, "lfu": LFU, "static": Static}


def policy_class(name: str) -> type[CachePolicy]:
    """The policy called `name`; UserError listing the names."""
    if name not in POLICIES:
        raise UserError(f"cache policy {name!r} is unknown (known: {', '.join(POLICIES)})")
    return POLICIES[name]
