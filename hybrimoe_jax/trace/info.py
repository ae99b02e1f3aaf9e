"""What a trace holds, what it lacks, and how its routing behaves: the figures of `python -m hybrimoe_jax.trace info`.

* *Overlap*: the share of a token's experts that the token before it in its sequence chose too, in the same layer. By
  chance it would be k / E if all experts were equally likely, and sum_e q_e^2 / k if tokens were independent but every
  expert as popular as it is (q_e: the share of tokens that chose e).
* *Skew*: the share of all activations that fall on the most activated quarter of a layer's experts (0.25 if uniform).
* *Reuse distance*: how many distinct experts of the layer later tokens chose before an expert is chosen again; an LRU
  cache with more slots than that, besides the token's own, has kept it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hybrimoe_jax.trace.file import PHASES, Trace
from hybrimoe_jax.trace.tokens import Tokens, by_token, token_of_row


def lacks(trace: Trace) -> list[str]:
    """What a replay might want and this trace does not hold, in words, with what a replay does instead."""
    said = []
    if trace.weights is None or bool(np.isnan(trace.weights).all()):
        said.append("router weights")
    if trace.scores is None:
        said.append("full router scores (score caches see the selected experts only: MRS with p = k)")
    elif missing := int(np.isnan(trace.scores[:, 0]).sum()):
        said.append(f"full router scores of {missing} of {len(trace)} rows")
    if not trace.lookahead:
        said.append("lookahead predictions (predictors that need none: co-activation, previous, recorded)")
    for number, phase in enumerate(PHASES):
        if not (trace.phase == number).any():
            said.append(f"{phase} steps")
    steps = int(np.unique(trace.step).size)
    records = len(trace) and 1 + int(((np.diff(trace.step) != 0) | (np.diff(trace.layer) != 0)).sum())
    if absent := steps * trace.facts.layers - records:
        layers = np.unique(trace.layer).size
        said.append(
            f"{absent} of {steps * trace.facts.layers} (step, layer) records"
            + ("" if layers == trace.facts.layers else f", {trace.facts.layers - layers} layers altogether")
        )
    return said


def info(trace: Trace) -> dict[str, Any]:
    """JSON-ready facts and figures; those that need more tokens than there are, are None."""
    facts, tokens = trace.facts, by_token(trace)
    first_rows = np.unique(trace.step, return_index=True)[1]
    phases = trace.phase[first_rows]
    return {
        "model_type": facts.model_type,
        "layers": facts.layers,
        "experts": facts.experts,
        "top_k": facts.top_k,
        "expert_bytes": dict(facts.expert_bytes),
        "steps": {phase: int((phases == number).sum()) for number, phase in enumerate(PHASES)},
        "tokens": {phase: int((tokens.phase == number).sum()) for number, phase in enumerate(PHASES)},
        "sequences": int(np.unique(trace.sequence).size),
        "weights": trace.weights is not None,
        "scores": trace.scores is not None,
        "lookahead": sorted(trace.lookahead),
        "lacks": lacks(trace),
        "overlap": _overlap(tokens, facts),
        "skew": _skew(tokens, facts),
        "reuse_distance": _reuse(tokens, facts),
        "router_reuse": {d: _hit_share(trace, tokens, d) for d in sorted(trace.lookahead)},
        "about": trace.about,
    }


def _counts(tokens: Tokens, facts) -> np.ndarray:
    """[L, E] activations."""
    layer = np.broadcast_to(np.arange(facts.layers)[None, :, None], tokens.ids.shape)
    known = tokens.ids >= 0
    flat = np.bincount(layer[known] * facts.experts + tokens.ids[known], minlength=facts.layers * facts.experts)
    return flat.reshape(facts.layers, facts.experts)


def _overlap(tokens: Tokens, facts) -> dict[str, float] | None:
    ids, k = tokens.ids, facts.top_k
    here, before = ids[1:], ids[:-1]
    pairs = (tokens.sequence[1:] == tokens.sequence[:-1])[:, None] & (here[:, :, 0] >= 0) & (before[:, :, 0] >= 0)
    if not pairs.any():
        return None
    shared = np.zeros(pairs.shape)
    for i in range(k):
        for j in range(k):
            shared += here[:, :, i] == before[:, :, j]
    popularity = _counts(tokens, facts) / np.maximum(1, (ids[:, :, 0] >= 0).sum(axis=0))[:, None]
    return {
        "measured": float(shared[pairs].mean() / k),
        "uniform_chance": k / facts.experts,
        "popularity_chance": float((popularity**2).sum(axis=1).mean() / k),
    }


def _skew(tokens: Tokens, facts) -> dict[str, float] | None:
    counts = np.sort(_counts(tokens, facts), axis=1)[:, ::-1].astype(float)
    counts = counts[counts.sum(axis=1) > 0]
    if not len(counts):
        return None
    hot = max(1, round(facts.experts / 4))
    return {
        "hottest_quarter": float((counts[:, :hot].sum(axis=1) / counts.sum(axis=1)).mean()),
        "hottest_over_mean": float((counts[:, 0] / counts.mean(axis=1)).mean()),
        "never_used": float((counts == 0).mean()),
    }


def _reuse(tokens: Tokens, facts) -> dict[str, float] | None:
    """Percentiles over all uses but first ones; the layers are walked side by side, token by token."""
    layers, experts = np.arange(facts.layers)[:, None], facts.experts
    last = np.full((facts.layers, experts), -1)
    histogram = np.zeros(experts + 1, np.int64)
    firsts = uses = 0
    for time, ids in enumerate(tokens.ids):
        known = ids[:, 0] >= 0
        rows, chosen = (layers, ids) if known.all() else (layers[known], ids[known])
        before = last[rows, chosen]
        distance = (last[rows[:, 0]][:, None, :] > before[:, :, None]).sum(axis=2)
        again = before >= 0
        histogram += np.bincount(distance[again], minlength=experts + 1)
        uses, firsts = uses + again.size, firsts + int(again.size - again.sum())
        last[rows, chosen] = time
    if not histogram.sum():
        return None
    share = np.cumsum(histogram) / histogram.sum()
    at = {name: int(np.searchsorted(share, level)) for name, level in (("median", 0.5), ("p90", 0.9), ("p99", 0.99))}
    return {**at, "first_uses": firsts / uses}


def _hit_share(trace: Trace, tokens: Tokens, distance: int) -> float | None:
    """The share of the experts that router reuse predicted at `distance` which that layer then chose."""
    ahead, k = trace.lookahead[distance], trace.facts.top_k
    rows = np.flatnonzero(~np.isnan(ahead[:, 0]))
    target = tokens.ids[token_of_row(trace)[0][rows], trace.layer[rows] + distance]
    rows, target = rows[target[:, 0] >= 0], target[target[:, 0] >= 0]
    if not len(rows):
        return None
    predicted = np.argpartition(-ahead[rows], k - 1, axis=1)[:, :k]
    return float((predicted[:, :, None] == target[:, None, :]).any(axis=2).mean())
