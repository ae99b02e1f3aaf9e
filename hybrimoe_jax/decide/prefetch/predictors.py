"""Predictors: what the coming layers will be asked for, from what the layers so far have shown.

One contract, used live and in replay.

  router-reuse     the coming layers' own norms and routers on this layer's state (HybriMoE, arXiv 2504.05897, section
                   4.3), scores live or from a trace
  router-input     the same routers on this layer's normed router input, literally reused; differs from router-reuse in
                   what the runtime computes
  corrected        router reuse plus, per layer and distance, the mean difference between true and reused
                   log-probabilities, fitted online: the image, under the nearly linear router, of the mean shift of
                   the residual stream between the two layers
  co-activation    needs no router: online tables of which experts follow which, across layers and from token to token
  previous         what the coming layers chose in the step before
  recorded:TRACE   co-activation with tables counted beforehand on a recorded trace, and not learned any further
  perfect          the future itself: the bound, in replay only

A predictor sees every layer of every step that is looked at, in order: `predict(layer, shown, depth)`, then
`finish_step()`. N tokens, E experts, k experts per token, D distances.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from hybrimoe_jax.decide.prefetch.co_activation import CoActivation
from hybrimoe_jax.decide.prefetch.prediction import Prediction, Predictor, RouterOutlook, loads_of, predict
from hybrimoe_jax.decide.prefetch.watched import watch_predictor
from hybrimoe_jax.decide.registry import Kind, Rule
from hybrimoe_jax.errors import UserError


class RouterReuse(Predictor):
    """The runtime's or the trace's scores as they are; no prediction at distances that have none."""

    needs_routers = True

    def predict(self, layer: int, shown: RouterOutlook, depth: int) -> list[Prediction]:
        return [predict(ahead, self.top_k) for ahead in shown.ahead[: self.max_distance(layer, depth)]]


class Corrected(Predictor):
    """Router reuse with a mean shift of the log-probabilities by layer and distance.

    The shift is a running mean with weight 1/n, at least `rate`, on the newest step.
    """

    needs_routers = True

    def __init__(self, *model: int, rate: float = 1 / 64):
        super().__init__(*model)
        if not 0 <= rate <= 1:
            raise UserError(f"predictor corrected: rate {rate} is outside 0..1")
        self.rate = rate
        self._shift = np.zeros((self.num_layers, self.distances, self.num_experts))
        self._seen = np.zeros((self.num_layers, self.distances), np.int64)
        self._reused: dict[int, list[np.ndarray]] = {}  # this step's mean log-probabilities by layer and distance

    def predict(self, layer: int, shown: RouterOutlook, depth: int) -> list[Prediction]:
        if shown.scores is not None:
            truth = _log(shown.scores).mean(axis=0)
            for distance in range(1, min(self.distances, layer) + 1):
                reused = self._reused.get(layer - distance, ())
                if len(reused) >= distance:
                    self._fit(layer - distance, distance - 1, truth - reused[distance - 1])
        logs = [_log(ahead) for ahead in shown.ahead[: self.max_distance(layer, depth)]]
        self._reused[layer] = [log.mean(axis=0) for log in logs]
        shifted = [np.exp(log + self._shift[layer, d]) for d, log in enumerate(logs)]
        return [predict(scores / scores.sum(axis=1, keepdims=True), self.top_k) for scores in shifted]

    def finish_step(self) -> None:
        self._reused.clear()

    def _fit(self, layer: int, d: int, difference: np.ndarray) -> None:
        self._seen[layer, d] += 1
        weight = max(1 / self._seen[layer, d], self.rate)
        self._shift[layer, d] += weight * (difference - self._shift[layer, d])


class Previous(Predictor):
    """The experts of the step before.

    Where that had other rows, as after a prompt, its last row stands for the token before.
    """

    def __init__(self, *model: int):
        super().__init__(*model)
        self._chosen: dict[int, RouterOutlook] = {}

    def predict(self, layer: int, shown: RouterOutlook, depth: int) -> list[Prediction]:
        self._chosen[layer] = shown
        rows = len(shown.ids)
        return [self._of(self._chosen.get(layer + d), rows) for d in range(1, self.max_distance(layer, depth) + 1)]

    def _of(self, before: RouterOutlook | None, rows: int) -> Prediction:
        if before is None:
            return Prediction({}, None)
        part = slice(None) if len(before.ids) == rows else slice(-1, None)
        scores = None if before.scores is None else before.scores[part].mean(axis=0).tolist()
        return Prediction(loads_of(before.ids[part], self.num_experts), scores)


class Perfect(Predictor):
    """The routing that is to come. Whoever replays a trace tells it, step by step, by `foresee`; live nobody can."""

    def __init__(self, *model: int):
        super().__init__(*model)
        self._coming: Mapping[int, np.ndarray] = {}

    def foresee(self, coming: Mapping[int, np.ndarray]) -> None:
        """The ids [N, k] of every layer of the step that begins."""
        self._coming = coming

    def predict(self, layer: int, shown: RouterOutlook, depth: int) -> list[Prediction]:
        coming = [self._coming.get(layer + d) for d in range(1, self.max_distance(layer, depth) + 1)]
        return [Prediction({} if ids is None else loads_of(ids, self.num_experts), None) for ids in coming]

    def finish_step(self) -> None:
        self._coming = {}


PREDICTORS: dict[str, type[Predictor]] = {
    "router-reuse": RouterReuse,
    "router-input": RouterReuse,
    "corrected": Corrected,
    "co-activation": CoActivation,
    "previous": Previous,
    "perfect": Perfect,
}
"""The predictors by name."""
RECORDED = "recorded:"


def _try_out(predictor: type[Predictor], parameters: Mapping[str, Any]) -> tuple[Predictor]:
    return (predictor(4, 8, 2, 3, **parameters),)


FORESEEING = Kind(
    "predictor",
    "predictor",
    Predictor,
    PREDICTORS,
    {"predict": ("layer", "shown", "depth"), "finish_step": ()},
    ("num_layers", "num_experts", "top_k", "distances"),
    _try_out,
    f", {RECORDED}TRACE",
)


def predictor_rule(spec: Any, live: bool = False) -> Rule:
    """The predictor that `spec` names, see `registry`; UserError where there is none.

    `live`: none that knows the future.
    """
    if isinstance(spec, str) and spec.startswith(RECORDED) and len(spec) > len(RECORDED):
        return Rule(CoActivation, {}, str(spec))
    perfect = isinstance(spec, str) and spec == "perfect"
    if live and (perfect or (isinstance(spec, type) and issubclass(spec, Perfect))):
        raise UserError("predictor 'perfect' knows the future: it is for replaying a trace, not for a live run")
    kind = FORESEEING
    if live:
        kind = dataclasses.replace(kind, known={name: made for name, made in kind.known.items() if made is not Perfect})
    return kind.resolve(spec)


def build_predictor(
    spec: Any, num_layers: int, num_experts: int, top_k: int, distances: int, recording: Any = None
) -> Predictor:
    """The predictor that `spec` names, for a model. UserError where the name, or the recording, does not fit.

    `recording` is what `recorded:TRACE` counts, a `trace.tokens.Recording`: facts (layers, experts, top_k), ids [T, L,
    k], and follows [T - 1], see `CoActivation.count`.
    """
    rule, model = predictor_rule(spec), (num_layers, num_experts, top_k, distances)
    if not rule.startswith(RECORDED):
        return watch_predictor(rule.made_by(*model, **rule.parameters))
    facts = recording.facts
    if (facts.layers, facts.experts, facts.top_k) != model[:3]:
        raise UserError(
            f"predictor {rule}: its trace is of {facts.layers} layers, {facts.experts} experts, {facts.top_k} a token; "
            f"this model has {num_layers}, {num_experts} and {top_k}"
        )
    predictor = CoActivation(*model, learn=False)
    predictor.count(recording.ids, recording.follows)
    return predictor


def _log(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(probabilities, 1e-9, dtype=np.float64))
