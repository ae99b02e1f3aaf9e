"""Random routing whose phrases come back, and the visits of layers that it makes."""

from __future__ import annotations

import numpy as np

from hybrimoe_jax.bench.cache import Visit


def random_routing(tokens: int, layers: int, experts: int, k: int, seed: int = 0):
    """[T][L] lists; skewed, with phrases that come back."""
    rng = np.random.default_rng(seed)
    phrases = [rng.random((6, layers, experts)) ** 3 for _ in range(4)]
    rows = []
    while len(rows) < tokens:
        phrase = phrases[rng.integers(len(phrases))] + 0.3 * rng.random((6, layers, experts))
        rows += [np.argsort(-step, axis=1)[:, :k].tolist() for step in phrase]
    return rows[:tokens]


def visits_of(rows):
    return [Visit(layer, ids) for step in rows for layer, ids in enumerate(step)]
