"""Figures that no single run gives: reuse by rank, likeness of layers, a slow link, the knobs that traces have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hybrimoe_jax.decide.planner import Planner
from hybrimoe_jax.encoding import say
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.machine.profile import load_profile
from hybrimoe_jax.machine.shapes import get_shape
from hybrimoe_jax.machine.virtual import VirtualMachine
from hybrimoe_jax.reproduce.experiments import Variant, case
from hybrimoe_jax.reproduce.sources import QWEN2, SYNTHETIC
from hybrimoe_jax.simulate.cases import samples, tokens_of
from hybrimoe_jax.simulate.replay import replay
from hybrimoe_jax.simulate.synthetic import Knobs, chosen
from hybrimoe_jax.trace.columns import Trace
from hybrimoe_jax.trace.importers import open_trace
from hybrimoe_jax.trace.tokens import by_token

RANKS = 8
SKEWS = np.arange(0, 2.01, 0.1)
STAYS = np.arange(0, 0.96, 0.05)
FITTED_LAYERS, FITTED_TOKENS = 6, 4000


def link_beliefs(steps: int | None) -> list[dict]:
    """A link that slows down beside the CPU, planned with and without knowing: a record for each belief."""
    rows = []
    shape = get_shape("qwen2-57b-a14b")
    run = case(QWEN2, SYNTHETIC[QWEN2], Variant("hybrimoe"))
    tokens = tokens_of(run.trace)
    ((sequences, frequencies),) = samples(tokens, run)
    for name in ("h100-pcie5", "rtx4090-pcie4"):
        profile = load_profile(name)
        f = profile.figures
        truth = profile.costs(shape, "int4")
        for belief, factors in [
            ("both rates", {}),
            ("always the rate alone", {"link_bandwidth_cpu_busy": f.link_bandwidth / f.link_bandwidth_cpu_busy}),
            ("always the rate beside the CPU", {"link_bandwidth": f.link_bandwidth_cpu_busy / f.link_bandwidth}),
        ]:
            planner = Planner(
                "hybrimoe",
                shape.layers,
                shape.experts,
                shape.top_k,
                shape.experts // 4,
                profile.changed(**factors).costs(shape, "int4"),
                frequencies=frequencies,
            )
            result = replay(planner, VirtualMachine(truth), tokens.steps(sequences, steps))
            rows.append({"machine": name, "belief": belief, "seconds_per_token": result.seconds / len(result.steps)})
    return rows


def layer_similarity(trace: Trace) -> list[dict]:
    """A record for each distance: `cosine` is `Trace.similarity`, `named` is `Trace.recall`."""
    held = sorted(trace.lookahead)
    return [{"distance": d, "cosine": trace.similarity(d), "named": trace.recall(d)} for d in held]


def reuse_by_rank(traces: Mapping[str, str]) -> list[dict]:
    """Per trace, the chance that the expert of each rank (first the highest) is chosen by the next token too.

    A trace that has no ranks is named, and has no record.
    """
    rows = []
    for row, path in traces.items():
        try:
            rows.append({"trace": row, "share_by_rank": open_trace(path).reuse_by_rank()[:RANKS].tolist()})
        except UserError as error:
            say(f"{row}: {error}")
    return rows


def fitted_knobs(traces: Mapping[str, str]) -> list[dict]:
    """The skew and stay with which synthetic routing has a trace's popularity and overlap, and these two themselves.

    `hottest_quarter`: the share of uses that the most used quarter of a layer's experts has. `overlap`: the share of a
    token's experts that the token before chose. Popularity depends on the skew alone, so the skew is found first.
    """
    return [{"trace": row, **fit(open_trace(path))} for row, path in traces.items()]


def fit(trace: Trace) -> dict[str, Any]:
    """See `fitted_knobs`; `at_end` where the skew or stay is at the end of what was tried."""
    tokens, facts = by_token(trace), trace.facts
    size = min(FITTED_TOKENS, len(tokens.ids))
    wanted = statistics(tokens.ids[:size], tokens.sequence[:size], facts.experts)

    def made(skew: float, stay: float) -> tuple[float, float]:
        ids = chosen(FITTED_LAYERS, facts.experts, facts.top_k, size, size, Knobs(skew, stay, 0.0), 0)
        return statistics(ids, np.zeros(size), facts.experts)

    skew = float(np.interp(wanted[0], np.maximum.accumulate([made(s, 0.0)[0] for s in SKEWS]), SKEWS))
    stay = float(np.interp(wanted[1], np.maximum.accumulate([made(skew, a)[1] for a in STAYS]), STAYS))
    return {"hottest_quarter": wanted[0], "overlap": wanted[1], "skew": skew, "stay": stay, "tokens": size,
            "at_end": skew >= SKEWS[-1] or stay >= STAYS[-1] or stay <= 0}  # fmt: skip


def statistics(ids: np.ndarray, sequence: np.ndarray, experts: int) -> tuple[float, float]:
    """(share of the hottest quarter, overlap of neighbours) of ids [T, L, k]; -1: not recorded."""
    known = ids[:, :, 0] >= 0
    hottest = []
    for layer in range(ids.shape[1]):
        counts = np.sort(np.bincount(ids[known[:, layer], layer].ravel(), minlength=experts))[::-1]
        if counts.sum():
            hottest.append(counts[: max(1, round(experts / 4))].sum() / counts.sum())
    pairs = (sequence[1:] == sequence[:-1])[:, None] & known[1:] & known[:-1]
    shared = (ids[1:][pairs][:, :, None] == ids[:-1][pairs][:, None, :]).any(axis=2)
    return float(np.mean(hottest)), float(shared.mean())
