"""What could be had with knowledge of the future: Belady's rule on whole steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Self

from hybrimoe_jax.decide.cache.policy import CachePolicy
from hybrimoe_jax.errors import UserError


class Belady(CachePolicy):
    """Evicts the expert whose next use is farthest away (Belady 1966), never one that the current step needs.

    It has the fewest misses of all policies that keep every miss (exact, tested against exhaustive search).

    **With bypass it is a heuristic**: at or above the fewest misses. A miss is kept where it is needed no later than
    the victim, and a hit holds its slot until its step is over, so what is best to keep depends on more than the next
    use. The needs {0}, {1, 2}, {0}, {1, 2}, {0, 2} with two slots cost it five misses where four are possible. (The
    fewest are those of a flow of as many units as there are slots.)

    Args:
      future: the experts that the layer needs in each step, in the order in which `observe` will tell of them.
      moment: when in a step the layer runs, 0..1; orders layers that share slots.
    """

    sees = "routing"

    def __init__(
        self,
        num_experts: int,
        capacity: int,
        top_k: int,
        *,
        future: Sequence[Collection[int]],
        moment: float = 0.0,
        **common: Any,
    ):
        super().__init__(num_experts, capacity, top_k, **common)
        self._uses: list[deque[int]] = [deque() for _ in range(num_experts)]
        self._moment = moment
        for step, experts in enumerate(future, 1):
            for expert in experts:
                self._uses[expert].append(step)
        self.heat = [self._next(expert) for expert in range(num_experts)]

    @classmethod
    def for_layers(
        cls,
        num_experts: int,
        capacities: Sequence[int],
        top_k: int,
        *,
        future: Sequence[Sequence[Collection[int]]],
        frequencies: Sequence[Sequence[float]] | None = None,
        **parameters: Any,
    ) -> Sequence[Self]:
        """`future`: [layer][step] experts."""
        return [
            cls(
                num_experts,
                slots,
                top_k,
                future=future[layer],
                moment=layer / len(capacities),
                frequencies=None if frequencies is None else frequencies[layer],
                **parameters,
            )
            for layer, slots in enumerate(capacities)
        ]

    def update(self, scores: Sequence[float] | None, loads: Mapping[int, int]) -> None:
        for expert in loads:
            uses = self._uses[expert]
            if not uses or uses[0] != self.step:
                raise UserError(f"cache belady: step {self.step} needs expert {expert}, which its future does not say")
            uses.popleft()
            self.heat[expert] = self._next(expert)

    def expected(self, expert: int, score: float, load: int) -> float:
        return self.heat[expert]

    def _next(self, expert: int) -> float:
        uses = self._uses[expert]
        return -(uses[0] + self._moment) if uses else float("-inf")
