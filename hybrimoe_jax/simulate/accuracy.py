"""How often predictors are right, by distance, measured over a trace without planning anything."""

from __future__ import annotations

from hybrimoe_jax.decide.prefetch.predictors import build_predictor
from hybrimoe_jax.simulate.workload import TokenSteps

DISTANCES = 6


def recall_by_distance(tokens: TokenSteps, steps: int = 300, distances: int = DISTANCES) -> dict[str, list[float]]:
    """Per predictor that the trace allows, the share of activated experts that it named, at distances 1, 2, ... One token a step."""
    facts = tokens.facts
    names = ["co-activation", "previous"] + (["router-reuse", "corrected"] if tokens.has_lookahead else [])
    shares = {}
    for name in names:
        predictor = build_predictor(name, facts.layers, facts.experts, facts.top_k, distances)
        hits, asked = [0] * distances, [0] * distances
        for step in tokens.steps(tokens.sequences, steps):
            loads = {a.layer: a.loads for a in step.layers}
            for one in step.layers:
                for d, prediction in enumerate(predictor.predict(one.layer, one.shown, distances), 1):
                    wanted = loads.get(one.layer + d)
                    if wanted and prediction.loads:
                        hits[d - 1] += len(wanted.keys() & prediction.loads.keys())
                        asked[d - 1] += len(wanted)
            predictor.finish_step()
        shares[name] = [h / a for h, a in zip(hits, asked) if a]
    return shares
