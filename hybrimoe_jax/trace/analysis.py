"""How experts behave, counted over a whole trace: the characterisation figures of the paper, and what `info` tells.

T tokens, L MoE layers, E experts, k experts per token; tokens in the order of `by_token`. Every figure is taken over
what the trace holds, prompts and decoding alike; `Trace.select` takes a part of it.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np

from hybrimoe_jax import arguments
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.trace.columns import Trace
from hybrimoe_jax.trace.tokens import token_of_row


class ReuseDistance(NamedTuple):
    """Uses of experts by how long ago the last one was.

    `counts` [E]: uses of an expert after so many distinct experts of its layer were chosen by later tokens;
    `first_uses`: uses without an earlier one.
    """

    counts: np.ndarray
    first_uses: int

    def quantile(self, share: float) -> float:
        """The distance, a whole number, that this share of the uses after the first one does not exceed.

        NaN where no expert was used twice.
        """
        share = arguments.number("share", share)
        if not 0 <= share <= 1:
            raise UserError(f"share {share} is outside 0..1")
        if not self.counts.any():
            return math.nan
        return int(np.searchsorted(np.cumsum(self.counts) / self.counts.sum(), share))


def frequency(trace: Trace) -> np.ndarray:
    """[L, E]: the share of a layer's tokens that chose each expert; a layer's sum is k, 0 where it has no rows."""
    facts = trace.facts
    flat = (trace.layer[:, None].astype(np.int64) * facts.experts + trace.ids).ravel()
    counts = np.bincount(flat, minlength=facts.layers * facts.experts).reshape(facts.layers, facts.experts)
    return counts * (facts.top_k / np.maximum(1, counts.sum(axis=1, keepdims=True)))


def overlap(trace: Trace) -> np.ndarray:
    """[L]: the share of a token's experts that the token before it in its sequence chose too; NaN without a pair."""
    before, here = _neighbours(trace)
    return _by_layer(_chosen(trace, before, trace.ids[here]).mean(axis=1), trace.layer[here], trace.facts.layers)


def reuse_by_rank(trace: Trace) -> np.ndarray:
    """The chance that an expert is chosen again by the next token, by its rank for this one, the highest score first.

    [E] where the trace holds full scores, [k] where it holds the weights of the chosen ones. Over all layers and pairs
    of neighbours in a sequence. The paper's figure of score ranks, on which MRS caching rests. UserError without scores
    and weights.
    """
    before, here = _neighbours(trace)
    values = trace.weights if trace.scores is None else trace.scores
    if values is None:
        raise UserError("reuse by rank: the trace holds neither the router's scores nor weights")
    known = ~np.isnan(values[before]).any(axis=1)
    before, here = before[known], here[known]
    if not len(before):
        raise UserError("reuse by rank: the trace holds no two neighbouring tokens with scores or weights")
    ranked = np.argsort(-values[before], axis=1, kind="stable")
    if values is trace.weights:
        ranked = np.take_along_axis(trace.ids[before], ranked, axis=1)
    return _chosen(trace, here, ranked).mean(axis=0)


def reuse_distance(trace: Trace) -> ReuseDistance:
    """How many distinct experts of the layer later tokens chose before an expert is chosen again.

    An LRU cache with more slots than that, besides the token's own, has kept it. The layers are walked side by side.
    """
    counts = np.zeros(trace.facts.experts, np.int64)
    firsts = 0
    last = np.full((trace.facts.layers, trace.facts.experts), -1)
    order, keys = _by_token_and_layer(trace)
    starts = np.flatnonzero(np.diff(keys // trace.facts.layers, prepend=-1)).tolist()
    layers, ids = trace.layer[order], trace.ids[order]
    for time, (start, stop) in enumerate(itertools.pairwise([*starts, len(order)])):
        here, chosen = layers[start:stop], ids[start:stop]
        before = last[here[:, None], chosen]
        distance = _later(last[here], before)
        again = before >= 0
        counts += np.bincount(distance[again], minlength=len(counts))
        firsts += int(again.size - again.sum())
        last[here[:, None], chosen] = time
    return ReuseDistance(counts, firsts)


def _later(last: np.ndarray, before: np.ndarray) -> np.ndarray:
    """[N, k]: how many of a row's numbers `last` [N, E] are above each of `before` [N, k]."""
    rows, experts = last.shape
    if before.shape[1] <= 16:
        return (last[:, None, :] > before[:, :, None]).sum(axis=2)
    offset = np.arange(rows)[:, None] * (int(last.max()) + 2)
    ends = np.arange(1, rows + 1)[:, None] * experts
    return ends - np.searchsorted((np.sort(last, axis=1) + offset).ravel(), before + offset, side="right")


def recall(trace: Trace, distance: int) -> np.ndarray:
    """[L]: the share of a layer's chosen experts among the k that its router favoured `distance` layers before.

    NaN where nothing was predicted. UserError where the trace holds no predictions at this distance.
    """
    rows, target = _predictions(trace, distance)
    k = trace.facts.top_k
    named = np.argpartition(-trace.lookahead[distance][rows], k - 1, axis=1)[:, :k]
    return _by_layer(_chosen(trace, target, named).mean(axis=1), trace.layer[target], trace.facts.layers)


def similarity(trace: Trace, distance: int) -> np.ndarray:
    """[L]: how alike a layer's router judges its own state and that of the layer `distance` before it.

    The mean cosine of the two vectors of probabilities; NaN where nothing was predicted. UserError where the trace
    lacks predictions at this distance, or full scores.
    """
    rows, target = _predictions(trace, distance)
    if trace.scores is None:
        raise UserError("similarity: the trace holds no full router scores")
    known = ~np.isnan(trace.scores[target, 0])
    rows, target = rows[known], target[known]
    ahead, own = trace.lookahead[distance][rows].astype(float), trace.scores[target].astype(float)
    with np.errstate(invalid="ignore"):  # of a vector of zeros nothing is known
        cosine = (own * ahead).sum(axis=1) / (np.linalg.norm(own, axis=1) * np.linalg.norm(ahead, axis=1))
    return _by_layer(cosine, trace.layer[target], trace.facts.layers)


def layer_rows(trace: Trace) -> list[dict[str, Any]]:
    """A row for each MoE layer that the trace holds; what it does not hold is left out.

    `hottest_quarter`: share of activations on the most activated quarter of its experts; `reused`: see `overlap`;
    `similarity`, `recall`: of what was predicted one layer before.
    """
    shares = np.sort(frequency(trace), axis=1)[:, ::-1] / trace.facts.top_k
    hot = max(1, round(trace.facts.experts / 4))
    columns = {
        "tokens": np.bincount(trace.layer, minlength=trace.facts.layers),
        "experts_used": (shares > 0).sum(axis=1),
        "hottest": shares[:, 0] * trace.facts.top_k,
        "hottest_quarter": shares[:, :hot].sum(axis=1),
        "reused": overlap(trace),
    }
    if 1 in trace.lookahead:
        columns |= {"recall": recall(trace, 1)} | ({} if trace.scores is None else {"similarity": similarity(trace, 1)})
    return [
        {"layer": layer, **{name: _plain(column[layer]) for name, column in columns.items()}}
        for layer in np.unique(trace.layer).tolist()
    ]


def _plain(value: np.generic) -> Any:
    return None if np.isnan(value) else value.item()


def _by_token_and_layer(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """(rows in the order of token and layer, their keys: the token's number x L + the layer), both [R]."""
    keys = token_of_row(trace)[0] * trace.facts.layers + trace.layer
    order = np.argsort(keys, kind="stable")
    return order, keys[order]


def _found(keys: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(where in the sorted `keys` [R] each of `wanted` [N] would be, whether it is there), both [N]."""
    place = np.minimum(np.searchsorted(keys, wanted), max(0, len(keys) - 1))
    return place, keys[place] == wanted


def _neighbours(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """(rows, rows of the token before), both [N]: pairs of neighbours in a sequence, in one layer."""
    order, keys = _by_token_and_layer(trace)
    first = token_of_row(trace)[1]
    follows = np.zeros(len(first), bool)
    follows[1:] = (np.diff(trace.sequence[first]) == 0) & (np.diff(trace.position[first]) == 1)
    here = np.flatnonzero(follows[keys // trace.facts.layers])
    before, there = _found(keys, keys[here] - trace.facts.layers)
    return order[before[there]], order[here[there]]


def _predictions(trace: Trace, distance: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows with a prediction for the layer `distance` further on, the rows of that layer), both [N]."""
    if distance not in trace.lookahead:
        held = ", ".join(map(str, sorted(trace.lookahead))) or "none"
        raise UserError(f"the trace holds no lookahead at distance {distance} (held: {held})")
    inside = trace.layer + distance < trace.facts.layers
    order, keys = _by_token_and_layer(trace)
    predicted = np.flatnonzero((inside & ~np.isnan(trace.lookahead[distance][:, 0]))[order])
    target, there = _found(keys, keys[predicted] + distance)
    return order[predicted[there]], order[target[there]]


def _chosen(trace: Trace, rows: np.ndarray, experts: np.ndarray) -> np.ndarray:
    """[N, M]: whether the tokens of these rows [N] chose these experts [N, M]."""
    found = np.empty(experts.shape, bool)
    size = max(1, 2**24 // trace.facts.experts)  # rows at a time: a table of all of them may be far above the trace
    chosen = np.zeros((min(size, len(rows)), trace.facts.experts), bool)
    for start in range(0, len(rows), size):
        ids = trace.ids[rows[start : start + size]]
        table = chosen[: len(ids)]
        np.put_along_axis(table, ids, True, axis=1)
        found[start : start + size] = np.take_along_axis(table, experts[start : start + size], axis=1)
        np.put_along_axis(table, ids, False, axis=1)
    return found


def _by_layer(values: np.ndarray, layer: np.ndarray, layers: int) -> np.ndarray:
    """[L]: means of values [N] of these layers [N]; NaN where there is none."""
    counts = np.bincount(layer, minlength=layers)
    with np.errstate(invalid="ignore"):
        return np.bincount(layer, values, minlength=layers) / counts
