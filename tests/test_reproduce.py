"""`python -m hybrimoe_jax.reproduce`: the page, the records it is made from, and plain calculations beside them."""

import collections
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import golden
import numpy as np
import pytest

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.machine.profile import load_profile
from hybrimoe_jax.machine.shapes import get_shape
from hybrimoe_jax.records import read_records
from hybrimoe_jax.reproduce import __main__ as reproduce
from hybrimoe_jax.reproduce import analysis, experiments, figures, page, sayings, tables
from hybrimoe_jax.reproduce.sources import QWEN2, SYNTHETIC, TRACES, inputs
from hybrimoe_jax.simulate.grid import run_case
from hybrimoe_jax.simulate.records import versions
from hybrimoe_jax.simulate.synthetic import Knobs, chosen
from hybrimoe_jax.trace.columns import Trace
from hybrimoe_jax.trace.facts import facts_of
from hybrimoe_jax.trace.tokens import by_token

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("HYBRIMOE_DATA") or ROOT.parent / "shared" / "data")
AT_HAND = {row: str(DATA / path) for row, path in TRACES.items() if (DATA / path).is_file()}
RESULTS = reproduce.read_records(ROOT / "results")
FOUND = figures.Figures(RESULTS)
INTENT, PHONE = "deepseek-v2-lite, intent", "qwen3-30b-a3b"


def needs(row: str):
    return pytest.mark.skipif(row not in AT_HAND, reason=f"{TRACES[row]} is not at hand")


def test_the_paper_s_figures_are_those_of_the_paper():
    assert figures.NUMBERS["headline_speedup_over_ktransformers"] == {"prefill": 1.33, "decode": 1.70}
    assert figures.NUMBERS["table_iii_qwen2_cache25_seconds"]["decode"]["all"] == 0.11


def test_the_committed_page_is_that_of_the_committed_records():
    text = (ROOT / "docs/reproduction.md").read_text(encoding="utf-8")
    assert text == page.page(RESULTS), "run `python -m hybrimoe_jax.reproduce --text-only`"
    assert {"decode", "prefill", "ablation", "hits", "placement", "knobs", "inputs"} <= RESULTS.keys()
    assert page.NOT_RUN not in text or not set(reproduce.NAMES) <= RESULTS.keys()
    rows = [line for line in text.splitlines() if re.match(r"\| (mixtral|qwen2)", line)]
    assert rows and all("(synthetic)" in row for row in rows)
    assert "It is not a measurement of that machine" in text


def test_every_committed_record_is_one_of_ours():
    for path in (ROOT / "results").glob("*.jsonl"):
        for record in read_records(path):
            if record["kind"] == f"hybrimoe-jax reproduction {path.stem}":
                golden.check(record)
            else:
                assert record["kind"] == "hybrimoe-jax simulation"


def test_every_place_of_the_text_is_filled_from_the_records_and_every_table_is_shown():
    found = page.places(page.TEXT.read_text(encoding="utf-8"))
    shown = {place.removeprefix(page.TABLE) for place in found if place.startswith(page.TABLE)}
    assert shown == {*tables.TABLES, "standing"}
    names = {place.split("|")[0] for place in found if not place.startswith(page.TABLE)}
    assert names == set(sayings.SAYINGS)


def test_no_number_of_the_text_is_typed_by_hand():
    """But for those of settings and of names."""
    text = page.TEXT.read_text(encoding="utf-8")
    for kept in (page.PLACE, re.compile(r"^    .*$", re.MULTILINE), re.compile(r"`[^`]*`|\]\([^)]*\)")):
        text = kept.sub("", text)
    names = (
        r"(deepseek-v2-lite|gpt-oss-20b|qwen3-30b-a3b|mixtral-8x7b|qwen2-57b-a14b|DeepSeek-V2-Lite|Qwen2-57B|Qwen2)",
        r"arXiv 2504.05897|DAC 2025|PCIe 3.0|\(paper: figure \d\)|\(0: no prefetch\)|says \"n = 4\"|below 1: slower",
        r"9 million parameters, 6 layers|4 bits|95 %|[aA]t (25|75) %|of load 1 take",
        r"^### a6000-\w+$|batches of 32 and more",
        r"at 32 tokens|at 1024\b|^### Why more than the paper's.*$|synthetic, 25 %|without prefetch, 25 %|token, 25 %",
    )
    left = re.sub("|".join(names), "", text, flags=re.MULTILINE)
    assert re.findall(r".*\d.*", left) == []


def test_what_the_text_says_without_numbers_is_so():
    """Sentences that name an order, each against the records."""
    decode = [row for row in FOUND.rows("decode") if row not in SYNTHETIC]
    for row in decode:  # on-demand is among the slowest where the link is slow and the CPU is not
        engineered = {
            name: figures.seconds(FOUND.get("decode", name, row, "a6000-engineered"))
            for name in ("hybrimoe", "ktransformers", "on-demand")
        }
        assert engineered["on-demand"] == max(engineered.values())
    for row in FOUND.rows("ablation"):  # either part alone is faster than the baseline
        base, *alone = (FOUND.get("ablation", name, row) for name in ("baseline", "+scheduling", "+prefetching"))
        assert all(figures.seconds(one) < figures.seconds(base) for one in alone)
    for row in sayings.standing_rows(FOUND, "alpha") if "alpha" in RESULTS else ():  # echo has more than any alpha
        echo = figures.hit_rate(FOUND.get("hits", "echo", row))
        assert all(echo > figures.hit_rate(FOUND.get("alpha", f"hits {a:g}", row)) for a in experiments.ALPHAS)
    assert max(sayings.knob_gains(FOUND)) < sayings.paper_gained()["qwen2"]
    assert all(np.diff(r["share_by_rank"]).max() < 0 for r in RESULTS["reuse"] if r["trace"] in TRACES)
    for profile in experiments.PROFILES:
        for row in sayings.standing_rows(FOUND, "prefill"):
            pairs = (
                [FOUND.get("prefill", n, row, profile, prompt=length) for n in ("ktransformers", "hybrimoe")]
                for length in experiments.LENGTHS
            )
            assert np.diff([figures.speedup(*pair) for pair in pairs]).min() > 0, "the lead grows with the length"


def test_the_records_are_of_the_inputs_that_are_here():
    kept = {r["input"]: r["sha256"] for r in RESULTS["inputs"]}
    assert set(TRACES) <= kept.keys()
    for found in inputs(AT_HAND):
        assert kept[found["input"]] == found["sha256"], f"{found['input']} has changed: run `reproduce` again"


@pytest.mark.parametrize(
    ("experiment", "run", "row"),
    [
        pytest.param("decode", "ktransformers", PHONE, marks=needs(PHONE)),
        ("decode", "llamacpp", "mixtral-8x7b (synthetic)"),
    ],
)
def test_a_run_again_gives_the_committed_record(experiment, run, row):
    runs = experiments.all_runs(AT_HAND)[experiment]
    case = next(case for name, case in runs if (name, case.name) == (run, row))
    record, kept = run_case(case), FOUND.get(experiment, run, row)
    for name in ("hits", "misses", "cpu_experts", "demand_fetches", "steps", "by_sequence"):
        assert record[name] == kept[name]
    assert figures.seconds(record) == pytest.approx(figures.seconds(kept), rel=1e-9)


@functools.cache
def replayed(row: str) -> tuple[Trace, np.ndarray, np.ndarray, np.ndarray]:
    """(trace, ids [T, L, k], weights, whether each token is replayed): 16 sequences, evenly spread."""
    from hybrimoe_jax.trace.importers import open_trace

    trace = open_trace(AT_HAND[row])
    tokens = by_token(trace)
    names = np.unique(tokens.sequence)
    assert tokens.weights is not None
    return trace, tokens.ids, tokens.weights, np.isin(tokens.sequence, names[np.arange(16) * len(names) // 16])


@needs(INTENT)
def test_lru_by_brute_force_has_the_hits_of_the_record():
    trace, ids, _, mine = replayed(INTENT)
    slots, hits = trace.facts.experts // 4, 0
    caches = [collections.OrderedDict() for _ in range(trace.facts.layers)]
    for token in ids[mine].tolist():
        for cache, wanted in zip(caches, token):
            hits += sum(expert in cache for expert in wanted)
            for expert in wanted:
                cache[expert] = None
                cache.move_to_end(expert)
            while len(cache) > slots:
                cache.popitem(last=False)
    # experts of one token are equally old: which of them goes first is up to each
    assert hits == pytest.approx(FOUND.get("hits", "lru", INTENT)["hits"], rel=5e-4)


@needs(INTENT)
def test_mrs_by_its_formula_has_the_hits_of_the_record():
    """S <- alpha TopP(s) + (1 - alpha) S, p = k here; the lowest S makes room, of equal ones the oldest use."""
    trace, ids, weights, mine = replayed(INTENT)
    slots, hits = trace.facts.experts // 4, 0
    layers = np.arange(trace.facts.layers)
    heat = np.zeros((len(layers), trace.facts.experts))
    used = np.full(heat.shape, -1)
    held: list[set[int]] = [set() for _ in layers]
    for time, (token, weight) in enumerate(zip(ids[mine], weights[mine])):
        heat *= 0.5
        heat[layers[:, None], token] += 0.5 * weight.astype(float)
        used[layers[:, None], token] = time
        for layer, wanted in enumerate(token.tolist()):
            hits += sum(expert in held[layer] for expert in wanted)
            held[layer].update(wanted)
            spare = sorted(held[layer] - set(wanted), key=lambda e: (heat[layer, e], used[layer, e]))
            held[layer].difference_update(spare[: max(0, len(held[layer]) - slots)])
    assert hits == pytest.approx(FOUND.get("hits", "mrs", INTENT)["hits"], rel=5e-4)


@needs(INTENT)
def test_ktransformers_by_counting_takes_the_time_of_the_record():
    """The most used experts of the other sequences stay; a layer ends with the slower of CPU and device."""
    trace, ids, _, mine = replayed(INTENT)
    costs = load_profile("a6000-paper").costs(get_shape("deepseek-v2-lite"), "int4")
    seconds = hits = 0
    here = np.zeros((trace.facts.layers, trace.facts.experts), bool)
    for layer in range(trace.facts.layers):
        counts = np.bincount(ids[~mine, layer].ravel(), minlength=trace.facts.experts)
        here[layer, np.argsort(-counts, kind="stable")[: trace.facts.experts // 4]] = True
    found = here[np.arange(trace.facts.layers)[:, None], ids[mine]].sum(axis=2)  # [T, L] residents among a token's
    positions = by_token(trace).position[mine]
    for context, layers in zip(positions.tolist(), found.tolist()):
        seconds += costs.step(1)
        for there in layers:
            missing = trace.facts.top_k - there
            cpu = costs.cpu(1, True) + (missing - 1) * costs.cpu(1) if missing else 0.0
            seconds += costs.layer(1, context + 1) + max(cpu, costs.shared(1) + there * costs.device(1))
            hits += there
    kept = FOUND.get("decode", "ktransformers", INTENT)
    assert hits == kept["hits"]
    assert seconds / mine.sum() == pytest.approx(figures.seconds(kept), rel=1e-6)


def record(seconds: list[float], steps: list[int]) -> dict:
    return {
        "seconds_per_step": {"mean": sum(seconds) / sum(steps)},
        "sequences": len(steps),
        "by_sequence": {"seconds": seconds, "steps": steps},
    }


def test_an_interval_needs_enough_sequences_and_pairs_them():
    slow, fast = record([4.0, 9.0], [2, 3]), record([2.0, 3.0], [2, 3])
    assert figures.said_speedup(slow, fast) == "2.60x (n = 2)"
    steps = [1, 2, 3, 4, 5, 6, 7, 8]
    noisy = [float(n) ** 2 for n in steps]
    twice = figures.said_speedup(record([2 * s for s in noisy], steps), record(noisy, steps))
    assert twice == "2.00x (2.00 to 2.00)", "the same sequences for both: their noise falls out"


def test_the_knobs_of_a_trace_are_found_again():
    ids = chosen(4, 32, 4, 1500, 1500, Knobs(0.6, 0.5, 0.0), seed=3).astype(np.int32)
    tokens, layers, k = ids.shape
    count = np.repeat(np.arange(tokens, dtype=np.int32), layers)
    trace = Trace(
        facts_of("toy", layers, 32, k, 8, 8), count, np.tile(np.arange(layers, dtype=np.int32), tokens),
        np.ones(len(count), np.uint8), np.zeros(len(count), np.int32), count, ids.reshape(-1, k),
    )  # fmt: skip
    found = analysis.fit(trace)
    assert found["skew"] == pytest.approx(0.6, abs=0.12) and found["stay"] == pytest.approx(0.5, abs=0.06)


def test_without_records_the_page_says_so_in_every_place(tmp_path, capsys):
    docs = tmp_path / "r.md"
    assert reproduce.main(["--text-only", "--results", str(tmp_path / "none"), "--docs", str(docs)]) == 0
    said, text = capsys.readouterr(), docs.read_text()
    made = json.loads(said.out)
    assert made["runs"] == 0 and "has no records of them" in said.err
    golden.check(made)
    assert text.count(page.NOT_RUN) > 40 and "{{" not in text and "## Table III" in text


def test_bad_input_is_one_clear_error(tmp_path):
    page_flag = ["--docs", str(tmp_path / "r.md")]
    with pytest.raises(UserError, match="holds none of"):
        reproduce.main(["--data", str(tmp_path), "--results", str(tmp_path / "x"), *page_flag])
    with pytest.raises(UserError, match="no experiment 'decoding'"):
        reproduce.main(["--only", "decoding", *page_flag])
    with pytest.raises(UserError, match="there is no folder"):
        reproduce.main(["--docs", str(tmp_path / "no" / "r.md")])
    (tmp_path / "hits.jsonl").write_text("no record\n")
    with pytest.raises(UserError, match=r"hits.jsonl: not a file of records"):
        reproduce.main(["--text-only", "--results", str(tmp_path), *page_flag])
    (tmp_path / "hits.jsonl").unlink()
    (tmp_path / "similarity.jsonl").write_text('{"kind": "hybrimoe-jax reproduction similarity", "version": 1}\n')
    with pytest.raises(UserError, match=r"a record cannot be read.*KeyError"):
        reproduce.main(["--text-only", "--results", str(tmp_path), *page_flag])
    assert not (tmp_path / "r.md").exists()


def test_a_trace_without_what_a_figure_needs_is_named(tmp_path, capsys):
    from hybrimoe_jax.trace.recorder import TraceRecorder

    recorder = TraceRecorder(facts_of("toy", 2, 8, 2, 8, 8), clock="wall")
    for position in range(3):
        recorder.next_step()
        for layer in range(2):
            recorder.add(layer, "decode", sequence=[0], position=[position], ids=[[position, position + 1]])
    recorder.save(tmp_path / "bare.npz")
    assert analysis.reuse_by_rank({"mine": str(tmp_path / "bare.npz")}) == []
    assert "mine: reuse by rank: the trace holds neither" in capsys.readouterr().err


def test_an_experiment_is_written_as_soon_as_its_runs_are_done():
    case = experiments.case(QWEN2, SYNTHETIC[QWEN2], experiments.Variant("cpu-only"), steps=2)
    other = experiments.case(QWEN2, SYNTHETIC[QWEN2], experiments.Variant("ktransformers"), steps=2)
    found = dict(reproduce.simulated({"one": [("a", case), ("b", case)], "two": [("c", other)]}, jobs=1))
    assert list(found) == ["one", "two"] and [r["run"] for r in found["one"]] == ["a", "b"]
    assert found["one"][0]["by_sequence"] == found["one"][1]["by_sequence"] and "costs" not in found["one"][0]


def test_the_figures_of_the_repository_are_hashed():
    (found,) = [r for r in inputs({}) if r["input"] == "paper-numbers.json"]
    path = ROOT / "hybrimoe_jax/reproduce/paper-numbers.json"
    assert found["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.slow
def test_one_command_writes_page_and_records(tmp_path):
    """Every experiment on synthetic routing alone, and the bundled model's own rows; minutes."""
    (tmp_path / "data").mkdir()
    docs, results = tmp_path / "r.md", tmp_path / "results"
    flags = ["--steps", "3", "--docs", str(docs), "--results", str(results)]
    done = subprocess.run(
        [sys.executable, "-m", "hybrimoe_jax.reproduce", *flags],
        capture_output=True, text=True, timeout=1500, cwd=tmp_path,
        env={**os.environ, "HYBRIMOE_DATA": str(tmp_path / "data")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["clock"] == "virtual" and "left out" in done.stderr
    text = docs.read_text()
    assert "## Table III" in text and "| gpt-oss-20b | 25% |" not in text
    for name in ("decode", "prefill", "ablation", "hits", "depth", "rules"):
        records = [json.loads(line) for line in (results / f"{name}.jsonl").read_text().splitlines()]
        assert records and all(r["clock"] == "virtual" and r["versions"] == versions() for r in records)
    live = [json.loads(line) for line in (results / "live.jsonl").read_text().splitlines()]
    assert {r["way"] for r in live} == {"measured", "paced", "computed"}
    assert len({json.dumps(r["tokens"]) for r in live}) == 1, "placement never changes an answer"
