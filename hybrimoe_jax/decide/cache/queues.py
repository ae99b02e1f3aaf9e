"""Policies that keep queues of residents instead of numbers: SLRU and S3-FIFO.

Their order is not one of single values, so each finds its victim in the queues. `value` is what the guard of prefetches
compares.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from hybrimoe_jax.decide.cache.policy import CachePolicy
from hybrimoe_jax.errors import UserError


class SLRU(CachePolicy):
    """Segmented LRU (Karedla, Love and Wherry 1994).

    A second use moves an expert into the protected segment, `share` of the slots.

    The probationary segment is evicted first, each segment by least recent use; overflow of the protected one falls
    back to probation.
    """

    comparable = False

    def __init__(self, num_experts: int, capacity: int, top_k: int, *, share: float = 0.8, **common: Any):
        super().__init__(num_experts, capacity, top_k, **common)
        if not 0 <= share <= 1:
            raise UserError(f"cache slru: share {share} is outside 0..1")
        self.limit = int(share * capacity)
        self._inside: set[int] = set()
        self._safe: OrderedDict[int, None] = OrderedDict()  # the protected segment, least recent first

    def update(self, scores: Sequence[float] | None, loads: Mapping[int, int]) -> None:
        for expert in loads:
            if expert in self._inside:
                self._safe[expert] = None
                self._safe.move_to_end(expert)
        while len(self._safe) > self.limit:
            self._safe.popitem(last=False)

    def victim(self, resident: Iterable[int], protected: Collection[int]) -> int | None:
        free = [expert for expert in resident if expert not in protected]
        return min(free, key=lambda expert: (self.value(expert), expert), default=None)

    def value(self, expert: int) -> float:
        return self.last_used[expert] + (self.step + 1 if expert in self._safe else 0)

    def expected(self, expert: int, score: float, load: int) -> float:
        return 2 * self.step + 2 if load else self.value(expert)

    def moved(self, entered: int | None, left: int | None) -> None:
        if entered is not None:
            self._inside.add(entered)
        if left is not None:
            self._inside.discard(left)
            self._safe.pop(left, None)

    def loaded(self, experts: Sequence[int]) -> None:
        self._inside = set(experts)


class S3FIFO(CachePolicy):
    """S3-FIFO (Yang et al., SOSP 2023): three queues.

    A small FIFO queue of newcomers, a main one, and a ghost queue of those evicted from the small one: as many as the
    main one has slots, one at least.

    A newcomer not used again leaves from the small queue (`share` of the slots) and is remembered; one used again, or
    remembered when it comes back, goes to the main queue, where uses (counted up to 3) buy further rounds.
    """

    comparable = False

    def __init__(self, num_experts: int, capacity: int, top_k: int, *, share: float = 0.1, **common: Any):
        super().__init__(num_experts, capacity, top_k, **common)
        if not 0 < share <= 1:
            raise UserError(f"cache s3-fifo: share {share} is outside (0, 1]")
        self.small_limit = max(1, int(share * capacity))
        self._small: list[int] = []  # oldest first, as the others
        self._main: list[int] = []
        self._ghost: OrderedDict[int, None] = OrderedDict()
        self._uses: dict[int, int] = {}  # of residents, since they entered

    def update(self, scores: Sequence[float] | None, loads: Mapping[int, int]) -> None:
        for expert in loads:
            if expert in self._uses:
                self._uses[expert] = min(3, self._uses[expert] + 1)

    def victim(self, resident: Iterable[int], protected: Collection[int]) -> int | None:
        """What the queues would evict next, passing over the protected; a query, so nothing moves before `moved`."""
        expert = self._walk([expert for expert in resident if expert not in protected])[0]
        return super().victim(resident, protected) if expert is None else expert

    def value(self, expert: int) -> float:
        if expert in self._uses:
            return self._uses[expert] + (expert in self._main)
        return 1 if expert in self._ghost else 0

    def expected(self, expert: int, score: float, load: int) -> float:
        return self.value(expert) + (1 if load else 0)

    def admits(self, expert: int, victim: int) -> bool:
        return True  # a newcomer's trial in the small queue is its admission

    def moved(self, entered: int | None, left: int | None) -> None:
        if left is not None:
            _, forgotten, self._small, self._main, self._uses = self._walk([left])
            if forgotten:
                self._ghost[left] = None
                if len(self._ghost) > max(1, self.capacity - self.small_limit):
                    self._ghost.popitem(last=False)
        if entered is None or entered in self._uses:  # in a state whose layers were exchanged it may be there already
            return
        known = entered in self._ghost
        self._ghost.pop(entered, None)
        (self._main if known else self._small).append(entered)
        self._uses[entered] = 0

    def loaded(self, experts: Sequence[int]) -> None:
        self._small, self._main, self._uses = [], list(experts), dict.fromkeys(experts, 0)

    def _walk(self, allowed: Collection[int]) -> tuple[int | None, bool, list[int], list[int], dict[int, int]]:
        """The first of `allowed` that the queues evict, and what it leaves behind.

        That is, whether it comes from the small queue, and both queues and the uses after that.

        Where others come first, they stay, at the end of the main queue.
        """
        small, main, uses, kept = list(self._small), list(self._main), dict(self._uses), list[int]()
        while small or main:
            from_small = bool(small) and (len(small) >= self.small_limit or not main)
            expert = (small if from_small else main).pop(0)
            if uses[expert] > 0:
                uses[expert] = 0 if from_small else uses[expert] - 1
                main.append(expert)
            elif expert in allowed:
                del uses[expert]
                return expert, from_small, small, main + kept, uses
            else:
                kept.append(expert)
        return None, False, small, kept, uses
