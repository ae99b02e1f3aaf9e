"""What a forward pass is asked: the tokens of one step. Imports no jax."""

from __future__ import annotations

import dataclasses

import numpy as np

SMALLEST_SPAN = 256


def bucket(n: int, smallest: int = 1) -> int:
    """The power of two at or above n."""
    return max(smallest, 1 << max(0, n - 1).bit_length())


@dataclasses.dataclass
class StepInput:
    """One step's tokens. ids, positions [B, T] int32 (padding: position = cache capacity); phase "prefill" or "decode".

    `last` [B] picks each row's token whose logits are wanted; None asks for all. `follow`: so many steps follow, each
    taking the likeliest token of the one before, unless that is one of `stop_ids`; so they may be started ahead. None:
    the next token is drawn. `greedy`: each row's likeliest token is enough. `first_sequence`: the first row's number
    among all sequences of the engine; the others follow. `checked`: NaN in a router's probabilities ends the step.
    """

    ids: np.ndarray
    positions: np.ndarray
    capacity: int
    phase: str
    last: np.ndarray | None
    follow: int | None = 0
    stop_ids: tuple[int, ...] = ()
    greedy: bool = False
    first_sequence: int = 0
    checked: bool = False

    @property
    def valid(self) -> np.ndarray:
        return np.flatnonzero(self.positions.ravel() < self.capacity)

    @property
    def context(self) -> int:
        """Places of the cache that the longest row attends to."""
        return int(self.positions[self.positions < self.capacity].max(initial=0)) + 1

    @property
    def span(self) -> int:
        """How much of the cache attention must read: a power of two, so that few executables serve all positions.

        More than the step's tokens unless all rows start at position 0 (see `Attention`).
        """
        span = bucket(self.context, SMALLEST_SPAN)
        first = self.positions[:, 0]
        if span == self.positions.shape[1] and ((first > 0) & (first < self.capacity)).any():
            span *= 2
        return min(self.capacity, span)
