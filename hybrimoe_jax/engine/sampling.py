"""Choosing the next token from logits, on the host, reproducibly: one random stream per sequence. Imports no jax."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from hybrimoe_jax import arguments
from hybrimoe_jax.errors import UserError


@arguments.named_fields
@dataclasses.dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0 and top_p 1 keep every token."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for name, check in CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))
        if self.temperature < 0:
            raise UserError(f"temperature {self.temperature} must be 0 (greedy) or a finite number above")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p} is outside (0, 1]")


CHECKS: dict[str, Callable[[str, Any], int | float]] = {
    "temperature": arguments.number,
    "top_k": functools.partial(arguments.whole, least=0),
    "top_p": arguments.number,
    "seed": functools.partial(arguments.whole, least=0),
}


class Sampler:
    """Draws for up to `rows` sequences; sequence i's draws do not depend on its neighbours."""

    def __init__(self, sampling: Sampling, rows: int):
        self.sampling = sampling
        self._streams = [np.random.default_rng([sampling.seed, row]) for row in range(rows)]

    def __call__(self, row: int, logits: np.ndarray) -> int:
        """`logits` [V] -> token id."""
        options = self.sampling
        if options.temperature == 0:
            return int(np.argmax(logits))
        probabilities = distribution(logits, options)
        return int(self._streams[row].choice(len(probabilities), p=probabilities))


def distribution(logits: np.ndarray, options: Sampling) -> np.ndarray:
    """float64 probabilities [V] after temperature, then top-k, then top-p.

    Top-p keeps the fewest of the likeliest tokens that reach p together. Of equals the lower id is kept.
    """
    with np.errstate(over="ignore", under="ignore"):  # a tiny temperature leaves the best token only
        return _distribution(logits, options)


def _distribution(logits: np.ndarray, options: Sampling) -> np.ndarray:
    scaled = logits.astype(np.float64)
    scaled = (scaled - scaled.max()) / options.temperature
    if options.top_k and options.top_k < scaled.size:
        kept = np.argsort(-logits, kind="stable")[: options.top_k]
        masked = np.full_like(scaled, -np.inf)
        masked[kept] = scaled[kept]
        scaled = masked
    probabilities = np.exp(scaled)
    probabilities /= probabilities.sum()
    if options.top_p < 1:
        order = np.argsort(-scaled, kind="stable")  # logits that differ may have equal probabilities
        before = np.cumsum(probabilities[order]) - probabilities[order]
        probabilities[order[before >= options.top_p]] = 0.0
        probabilities /= probabilities.sum()
    return probabilities
