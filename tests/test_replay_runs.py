"""`replay`: the simulator as one function, its runs as a table and pictures."""

from __future__ import annotations

import json

import numpy as np
import pytest

import hybrimoe_jax
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.simulate import grid
from hybrimoe_jax.simulate.cases import Case
from hybrimoe_jax.trace.facts import facts_of
from hybrimoe_jax.trace.file import save_trace
from hybrimoe_jax.trace.recorder import TraceRecorder

LAYERS, EXPERTS, TOP_K, TOKENS = 6, 32, 4, 10


@pytest.fixture(scope="module")
def trace():
    """Two sequences of the bundled model's shape."""
    rng = np.random.default_rng(0)
    recorder = TraceRecorder(facts_of("qwen2_moe", LAYERS, EXPERTS, TOP_K, 192, 64), clock="none")
    for token in range(2 * TOKENS):
        recorder.next_step()
        for layer in range(LAYERS):
            scores = rng.dirichlet(np.full(EXPERTS, 0.3))[None].astype(np.float32)
            ids = np.argsort(-scores, axis=1)[:, :TOP_K]
            where = {"sequence": [token // TOKENS], "position": [token % TOKENS]}
            recorder.add(layer, "decode", ids=ids, weights=np.take_along_axis(scores, ids, 1), scores=scores, **where)
    return recorder.trace()


@pytest.fixture(scope="module")
def runs(trace):
    return hybrimoe_jax.replay(trace, machine="a6000-paper", ratios=[0.25, 0.5], systems=["hybrimoe", "ktransformers"])


def test_its_figures_are_the_simulator_s(runs, trace, tmp_path):
    save_trace(trace, tmp_path / "t.npz")
    for record in runs:
        case = Case(str(tmp_path / "t.npz"), "a6000-paper", record["system"], record["cache_ratio"])
        same = grid.run_case(case)
        for name in ("seconds_per_step", "hit_rate", "bytes_h2d", "prefetch", "bound_seconds_per_step", "rows"):
            assert record[name] == same[name]


def test_a_table_has_a_row_a_run(runs):
    table = runs.table()
    assert list(table["system"]) == ["hybrimoe", "ktransformers"] * 2
    assert list(table["cache_ratio"]) == [0.25, 0.25, 0.5, 0.5]
    for row, record in enumerate(runs):
        assert table["ms"][row] == 1e3 * record["seconds_per_step"]["mean"]
        assert table["ms_low"][row] <= table["ms_high"][row] and table["bound_ms"][row] <= table["ms"][row]
    assert set(table["trace"]) == {"trace"}
    assert set(table["clock"]) == {"virtual"} and set(table["machine"]) == {"a6000-paper"}
    assert "simulated times" in str(runs) and "<table>" in runs._repr_html_()
    assert repr(runs) == "<Runs: 4 of hybrimoe, ktransformers on a6000-paper, virtual clock>"


def test_runs_are_chosen_and_saved(runs, tmp_path):
    half = runs.where(cache_ratio=0.5)
    assert [record["system"] for record in half] == ["hybrimoe", "ktransformers"]
    half.save(tmp_path / "runs.jsonl")
    assert [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()] == half.records
    lanes = half.timeline(steps=1).lanes
    assert lanes[0] == "hybrimoe cpu" and len(lanes) == 6


def test_pictures_compare_what_can_be_compared(runs, trace):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    axes = runs.plot.tbt()
    assert axes.get_ylabel() == "TBT [ms], simulated"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["lower bound", "hybrimoe", "ktransformers"]
    assert [bars.get_label() for bars in runs.plot.lanes().containers] == ["cpu", "device", "link"]
    assert runs.plot.hit_rate().get_ylabel() == "hit rate [%]"
    pyplot.close("all")
    with pytest.raises(UserError, match="none of these runs"):
        runs.plot.ttft()
    both = hybrimoe_jax.Runs([*runs, *({**record, "start": "cold"} for record in runs)])
    with pytest.raises(UserError, match=r"several starts.*where\(start="):
        both.plot.tbt()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"systems": "nonsense"}, "nonsense"),
        ({"machine": "nonsense"}, "nonsense"),
        ({"ratios": 1.5}, "1.5"),
        ({"ratios": []}, "nothing to replay"),
        ({"jobs": 0}, "jobs 0"),
        ({"cash": "lru"}, "no 'cash'"),
        ({"starts": "luke"}, "luke"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(given, said, trace):
    with pytest.raises(UserError, match=said):
        hybrimoe_jax.replay(trace, **given)
