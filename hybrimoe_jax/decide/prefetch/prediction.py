"""Predictions of what coming layers will be asked for.

What they are made from, who makes them, and how often they come true.

N tokens of a step, E experts, k experts per token. Distance d: the layer d MoE layers after the one that looks.
"""

# NumPy 2.5 types some functions by what its stubs leave unknown.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence, Set
from typing import Any, ClassVar, NamedTuple

import numpy as np

from hybrimoe_jax.decide.registry import Parametric

Scores = np.ndarray | Sequence[float]
"""Of every expert, [E]."""


class Prediction(NamedTuple):
    """What a layer is expected to be asked for.

    Tokens per expert, and the mean router score of every expert (None where unknown).
    """

    loads: Mapping[int, int]
    scores: Sequence[float] | None = None


class RouterOutlook(NamedTuple):
    """What one layer shows of a step.

    Chosen experts `ids` [N, k]; router probabilities `scores` [N, E], or None; and, by distance from 1, the
    probabilities `ahead` [N, E] that the coming layers' routers give on this layer's state (empty where they were not
    applied).
    """

    ids: np.ndarray
    scores: np.ndarray | None = None
    ahead: Sequence[np.ndarray] = ()


def predict(scores: Scores | Sequence[Sequence[float]], top_k: int) -> Prediction:
    """Predicted loads from predicted scores: the top k of each token.

    Args:
      scores: [tokens, experts] or one token's [experts]; lists or an array. One token's ties go to the lower id.
    """
    if isinstance(scores, np.ndarray) and scores.ndim == 2 and len(scores) > 1:
        return _predict_many(scores, top_k)
    rows: Any = scores.tolist() if isinstance(scores, np.ndarray) else scores
    if not len(rows):
        return Prediction({}, None)
    if not isinstance(rows[0], (list, tuple)):
        rows = [rows]
    if len(rows) > 1:
        return _predict_many(np.asarray(rows), top_k)
    row = rows[0]
    return Prediction(dict.fromkeys(sorted(range(len(row)), key=row.__getitem__, reverse=True)[:top_k], 1), row)


def _predict_many(scores: np.ndarray, top_k: int) -> Prediction:
    chosen = np.argpartition(-scores, top_k - 1, axis=1)[:, :top_k]
    return Prediction(loads_of(chosen, scores.shape[1]), scores.mean(axis=0).tolist())


def loads_of(ids: np.ndarray, experts: int) -> dict[int, int]:
    """Tokens of each expert chosen in `ids` [N, k]."""
    if len(ids) == 1:
        return dict.fromkeys(ids[0].tolist(), 1)
    counts = np.bincount(ids.ravel(), minlength=experts)
    return {expert: int(counts[expert]) for expert in np.flatnonzero(counts).tolist()}


def as_list(scores: Scores | None) -> Sequence[float] | None:
    """Arrays become lists: indexing a list is several times faster."""
    return scores.tolist() if isinstance(scores, np.ndarray) else scores


class Predictor(Parametric, abc.ABC):
    """Foresees what coming layers will be asked for. Called with its own parameters alone, a class gives a `Rule`.

    Args: num_layers, num_experts, top_k of the model; distances: how many layers ahead at most.
    """

    needs_routers: ClassVar[bool] = False
    """Whether it needs `RouterOutlook.ahead`."""

    def __init__(self, num_layers: int, num_experts: int, top_k: int, distances: int):
        self.num_layers, self.num_experts, self.top_k, self.distances = num_layers, num_experts, top_k, distances

    @abc.abstractmethod
    def predict(self, layer: int, shown: RouterOutlook, depth: int) -> list[Prediction]:
        """Learns from what `layer` shows, and predicts layers layer+1, ... layer+depth, as far as there are such."""

    def finish_step(self) -> None:
        """The step has ended, whole or broken off."""

    def max_distance(self, layer: int, depth: int) -> int:
        """How many of `depth` layers there are to predict."""
        return min(depth, self.distances, self.num_layers - 1 - layer)


class Accuracy:
    """Per distance, the share of predicted experts that were activated; recent steps weigh more.

    Starts from one success and one failure (probability a half) and forgets with `decay` per update. `predicted` and
    `came_true` are plain totals by distance.
    """

    def __init__(self, lookahead: int, decay: float = 0.99):
        self.decay = decay
        self._hits = [0.0] * (lookahead + 1)
        self._tries = [0.0] * (lookahead + 1)
        self.predicted = [0] * (lookahead + 1)
        self.came_true = [0] * (lookahead + 1)

    def update(self, distance: int, predicted: Set[int], activated: Set[int]) -> None:
        """Compares one layer's prediction, made `distance` layers before, with what was activated.

        Both are sets, or the keys of loads.
        """
        hits = len(predicted & activated)
        self._hits[distance] = self._hits[distance] * self.decay + hits
        self._tries[distance] = self._tries[distance] * self.decay + len(predicted)
        self.predicted[distance] += len(predicted)
        self.came_true[distance] += hits

    def probability(self, distance: int) -> float:
        """The chance that an expert predicted at `distance` (from 1) will be activated."""
        return (self._hits[distance] + 1.0) / (self._tries[distance] + 2.0)
