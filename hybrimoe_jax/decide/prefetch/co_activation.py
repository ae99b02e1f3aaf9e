"""Predicting from co-activation: tables of which experts follow which, counted while running.

They follow each other across layers and from token to token.

It needs no router and no scores, so it serves traces that have none. N tokens, L MoE layers, E experts, k experts per
token, D distances.
"""

# NumPy 2.5 types some functions by what its stubs leave unknown.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from hybrimoe_jax import arguments
from hybrimoe_jax.decide.prefetch.prediction import Prediction, Predictor, RouterOutlook, predict
from hybrimoe_jax.errors import UserError

ALIGNED_ROWS = 16
"""Rows up to which a step's tokens are taken to follow those of the step before, row by row: decoding, not chunks of a
prompt.
"""


class CoActivation(Predictor):
    """p(j) = prior(j) times the root of the product of the evidence's lifts p(j | i) / p(j).

    i are this token's experts in this layer and the token before's in the coming one.

    The root, where naive Bayes has the product itself, allows for evidence that is not independent (measured better on
    two real models). Counts are smoothed towards the prior as by `smoothing` observations. Tables hold L * D * E^2 + L
    * E^2 float32 numbers, as rows of E, so that the evidence of all distances is gathered at once; they are brought up
    to date when a step ends, all layers at once: what a step shows is of use to later steps only.

    Args: learn: whether the tables follow what is shown.
    """

    def __init__(self, *model: int, smoothing: float = 2.0, learn: bool = True):
        super().__init__(*model)
        if not 1e-6 <= smoothing <= 1e6:
            raise UserError(f"predictor co-activation: smoothing {smoothing} is outside 1e-06..1e+06")
        layers, experts, distances = self.num_layers, self.num_experts, self.distances
        self.smoothing, self.learn = smoothing, arguments.flag("predictor co-activation: learn", learn)
        self._rows = np.zeros((layers * (distances + 1) * experts, experts), np.float32)
        self._across = self._rows[: layers * distances * experts].reshape(
            layers, distances, experts, experts
        )  # to l + 1 + d
        self._after = self._rows[layers * distances * experts :].reshape(
            layers, experts, experts
        )  # from the token before
        self._count = np.zeros((layers, experts))
        self._tokens = np.zeros(layers)
        self._step: dict[int, np.ndarray] = {}
        self._before: dict[int, np.ndarray] = {}
        self._across_row = np.arange(layers * distances).reshape(layers, distances, 1) * experts
        self._after_row = (layers * distances + np.arange(layers))[:, None] * experts
        source, distance = np.array(
            [(layer - d, d - 1) for layer in range(layers) for d in range(1, min(distances, layer) + 1)], np.int64
        ).reshape(-1, 2).T  # fmt: skip
        self._sources, self._targets = source, source + 1 + distance
        self._pair_row = (source * distances + distance)[:, None] * experts
        self._count_row = np.arange(layers)[:, None] * experts
        self._before_rows: np.ndarray | None = (
            None  # [L, k] rows of the token before, where the last step was one whole token
        )
        self._both = np.empty((distances, 2 * self.top_k), np.int64)
        self._refresh()

    def predict(self, layer: int, shown: RouterOutlook, depth: int) -> list[Prediction]:
        self._step[layer] = shown.ids
        reach = min(depth, self.distances, self.num_layers - 1 - layer)
        if reach <= 0:
            return []
        if len(shown.ids) == 1:
            return self._predict_one(layer, shown.ids[0], reach)
        return self._predict_many(layer, np.asarray(shown.ids), reach)

    def finish_step(self) -> None:
        if not self._step:
            return
        step, before = self._step, self._before
        self._before, self._step = step, {}
        whole = len(step) == self.num_layers and max(map(len, step.values())) == 1
        ids = np.concatenate([step[layer] for layer in range(self.num_layers)]).astype(np.int64) if whole else None
        if self.learn:
            if ids is not None and (self._before_rows is not None or all([len(b) > 1 for b in before.values()])):
                self._learn_one(ids)
            else:
                for layer in sorted(step):
                    self._learn(layer, np.asarray(step[layer]), step, before.get(layer))
            self._refresh()
        self._before_rows = None if ids is None else self._after_row + ids

    def count(self, ids: np.ndarray, follows: np.ndarray) -> None:
        """Adds recorded tokens to the tables: ids [T, L, k], -1 where unknown.

        Follows [T - 1], whether each but the first is its predecessor's next.
        """
        known = ids[:, :, 0] >= 0
        hot = _one_hot(np.maximum(ids, 0), self.num_experts) * known[:, :, None]  # [T, L, E]
        for layer in range(self.num_layers):
            for d in range(self.max_distance(layer, self.distances)):
                self._across[layer, d] += hot[:, layer].T @ hot[:, layer + 1 + d]
            self._after[layer] += (hot[:-1, layer] * follows[:, None]).T @ hot[1:, layer]
        self._count += hot.sum(axis=0)
        self._tokens += known.sum(axis=0)
        self._refresh()

    def _refresh(self) -> None:
        self._prior, self._weight, self._floor = self.weighed(self._count, self._tokens)

    def weighed(self, count: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The priors that the coming step is predicted with, [L, E], and what evidence is weighed by, [L, 1, E or 1].

        A row's factor p(j | i) / p(j) is (table / prior + m) / (count of i + m). The denominator is the same for every
        j and falls out when scores are made to sum to 1, so the root of the number of tokens stands in its place, which
        keeps products of many in range.

        Args: count: uses of each expert, [L, E]. tokens: of each layer, [L].
        """
        prior = (count + self.top_k / self.num_experts) / (tokens[:, None] + 1)
        scale = 1 / np.sqrt(tokens[:, None] + 1)
        return prior, (scale / prior)[:, None], (scale * self.smoothing)[:, None]

    def _predict_one(self, layer: int, chosen: np.ndarray, reach: int) -> list[Prediction]:
        later = slice(layer + 1, layer + 1 + reach)
        across = self._across_row[layer, :reach]
        if self._before_rows is not None:
            rows = self._both[:reach]
            np.add(across, chosen, out=rows[:, : self.top_k])
            rows[:, self.top_k :] = self._before_rows[later]
        else:
            rows = self._with_ragged_before(across + chosen, layer, reach)
        lifts = self._rows.take(rows, axis=0) * self._weight[later]  # [D, 2k, E]
        lifts += self._floor[later]
        scores = np.multiply.reduce(lifts, axis=1)
        np.sqrt(scores, scores)
        scores *= self._prior[later]
        scores /= np.add.reduce(scores, axis=1, keepdims=True)
        k = self.top_k
        best = scores.argpartition(-k, axis=1)[:, -k:].tolist()
        return [Prediction(dict.fromkeys(one, 1), row) for one, row in zip(best, scores.tolist())]

    def _with_ragged_before(self, rows: np.ndarray, layer: int, reach: int) -> np.ndarray:
        """After a step that was broken off the token before may be known of some layers.

        All of those in reach, or none, are used.
        """
        before = self._all_before(layer, reach, 1)
        if before is None:
            return rows
        return np.concatenate([rows, self._after_row[layer + 1 : layer + 1 + reach] + np.concatenate(before)], axis=1)

    def _all_before(self, layer: int, reach: int, rows: int) -> list[np.ndarray] | None:
        """The step before's ids [rows, k] of the layers in reach; None where one had other rows, or none."""
        before = [self._before.get(layer + 1 + d) for d in range(reach)]
        found = [ids for ids in before if ids is not None and len(ids) == rows]
        return found if len(found) == reach else None

    def _predict_many(self, layer: int, ids: np.ndarray, reach: int) -> list[Prediction]:
        later = slice(layer + 1, layer + 1 + reach)
        before = self._all_before(layer, reach, len(ids)) if len(ids) <= ALIGNED_ROWS else None
        weight, floor = self._weight[later], self._floor[later]
        logs = np.log(self._across[layer, :reach] * weight + floor)
        product = np.exp(_one_hot(ids, self.num_experts) @ logs)  # [D, N, E]
        if before is not None:
            targets, earlier = np.arange(layer + 1, layer + 1 + reach)[:, None], np.stack(before)  # [D, N, k]
            for n in range(len(ids)):
                product[:, n] *= (self._after[targets, earlier[:, n]] * weight + floor).prod(axis=1)
        scores = self._prior[later][:, None] * np.sqrt(product)
        scores /= scores.sum(axis=2, keepdims=True)
        return [predict(score, self.top_k) for score in scores]

    def _learn_one(self, ids: np.ndarray) -> None:
        """One whole token, ids [L, k]."""
        table, experts = self._rows.reshape(-1), self.num_experts
        if len(self._sources):
            pairs = (self._pair_row + ids[self._sources])[:, :, None] * experts + ids[self._targets][:, None, :]
            table[pairs] += 1
        if self._before_rows is not None:
            table[self._before_rows[:, :, None] * experts + ids[:, None, :]] += 1
        self._count.reshape(-1)[self._count_row + ids] += 1
        self._tokens += 1

    def _learn(self, layer: int, ids: np.ndarray, step: Mapping[int, np.ndarray], before: np.ndarray | None) -> None:
        """Any rows of one layer."""
        hot = _one_hot(ids, self.num_experts)
        for d in range(1, min(self.distances, layer) + 1):
            source = step.get(layer - d)
            if source is not None and len(source) == len(ids):
                self._across[layer - d, d - 1] += _one_hot(np.asarray(source), self.num_experts).T @ hot
        self._count[layer] += hot.sum(axis=0)
        if before is not None and len(before) == len(ids) <= ALIGNED_ROWS:
            for one, other in zip(before, ids):
                self._after[layer, one[:, None], other] += 1
        self._tokens[layer] += len(ids)


def _one_hot(ids: np.ndarray, experts: int) -> np.ndarray:
    """[..., N, k] ids -> float32 [..., N, E]."""
    hot = np.zeros((*ids.shape[:-1], experts), np.float32)
    np.put_along_axis(hot, np.asarray(ids, np.int64), 1, axis=-1)
    return hot
