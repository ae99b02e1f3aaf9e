"""Which place of the device's bank holds whom. Only the thread that steps may call it."""

from __future__ import annotations

from collections import deque

from hybrimoe_jax.baselines.torch_experts import Bank
from hybrimoe_jax.baselines.torch_lanes import Program
from hybrimoe_jax.decide.plan import Victim

STAGING = 2
"""Places through which experts pass that find no slot: one fills while the other is read."""
IN_FLIGHT = 2
"""Prefetches under way at once, each to a spare place."""


class Slots:
    """Places of all layers, staging ones and spare ones, of one bank.

    A prefetch fills a spare place; when it becomes resident that place is a slot, and its victim's is spare.

    Attributes: `readers`: by place, the last program that reads it.
    """

    def __init__(self, bank: Bank, layers: int):
        self.bank, self._layers = bank, layers
        self.clear()

    def clear(self) -> None:
        """Forgets who is where. Nothing reads or fills a place any more."""
        self.readers: dict[int, Program] = {}
        self._where: list[dict[int, int]] = [{} for _ in range(self._layers)]
        self._free = deque(range(STAGING, self.bank.count))
        self._staging = 0
        self._spare: dict[tuple[int, int], int] = {}

    def place(self, layer: int, expert: int) -> int:
        return self._where[layer][expert]

    def residents(self, layer: int) -> frozenset[int]:
        return frozenset(self._where[layer])

    def enter(self, layer: int, expert: int, victim: Victim | None) -> int:
        """The place for an expert that is resident from now on; its victim's becomes free."""
        if victim is not None:
            self._leave(layer, victim)
        place = self._where[layer][expert] = self._free.popleft()
        return place

    def staging(self) -> int:
        """The place for an expert that is not kept."""
        self._staging = (self._staging + 1) % STAGING
        return self._staging

    def reserve(self, layer: int, expert: int) -> int:
        """The place for a prefetch."""
        place = self._spare[layer, expert] = self._free.popleft()
        return place

    def keep(self, layer: int, expert: int, victim: Victim | None) -> int:
        """A prefetch that has landed is resident from now on."""
        if victim is not None:
            self._leave(layer, victim)
        place = self._where[layer][expert] = self._spare.pop((layer, expert))
        return place

    def drop(self, layer: int, expert: int) -> int:
        """A prefetch that has landed finds no slot; its place, which is free."""
        place = self._spare.pop((layer, expert))
        self._free.append(place)
        return place

    def _leave(self, layer: int, victim: Victim) -> None:
        layer, expert = victim if isinstance(victim, tuple) else (layer, victim)
        self._free.append(self._where[layer].pop(expert))
