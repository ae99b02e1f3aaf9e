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

from hybrimoe_jax.trace import analysis
from hybrimoe_jax.trace.columns import PHASES, Trace
from hybrimoe_jax.trace.tokens import token_of_row


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
    facts, token_phases = trace.facts, trace.phase[token_of_row(trace)[1]]
    first_rows = np.unique(trace.step, return_index=True)[1]
    phases = trace.phase[first_rows]
    return {
        "model_type": facts.model_type,
        "layers": facts.layers,
        "experts": facts.experts,
        "top_k": facts.top_k,
        "expert_bytes": dict(facts.expert_bytes),
        "steps": {phase: int((phases == number).sum()) for number, phase in enumerate(PHASES)},
        "tokens": {phase: int((token_phases == number).sum()) for number, phase in enumerate(PHASES)},
        "sequences": int(np.unique(trace.sequence).size),
        "weights": trace.weights is not None,
        "scores": trace.scores is not None,
        "lookahead": sorted(trace.lookahead),
        "lacks": lacks(trace),
        "overlap": _overlap(trace),
        "skew": _skew(trace),
        "reuse_distance": _reuse(trace),
        "router_reuse": {d: _recall(trace, d) for d in sorted(trace.lookahead)},
        "about": trace.about,
    }


def _overlap(trace: Trace) -> dict[str, float] | None:
    by_layer, k = analysis.overlap(trace), trace.facts.top_k
    if np.isnan(by_layer).all():
        return None
    return {
        "measured": float(np.nanmean(by_layer)),
        "uniform_chance": k / trace.facts.experts,
        "popularity_chance": float((analysis.frequency(trace) ** 2).sum(axis=1).mean() / k),
    }


def _skew(trace: Trace) -> dict[str, float] | None:
    shares = np.sort(analysis.frequency(trace), axis=1)[:, ::-1] / trace.facts.top_k
    shares = shares[shares.sum(axis=1) > 0]
    if not len(shares):
        return None
    hot = max(1, round(trace.facts.experts / 4))
    return {
        "hottest_quarter": float(shares[:, :hot].sum(axis=1).mean()),
        "hottest_over_mean": float((shares[:, 0] / shares.mean(axis=1)).mean()),
        "never_used": float((shares == 0).mean()),
    }


def _reuse(trace: Trace) -> dict[str, float] | None:
    """Percentiles over all uses but first ones."""
    found = analysis.reuse_distance(trace)
    again = int(found.counts.sum())
    if not again:
        return None
    at = {"median": found.quantile(0.5), "p90": found.quantile(0.9), "p99": found.quantile(0.99)}
    return {**at, "first_uses": found.first_uses / (found.first_uses + again)}


def _recall(trace: Trace, distance: int) -> float | None:
    by_layer = analysis.recall(trace, distance)
    return None if np.isnan(by_layer).all() else float(np.nanmean(by_layer))
