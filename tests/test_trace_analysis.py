"""What a trace says of its experts, against counting by hand; what it lacks is said by name."""

from __future__ import annotations

import dataclasses
import functools
import tracemalloc

import numpy as np
import pytest

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.trace import analysis
from hybrimoe_jax.trace.columns import Trace
from hybrimoe_jax.trace.export import export_trace
from hybrimoe_jax.trace.facts import TraceFacts
from hybrimoe_jax.trace.info import info
from hybrimoe_jax.trace.tokens import by_token

LAYERS, EXPERTS, K, SEQUENCES, LENGTH = 3, 6, 2, 2, 12


@pytest.fixture(scope="module")
def trace() -> Trace:
    """Two sequences that ran side by side, a token each a step, and lookahead at distances 1 and 2."""
    rng = np.random.default_rng(0)
    rows = [(t, l, s, t) for t in range(LENGTH) for l in range(LAYERS) for s in range(SEQUENCES)]
    step, layer, sequence, position = np.array(rows, np.int32).T
    scores = rng.dirichlet(np.full(EXPERTS, 0.5), len(rows)).astype(np.float32)
    ids = np.argsort(-scores, axis=1)[:, :K].astype(np.int32)[:, ::-1]  # not by score, as some files have them
    ahead = {d: rng.dirichlet(np.ones(EXPERTS), len(rows)).astype(np.float32) for d in (1, 2)}
    for d, values in ahead.items():
        values[layer + d >= LAYERS] = np.nan
    weights = np.take_along_axis(scores, ids, 1)
    phase = np.ones(len(rows), np.uint8)
    return Trace(
        TraceFacts("toy", LAYERS, EXPERTS, K), step, layer, phase, sequence, position, ids, weights, scores, ahead
    )


@pytest.fixture(scope="module")
def row(trace) -> dict:
    """The number of the row of (sequence, layer, position)."""
    return {key: n for n, key in enumerate(zip(*(a.tolist() for a in (trace.sequence, trace.layer, trace.position))))}


def neighbours(trace, row):
    return [(row[s, l, p - 1], n) for (s, l, p), n in row.items() if (s, l, p - 1) in row]


@pytest.mark.parametrize("full", [True, False])
def test_reuse_by_rank_counts_the_next_token_of_the_same_sequence(trace, row, full):
    seen = trace if full else dataclasses.replace(trace, scores=None)
    hits = []
    for before, here in neighbours(trace, row):
        order = sorted(range(EXPERTS), key=lambda e, n=before: -trace.scores[n][e])[: EXPERTS if full else K]
        hits.append([expert in trace.ids[here] for expert in order])
    assert seen.reuse_by_rank() == pytest.approx(np.mean(hits, axis=0))


def test_frequency_and_overlap_are_shares_of_tokens_by_layer(trace, row):
    shares = trace.frequency()
    assert shares.sum(axis=1) == pytest.approx([K] * LAYERS)
    for layer in range(LAYERS):
        tokens = trace.ids[trace.layer == layer].tolist()
        assert shares[layer, 4] == pytest.approx(sum(4 in ids for ids in tokens) / len(tokens))
        pairs = [(a, b) for a, b in neighbours(trace, row) if trace.layer[a] == layer]
        both = [len({*trace.ids[a].tolist()} & {*trace.ids[b].tolist()}) / K for a, b in pairs]
        assert analysis.overlap(trace)[layer] == pytest.approx(np.mean(both))


def test_reuse_distance_counts_distinct_experts_between(trace, row):
    counts, firsts = [0] * EXPERTS, 0
    for layer in range(LAYERS):
        walk = [set(trace.ids[row[s, layer, p]].tolist()) for s in range(SEQUENCES) for p in range(LENGTH)]
        for now, experts in enumerate(walk):
            for expert in experts:
                before = [t for t in range(now) if expert in walk[t]]
                firsts += not before
                if before:
                    counts[len(set().union(*walk[before[-1] + 1 : now]))] += 1
    found = trace.reuse_distance()
    assert found.counts.tolist() == counts and found.first_uses == firsts
    assert found.quantile(1) == max(n for n, count in enumerate(counts) if count)


@pytest.mark.parametrize("distance", [1, 2])
def test_recall_and_similarity_compare_a_prediction_with_the_layer_it_is_of(trace, row, distance):
    named, cosines = {}, {}
    for (s, l, p), n in row.items():
        if (s, l + distance, p) in row:
            there, ahead = row[s, l + distance, p], trace.lookahead[distance][n]
            best = set(sorted(range(EXPERTS), key=lambda e, a=ahead: -a[e])[:K])
            named.setdefault(l + distance, []).append(len(best & set(trace.ids[there].tolist())) / K)
            own = trace.scores[there]
            cosines.setdefault(l + distance, []).append(own @ ahead / np.sqrt(own @ own) / np.sqrt(ahead @ ahead))
    for whole, by_layer, expected in (
        (trace.recall, analysis.recall, named),
        (trace.similarity, analysis.similarity, cosines),
    ):
        assert whole(distance) == pytest.approx(np.mean(list(expected.values())))
        assert by_layer(trace, distance)[distance:] == pytest.approx([np.mean(expected[l]) for l in sorted(expected)])
        assert np.isnan(by_layer(trace, distance)[:distance]).all()


def test_the_table_has_a_row_for_each_layer_and_only_what_is_known(trace):
    rows = trace.table()
    assert list(rows["layer"]) == [0, 1, 2] and list(rows["tokens"]) == [SEQUENCES * LENGTH] * LAYERS
    assert list(rows["recall"])[1:] == pytest.approx(analysis.recall(trace, 1)[1:].tolist())
    bare = dataclasses.replace(trace, scores=None, weights=None, lookahead={}).select(trace.layer == 1)
    assert list(bare.table()["layer"]) == [1] and not {"recall", "similarity"} & {*bare.table().columns}


def test_a_figure_names_what_the_trace_lacks(trace):
    bare = dataclasses.replace(trace, scores=None, weights=None, lookahead={})
    single = trace.select(trace.position == 0)
    assert len(trace.select([])) == 0 and len(trace.select([-1, 0])) == 2
    for ask, said in {
        bare.reuse_by_rank: "neither the router's scores nor weights",
        single.reuse_by_rank: "no two neighbouring tokens",
        bare.recall: "no lookahead at distance 1 .held: none",
        lambda: trace.similarity(3): r"no lookahead at distance 3 \(held: 1, 2\)",
        dataclasses.replace(trace, scores=None).similarity: "no full router scores",
        **{
            functools.partial(ask, odd): "distance"
            for ask in (trace.recall, trace.similarity)
            for odd in ([1], {}, np.array([1]), 10**5000, "x", None)
        },
        **{
            functools.partial(trace.select, odd): "neither a mask of the [0-9]+ rows nor numbers"
            for odd in ("x", 2.5, None, [len(trace)], [-len(trace) - 1], [True], [[0]])
        },
        lambda: trace.reuse_distance().quantile(None): "share None is no number",
        lambda: trace.reuse_distance().quantile(2): "share 2.0 is outside",
        lambda: trace.save("\ud800"): "path .* is no file",
        lambda: trace.save(10**5000): "path .* is no file",
        lambda: export_trace(trace, None, "csv"): "path None",
        lambda: export_trace(trace, "x", {}): "layout {} is unknown",
    }.items():
        with pytest.raises(UserError, match=said):
            ask()


@pytest.mark.filterwarnings("error")
def test_of_nothing_a_figure_is_nan(trace):
    assert np.isnan(trace.select([0]).reuse_distance().quantile(0.5))
    nothing = dataclasses.replace(trace, lookahead={1: np.full_like(trace.scores, np.nan)})
    zeros = dataclasses.replace(trace, scores=np.zeros_like(trace.scores))
    assert np.isnan([nothing.recall(), nothing.similarity(), zeros.similarity()]).all()


def test_many_experts_a_token_are_counted_as_few_are(trace):
    rng = np.random.default_rng(1)
    last = rng.integers(-1, 9, (3, 40))
    before = np.take_along_axis(last, rng.permuted(np.tile(np.arange(40), (3, 1)), axis=1)[:, :30], 1)
    want = (last[:, None, :] > before[:, :, None]).sum(axis=2)
    assert np.array_equal(analysis._later(last, before), want)
    assert np.array_equal(analysis._later(last, before[:, :5]), want[:, :5])


def test_layers_that_do_not_occur_take_no_memory(trace):
    """A token a step in one of very many layers: a table of all layers would be a thousand times as large."""
    rows, facts = 20_000, TraceFacts("toy", 2**12, 2**8, 4)
    step = np.arange(rows, dtype=np.int32)
    ids = np.tile(np.arange(4, dtype=np.int32), (rows, 1))
    sparse = Trace(facts, step, step % facts.layers, np.ones(rows, np.uint8), 0 * step, step, ids)
    tracemalloc.start()
    figures = info(sparse)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert figures["reuse_distance"]["median"] == 0 and figures["overlap"] is None and peak < 2**28
    with pytest.raises(UserError, match=r"^t: only 20000 rows of 20000 tokens in 4096 layers"):
        by_token(sparse, "t")


def test_pictures_draw_what_the_numbers_are(trace):
    pytest.importorskip("matplotlib", reason="the extra `plots` is not installed").use("Agg")
    from matplotlib import pyplot

    chance = trace.plot.reuse_by_rank().lines[0].get_ydata()
    assert chance == pytest.approx(100 * trace.reuse_by_rank())
    cosines, named = (line.get_ydata() for line in trace.plot.similarity().lines[:2])
    assert cosines == pytest.approx([100 * trace.similarity(d) for d in (1, 2)])
    assert named == pytest.approx([100 * trace.recall(d) for d in (1, 2)])
    found = trace.reuse_distance()
    shares = trace.plot.reuse_distance().lines[0].get_ydata()
    assert shares[-1] == pytest.approx(100 - 100 * found.first_uses / trace.ids.size)
    assert np.array_equal(trace.plot.frequency().images[0].get_array(), 100 * trace.frequency())
    assert trace.plot.concentration().lines[0].get_ydata()[-1] == pytest.approx(100)
    pyplot.close("all")
