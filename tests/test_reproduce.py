"""`python -m hybrimoe_jax.reproduce`: the document and the records it stands on."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.reproduce import __main__ as reproduce
from hybrimoe_jax.reproduce import experiments, tables
from hybrimoe_jax.simulate.records import versions
from hybrimoe_jax.trace.facts import facts_of
from hybrimoe_jax.trace.file import Trace

ROOT = Path(__file__).parents[1]


def test_the_paper_s_figures_are_those_of_the_paper():
    paper = tables.PAPER
    assert paper["headline_speedup_over_ktransformers"] == {"prefill": 1.33, "decode": 1.70}
    assert paper["table_iii_qwen2_cache25_seconds"]["decode"]["all"] == 0.11


def test_cases_are_in_the_order_that_the_tables_read_them():
    cases = experiments.all_cases({}, 5)
    block = [(case.parts, case.blind) for case in cases["ablation"][: len(experiments.VARIANTS)]]
    assert block == [(parts, blind) for _, parts, blind in experiments.VARIANTS.values()]
    assert {case.prompt for case in cases["ablation"][: len(block)]} == {None}
    assert all(case.trace.startswith("synthetic:") for rows in cases.values() for case in rows)


def test_no_prefetch_at_depth_zero():
    from hybrimoe_jax.simulate.cases import Case
    from hybrimoe_jax.simulate.grid import run_case

    counts = [
        run_case(
            Case(
                experiments.QWEN, "a6000-paper", "hybrimoe", 0.25, parts=(("lookahead", d), ("prefetch", "impact")),
                steps=4,
            )
        )["prefetch"]["issued"]
        for d in (0, 3)
    ]  # fmt: skip
    assert counts[0] == 0 < counts[1]


def test_the_committed_document_holds_every_section_and_marks_what_is_synthetic():
    text = (ROOT / "docs/reproduction.md").read_text(encoding="utf-8")
    for heading in ("Decoding", "Reading prompts", "Table III", "Hit rates", "Characterisation", "open questions"):
        assert re.search(rf"^## .*{heading}", text, re.MULTILINE)
    rows = [line for line in text.splitlines() if line.startswith(("| mixtral", "| qwen2"))]
    assert rows and all("(synthetic)" in row for row in rows)
    assert "simulated" in text and "none is measured" in text


def test_the_committed_tables_are_those_of_the_committed_records():
    text = (ROOT / "docs/reproduction.md").read_text(encoding="utf-8")
    made = tables.all_tables(reproduce.read_records(ROOT / "results"))
    assert sorted(tables.places(text)) == sorted(made) == sorted([*tables.TABLES, "costs"])
    assert tables.renewed(text, made) == text


def test_tables_are_renewed_in_their_places_and_nothing_else(tmp_path, capsys):
    (docs := tmp_path / "r.md").write_text(
        "As\n<!-- table: costs -->\nold\n<!-- end -->\nit\n<!-- table: hits -->\nkept\n<!-- end -->\nis\n"
    )
    assert reproduce.main(["--tables-only", "--results", str(tmp_path / "none"), "--docs", str(docs)]) == 0
    said, text = capsys.readouterr(), docs.read_text()
    assert json.loads(said.out)["runs"] == 0 and "table hits" in said.err and "table costs" not in said.err
    assert text == f"As\n<!-- table: costs -->\n\n{tables.costs()}\n" + text[text.index("<!-- end -->") :]
    assert text.endswith("\nit\n<!-- table: hits -->\nkept\n<!-- end -->\nis\n")


def test_a_document_without_places_is_one_clear_error(tmp_path):
    (tmp_path / "plain.md").write_text("no table\n")
    for name, said in (("plain.md", "no place for a table"), ("none.md", "cannot be read")):
        with pytest.raises(UserError, match=said):
            reproduce.main(["--tables-only", "--docs", str(tmp_path / name)])


@pytest.mark.slow
def test_one_command_writes_document_and_records(tmp_path):
    """About a minute: every experiment on synthetic routing alone."""
    (tmp_path / "data").mkdir()
    docs, results = tmp_path / "r.md", tmp_path / "results"
    shutil.copy(ROOT / "docs/reproduction.md", docs)
    flags = ["--steps", "3", "--docs", str(docs), "--results", str(results)]
    done = subprocess.run(
        [sys.executable, "-m", "hybrimoe_jax.reproduce", *flags],
        capture_output=True, text=True, timeout=900, cwd=tmp_path,
        env={"HYBRIMOE_DATA": str(tmp_path / "data"), "PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["clock"] == "virtual" and "left out" in done.stderr
    text = docs.read_text()
    assert "## Table III" in text and "deepseek-v2-lite |" not in text.split("## Characterisation")[0]
    for name in ("decode", "prefill", "ablation", "hits", "depth", "rules"):
        records = [json.loads(line) for line in (results / f"{name}.jsonl").read_text().splitlines()]
        assert records and all(r["clock"] == "virtual" and r["versions"] == versions() for r in records)


def test_a_folder_without_traces_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match="holds none of"):
        reproduce.main(["--data", str(tmp_path), "--docs", str(tmp_path / "r.md")])
    with pytest.raises(UserError, match="there is no folder"):
        reproduce.main(["--docs", str(tmp_path / "no" / "r.md")])


def test_a_router_that_sees_the_same_state_is_like_itself_and_one_that_sees_noise_is_not():
    rng = np.random.default_rng(0)
    layers, experts, tokens, k = 3, 16, 40, 2
    scores = rng.dirichlet(np.full(experts, 0.3), (tokens, layers)).astype(np.float32)
    ids = np.argsort(-scores, axis=2)[:, :, :k]
    noise = rng.dirichlet(np.full(experts, 0.3), (tokens, layers)).astype(np.float32)
    ahead = {1: np.roll(scores, -1, axis=1), 2: noise}  # what the next layer will say itself; nothing of the one after
    flat = lambda a: a.reshape(tokens * layers, -1)  # noqa: E731
    trace = Trace(
        facts_of("toy", layers, experts, k, 8, 8),
        np.repeat(np.arange(tokens), layers).astype(np.int32),
        np.tile(np.arange(layers), tokens).astype(np.int32),
        np.ones(tokens * layers, np.uint8),
        np.zeros(tokens * layers, np.int32),
        np.repeat(np.arange(tokens), layers).astype(np.int32),
        flat(ids).astype(np.int32),
        scores=flat(scores),
        lookahead={d: flat(a) for d, a in ahead.items()},
    )
    near, far = experiments.layer_similarity(trace)
    assert near == {"distance": 1, "cosine": pytest.approx(1, abs=1e-5), "named": 1}
    assert far["cosine"] < 0.7 and far["named"] < 0.5
