"""Reading one layer's routing on the host: who is needed, by which rows, with which weights. Imports no jax."""

from __future__ import annotations

import dataclasses

import numpy as np

from hybrimoe_jax.decide.prefetch.prediction import RouterOutlook

_FIRST_ROW = np.zeros(1, np.int64)


@dataclasses.dataclass(slots=True)
class HostRouting:
    """One MoE layer of one step.

    Attributes:
      loads: activated expert -> tokens routed to it.
      rows, weights: per activated expert, its rows of x and their routing weights, both [load].
      scores: [E], mean router probability over the step's tokens.
      ids, row_weights, row_scores: [N, k], [N, k], [N, E] as routed, padding rows included.
      ahead: per lookahead distance, router probabilities [N, E] of that later layer on this layer's state.
      valid: row numbers that hold real tokens.
      x: [N, D], the layer's input, where it was read with the rest.
    """

    loads: dict[int, int]
    rows: dict[int, np.ndarray]
    weights: dict[int, np.ndarray]
    scores: np.ndarray
    ids: np.ndarray
    row_weights: np.ndarray
    row_scores: np.ndarray
    ahead: list[np.ndarray]
    valid: np.ndarray
    x: np.ndarray | None = None

    def shown(self) -> RouterOutlook:
        """What a predictor may learn from: the real tokens' rows."""
        if len(self.valid) == len(self.ids):
            return RouterOutlook(self.ids, self.row_scores, self.ahead)
        rows = self.valid
        return RouterOutlook(self.ids[rows], self.row_scores[rows], [ahead[rows] for ahead in self.ahead])


def read_routing(packed: np.ndarray, top_k: int, num_experts: int, valid: np.ndarray, width: int = 0) -> HostRouting:
    """Unpacks what a layer's front program returned: float32 [N, width + 2k + E * (1 + distances)].

    `width`: D where the layer's input comes first, else 0.
    """
    x = None
    if width:
        x, packed = np.ascontiguousarray(packed[:, :width]), packed[:, width:]
    ids = packed[:, :top_k].astype(np.int64)
    weights = packed[:, top_k : 2 * top_k]
    start = 2 * top_k
    scores = packed[:, start : start + num_experts]
    ahead = [packed[:, s : s + num_experts] for s in range(start + num_experts, packed.shape[1], num_experts)]
    if len(packed) == 1:
        chosen = ids[0].tolist()
        return HostRouting(
            dict.fromkeys(chosen, 1),
            dict.fromkeys(chosen, _FIRST_ROW),
            {expert: weights[0, i : i + 1] for i, expert in enumerate(chosen)},
            scores[0],
            ids,
            weights,
            scores,
            ahead,
            valid,
            x,
        )
    whole = len(valid) == len(packed)
    flat = (ids if whole else ids[valid]).ravel()
    order = np.argsort(flat.astype(np.int16), kind="stable")  # radix sort
    row_numbers = valid[order // top_k]
    sorted_weights = (weights if whole else weights[valid]).ravel()[order]
    counts = np.bincount(flat, minlength=num_experts)
    rows, mixes, loads, begin = {}, {}, {}, 0
    for expert, load in enumerate(counts.tolist()):
        if load:
            rows[expert] = row_numbers[begin : begin + load]
            mixes[expert] = sorted_weights[begin : begin + load]
            loads[expert] = load
            begin += load
    mean = scores.mean(axis=0) if whole else scores[valid].sum(axis=0) / max(1, len(valid))
    return HostRouting(loads, rows, mixes, mean, ids, weights, scores, ahead, valid, x)
