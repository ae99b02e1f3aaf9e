"""`bench cache` as a user runs it, and a policy of one's own, live and in replay."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import golden
import numpy as np
import pytest
import tiny
from grids import few
from public_traces import ESFT, esft_folder, routing, shared

from hybrimoe_jax.__main__ import command_main
from hybrimoe_jax.bench import cache as bench
from hybrimoe_jax.trace.facts import TraceFacts
from hybrimoe_jax.trace.recorder import TraceRecorder

OWN = """
from hybrimoe_jax.decide import CachePolicy

class Oldest(CachePolicy):
    def update(self, scores, loads):
        for expert in loads:
            self.heat[expert] = self.step
"""


def run(*arguments, cwd, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "hybrimoe_jax.bench", "cache", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=300,
        env={**os.environ, "PYTHONWARNINGS": "error"},
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def small_trace(path, tokens=30, gap=None):
    """A trace of ours with all scores: 2 sequences, 2 layers, 8 experts, top-2; layer 1 of token `gap` was not
    recorded."""
    rng = np.random.default_rng(0)
    recorder = TraceRecorder(TraceFacts("tiny", 2, 8, 2))
    for token in range(tokens):
        recorder.next_step()
        for layer in range(2):
            if (token, layer) == (gap, 1):
                continue
            scores = rng.dirichlet(np.ones(8) / 2)[None]
            ids = np.argsort(-scores, axis=1)[:, :2]
            chosen = np.take_along_axis(scores, ids, 1)
            recorder.add(
                layer, "decode", sequence=[token % 2], position=[token // 2], ids=ids, weights=chosen, scores=scores
            )
    recorder.save(path)
    return path


def test_the_table_and_the_line_for_programs(tmp_path):
    ids, weights = routing(ESFT, 24)
    trace = esft_folder(tmp_path / "esft", ids, weights, [14, 10])
    done = run("--trace", trace, "--ratios", "0.125,0.5", "--jobs", "2", cwd=tmp_path)
    said = json.loads(done.stdout.splitlines()[-1])
    golden.check(said)
    record = said["traces"]
    assert list(record) == [str(trace)] and list(record[str(trace)]) == ["0.125", "0.5"]
    row = record[str(trace)]["0.5"]
    assert set(row) == {*(spec.partition(":")[0] for spec in bench.DEFAULT)}
    for entry in row.values():
        assert entry["hits"] + entry["misses"] == 24 * 26 * 6
        assert entry["bypass"]["hits"] + entry["bypass"]["misses"] == 24 * 26 * 6
        assert entry["misses"] >= row["belady"]["misses"] >= row["belady"]["bypass"]["misses"]
        assert entry["bypass"]["bypassed"] <= entry["bypass"]["misses"]
        gap = row["mrs"]["misses"] - row["belady"]["misses"]
        assert entry["gap_closed"] == pytest.approx((row["mrs"]["misses"] - entry["misses"]) / gap, abs=1e-4)
    assert re.search(r"^echo +[\d.]+ +\(-?\d+\) \| [\d.]+", done.stdout, re.MULTILINE)
    assert "MRS has p = k" in done.stdout


def test_sequences_and_layers_are_chosen_and_gaps_passed_over(tmp_path):
    trace = str(small_trace(tmp_path / "t.npz", gap=4))
    options = bench.Options((0.25,), ("lru", "mrs:alpha=0.3", "mrs:alpha=0.1"))

    def total(**changes):
        record = bench.run([trace], bench.dataclasses.replace(options, **changes))
        assert set(record[trace]["0.25"]) >= {"lru", "mrs:alpha=0.3"}
        return sum(record[trace]["0.25"]["lru"][key] for key in ("hits", "misses"))

    assert total() == 2 * (2 * 30 - 1)
    assert total(layers=1) == 2 * 30
    assert total(part="odd") == 2 * 2 * 15
    assert total(part="even", pooled=True) == 2 * (2 * 15 - 1)


def test_scores_of_all_experts_are_used_where_recorded(tmp_path, capsys):
    trace = str(small_trace(tmp_path / "t.npz"))
    bench.run([trace], bench.Options((0.5,), ("mrs",)))
    assert "p = k" not in capsys.readouterr().out
    first = next(bench.routing(trace, "all", None).visits())
    assert len(first.scores) == 8 and sum(first.scores) == pytest.approx(1, abs=1e-5) and min(first.scores) > 0


def test_a_policy_of_one_s_own(tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    trace = small_trace(tmp_path / "t.npz")
    done = run("--trace", trace, "--policies", "lru", "mine:Oldest", "--ratios", "0.5", cwd=tmp_path)
    row = json.loads(done.stdout.splitlines()[-1])["traces"][str(trace)]["0.5"]
    assert row["mine:Oldest"] == row["lru"] and row["lru"]["gap_closed"] is None
    from hybrimoe_jax.decide.systems import get_system
    from hybrimoe_jax.engine.config import EngineConfig

    sys.path.insert(0, str(tmp_path))
    try:
        assert EngineConfig(cache="mine:Oldest").cache == "mine:Oldest"
        assert get_system("on-demand").override(cache="mine:Oldest").cache == "mine:Oldest"
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("mine")


def test_a_policy_of_one_s_own_runs_live(tmp_path, monkeypatch):
    (tmp_path / "mine_live.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    prompts = tiny.prompts(tiny.weights("mixtral")[0], (9,), seed=1)
    found = []
    for policy in ("lru", "mine_live:Oldest"):
        engine = tiny.engine("mixtral", cache_ratio=0.5, system="on-demand", cache=policy)
        engine.generate(prompts, max_new_tokens=8)
        found.append((engine.stats.summary()["hits"], engine.stats.summary()["demand_fetches"]))
        engine.close()
    assert found[0] == found[1] and min(found[0]) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--trace", "none.npz"), "none.npz: cannot be read"),
        (("--trace", "t.npz", "--ratios", "0.5,x"), "--ratios '0.5,x'"),
        (("--trace", "t.npz", "--ratios", "0"), "above 0 and at most 1"),
        (("--trace", "t.npz", "--policies", "fifo"), "'fifo' is unknown"),
        (("--trace", "t.npz", "--policies", "nowhere:X"), "importing nowhere failed"),
        (("--trace", "t.npz", "--jobs", "0"), "--jobs must be at least 1"),
        (
            ("--trace", "t.npz", "one.npz", "--policies", "static"),
            "one.npz: no policy can be measured (static: it is counted on other",
        ),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, message, in_process):
    small_trace(tmp_path / "t.npz", tokens=4)
    small_trace(tmp_path / "one.npz", tokens=1)
    words = [tmp_path / word if word.endswith(".npz") else word for word in arguments]
    if "0.5,x" in arguments:
        done = run(*words, cwd=tmp_path, code=2)
    else:
        done = in_process(command_main("bench"), "cache", *words)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1 and not done.stdout


@pytest.mark.parametrize("task", few(["intent"], ["law", "intent"]))
def test_echo_beats_the_known_policies_on_real_routing(task):
    """The first 2500 tokens and six layers, where it has not seen much yet; misses below those of every known
    policy."""
    path = str(shared(f"trace-deepseek-v2-lite-esft/{task}.npz"))
    trace = bench.Routing(path, "all", 6)
    trace.ids, trace.weights = trace.ids[:2500], trace.weights[:2500]
    bench.routing.cache_clear()
    misses = {}
    for name in ("lru", "lfu:decay=0.99", "mrs:alpha=0.05", "echo"):
        policies = bench.build_policies(name, 64, [16] * 6, 6)
        misses[name] = bench.replay(policies, trace.visits(), [bench.cache_of(policies, 16)])[0].misses
    assert misses["echo"] < 0.97 * min(count for name, count in misses.items() if name != "echo")
