"""Predictors watched: experts that there are, loads of at least a token, finite scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from hybrimoe_jax.decide.prefetch.prediction import Prediction, Predictor, RouterOutlook
from hybrimoe_jax.decide.watch import Watch, trusted


class PredictorWatch(Watch):
    """One predictor. Every method is the contract's, see `Predictor`."""

    methods = ("predict", "finish_step")
    rule: Predictor

    def predict(self, layer: int, shown: RouterOutlook, depth: int) -> list[Prediction]:
        """The predictor's answer, as far as it was asked for one."""
        ids, scores, ahead = shown
        seen = RouterOutlook(_fixed(ids), None if scores is None else _fixed(scores), [_fixed(each) for each in ahead])
        found: Any = self.ask("predict", layer, seen, depth)
        if not isinstance(found, Sequence):
            self.fault("predict", f"gave {found!r:.80}, which is no list of predictions", layer)
        given = cast(Sequence[Any], found)
        return [self._checked(layer, distance, each) for distance, each in enumerate(given[:depth], 1)]

    def finish_step(self) -> None:
        self.ask("finish_step")

    def _checked(self, layer: int, distance: int, found: Any) -> Prediction:
        if not (_is_prediction(found)):
            self.fault("predict", f"gave {found!r:.80} for layer {layer + distance}, which is no Prediction", layer)
        loads, scores = cast(tuple[Mapping[Any, Any], Any], found)
        what, experts = f"foresaw in layer {layer + distance}", self.rule.num_experts
        plain = {
            self.expert("predict", what, expert, experts, layer): self.whole("predict", f"{what} loads of", load, layer)
            for expert, load in loads.items()
        }
        few = next((expert for expert, load in plain.items() if load < 1), None)
        if few is not None:
            self.fault("predict", f"{what} expert {few} with a load of {plain[few]}; a load is at least 1", layer)
        if scores is None:
            return Prediction(plain, None)
        if len(scores) != experts:
            self.fault("predict", f"gave {len(scores)} scores for {experts} experts", layer)
        plain_scores = [float(score) for score in scores]
        wrong = next((expert for expert, score in enumerate(plain_scores) if not math.isfinite(score)), None)
        if wrong is not None:
            self.fault("predict", f"{what} the score {plain_scores[wrong]} of expert {wrong}; scores are finite", layer)
        return Prediction(plain, plain_scores)


def _is_prediction(found: Any) -> bool:
    return isinstance(found, tuple) and len(cast(Any, found)) == 2 and isinstance(found[0], Mapping)


def _fixed(array: np.ndarray) -> np.ndarray:
    """The array as something that cannot be written to."""
    view = np.asarray(array).view()
    view.flags.writeable = False
    return view


def watch_predictor(predictor: Predictor, every: bool = False) -> Predictor:
    """The same object; `every`: one of the package's own, too."""
    mine = trusted(predictor, PredictorWatch.methods)
    if (every or not mine) and "_watched" not in predictor.__dict__:
        PredictorWatch("predictor", predictor)
    return predictor
