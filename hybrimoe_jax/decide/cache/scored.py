"""Policies that give every expert a number and evict the lowest: recency, frequency, both, and the router's scores.

MRS ("minus recent score") is HybriMoE's (arXiv 2504.05897, section 4.4): S <- alpha TopP(s) + (1 - alpha) S, where s
are the router's scores of all experts in this iteration and TopP keeps the p highest; the lowest S is evicted. An
expert that almost made the top k stays warm, which recency and frequency, seeing only what was chosen, cannot do.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from hybrimoe_jax.decide.cache.policy import CachePolicy
from hybrimoe_jax.errors import UserError


class LRU(CachePolicy):
    """Least recently used."""

    sees = "routing"

    def update(self, scores: Sequence[float] | None, loads: Mapping[int, int]) -> None:
        for expert in loads:
            self.heat[expert] = self.step

    def expected(self, expert: int, score: float, load: int) -> float:
        return self.step + 1 if load else self.heat[expert]


class LFU(CachePolicy):
    """Least frequently used: steps that needed the expert. `decay` per step below 1 forgets old ones."""

    sees = "routing"

    def __init__(self, num_experts: int, capacity: int, top_k: int, *, decay: float = 1.0, **common: Any):
        super().__init__(num_experts, capacity, top_k, **common)
        if not 0 < decay <= 1:
            raise UserError(f"cache lfu: decay {decay} is outside (0, 1]")
        self.decay = decay

    def update(self, scores: Sequence[float] | None, loads: Mapping[int, int]) -> None:
        if self.decay != 1:
            self.heat = [heat * self.decay for heat in self.heat]
        for expert in loads:
            self.heat[expert] += 1

    def expected(self, expert: int, score: float, load: int) -> float:
        return self.heat[expert] * self.decay + (1 if load else 0)


class LFRU(CachePolicy):
    """Least frequently and recently used: uses so far over steps since the last one.

    Expert caches of vLLM and others have it.
    """

    sees = "routing"

    def __init__(self, num_experts: int, capacity: int, top_k: int, **common: Any):
        super().__init__(num_experts, capacity, top_k, **common)
        self.uses = [0] * num_experts

    def update(self, scores: Sequence[float] | None, loads: Mapping[int, int]) -> None:
        for expert in loads:
            self.uses[expert] += 1
        now = self.step + 1
        self.heat = [uses / (now - last) for uses, last in zip(self.uses, self.last_used)]

    def expected(self, expert: int, score: float, load: int) -> float:
        return self.uses[expert] + 1.0 if load else self.uses[expert] / (self.step + 2 - self.last_used[expert])


class MRS(CachePolicy):
    """Minus recent score. `alpha` weighs the newest scores, `p` is how many of them count (default 2 x top-k).

    Where a step brings no scores, the shares of its loads stand in, which makes p effectively the number of activated
    experts.
    """

    sees = "routing"

    def __init__(
        self, num_experts: int, capacity: int, top_k: int, *, alpha: float = 0.5, p: int | None = None, **common: Any
    ):
        super().__init__(num_experts, capacity, top_k, **common)
        p = 2 * top_k if p is None else p
        if not 0 < alpha <= 1:
            raise UserError(f"cache mrs: alpha {alpha} is outside (0, 1]")
        if p < 1:
            raise UserError(f"cache mrs: p {p} must be at least 1")
        self.alpha, self.p = alpha, min(p, num_experts)

    def update(self, scores: Sequence[float] | None, loads: Mapping[int, int]) -> None:
        alpha, keep = self.alpha, 1 - self.alpha
        if scores is None:
            self.heat = heat = [keep * s for s in self.heat]
            total = sum(loads.values())
            for expert, load in loads.items():
                heat[expert] += alpha * load / total
            return
        ranked = sorted(scores)
        least = ranked[-self.p]
        if least > 0 and self.p < self.num_experts and ranked[-self.p - 1] == least:  # of equal ones the lower ids
            self.heat = heat = [keep * s for s in self.heat]
            for expert in sorted(range(self.num_experts), key=scores.__getitem__, reverse=True)[: self.p]:
                heat[expert] += alpha * scores[expert]
            return
        self.heat = [keep * h + alpha * s if s >= least else keep * h for h, s in zip(self.heat, scores)]

    def expected(self, expert: int, score: float, load: int) -> float:
        return self.alpha * score + (1 - self.alpha) * self.heat[expert]


class Static(CachePolicy):
    """A fixed placement: the most frequent experts stay for good, and nothing is ever evicted."""

    sees = "routing"
    fixed = True

    def __init__(self, num_experts: int, capacity: int, top_k: int, **common: Any):
        super().__init__(num_experts, capacity, top_k, **common)
        if self.frequencies is not None:
            self.heat = list(self.frequencies)

    def update(self, scores: Sequence[float] | None, loads: Mapping[int, int]) -> None:
        pass

    def victim(self, resident: Iterable[int], protected: Collection[int]) -> int | None:
        return None

    def expected(self, expert: int, score: float, load: int) -> float:
        return self.heat[expert]


class Random(CachePolicy):
    """Evicts at random: every step gives every expert a new random heat. The floor that a policy has to rise above."""

    sees = "routing"

    def __init__(self, num_experts: int, capacity: int, top_k: int, *, seed: int = 0, **common: Any):
        super().__init__(num_experts, capacity, top_k, **common)
        self._random = random.Random(seed)

    def update(self, scores: Sequence[float] | None, loads: Mapping[int, int]) -> None:
        self.heat = [self._random.random() for _ in range(self.num_experts)]

    def expected(self, expert: int, score: float, load: int) -> float:
        return self.heat[expert]
