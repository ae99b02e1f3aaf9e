"""What a GPU is asked, on the CPU backend: every part runs, keeps to its time, and its figures reach the decisions."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"


@pytest.fixture
def script(monkeypatch):
    """A module of scripts/, by its name."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module


def call(out: Path, *words: str, python: str = sys.executable) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OUT": str(out), "PYTHON": python, "JAX_PLATFORMS": "cpu"}
    command = ["bash", str(SCRIPTS / "gpu_checks.sh"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=out)


@pytest.mark.slow
def test_a_dry_run_fills_the_figures_of_a_call(tmp_path):
    """Two parts by themselves; `--slow` runs both calls whole."""
    done = call(tmp_path, "first", "environment", "transfers", "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "first.json").read_text())
    assert record["platform"] == "cpu" and record["parts"]["environment"]["said"] == "passed"
    assert record["facts"]["environment"]["jax"] and record["parts"]["transfers"]["said"] == "passed"
    assert {name.split(":")[0].partition(", ")[2] for name in record["facts"]["transfer"] if "landed" in name} == {
        "put, compute",
        "compute, put",
    }
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {decision["verdict"] for decision in summary["decisions"]} == {"not taken"}
    assert "missing: nothing" in (tmp_path / "first.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["first", "second"])
def test_a_dry_run_of_a_whole_call(name, tmp_path, script):
    done = call(tmp_path, name, "--dry-run")
    assert done.returncode == 0, done.stdout + (tmp_path / f"{name}.txt").read_text()[-3000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["dry_run"] and set(summary["parts"]) == {part.name for part in script("gpu_checks").PARTS[name]}
    needs_gpu = {"registered memory", "mapped memory", "order of copies", "overlap", "budget", "workspace"}
    seen = {decision["decision"] for decision in summary["decisions"] if decision["figures"]}
    second = {"exactness", "out of memory", "tests"}
    every = {decision.name for decision in script("gpu_decisions").DECISIONS}
    assert seen == (second if name == "second" else every - second - needs_gpu)


def test_a_part_that_fails_or_hangs_stops_no_other(tmp_path, script, monkeypatch, capsys):
    checks = script("gpu_checks")
    report = "import sys; sys.path.insert(0, 'scripts'); from gpu_report import report; from pathlib import Path; "
    told = report + "report(Path('{json}'), dict(dispatch=dict(x=1)), dict(platform='gpu', device='card')); "
    parts = (
        checks.Part("broken", 20, ("-c", "raise SystemExit(3)"), ()),
        checks.Part("hangs", 3, ("-c", told + "import time; time.sleep(60)"), ()),
        checks.Part("good", 20, ("-c", "print('done')"), ()),
    )
    monkeypatch.setitem(checks.PARTS, "first", parts)
    assert not checks.Call("first", tmp_path, False, []).run()
    record = json.loads((tmp_path / "first.json").read_text())
    assert [part["said"] for part in record["parts"].values()] == ["FAILED (exit 3)", "stopped after 3 s", "passed"]
    assert record["facts"] == {"dispatch": {"x": 1}} and record["platform"] == "gpu"
    assert "hangs: stopped after 3 s" in capsys.readouterr().out


def test_a_call_that_is_late_leaves_parts_out(tmp_path, script, monkeypatch):
    checks = script("gpu_checks")
    monkeypatch.setitem(checks.CALLS, "first", checks.MARGIN_S + 1)
    monkeypatch.setitem(checks.PARTS, "first", (checks.Part("late", 20, ("-c", ""), ()),))
    assert not checks.Call("first", tmp_path, False, []).run()
    assert json.loads((tmp_path / "first.json").read_text())["parts"]["late"]["said"] == "left out: no time"


def test_figures_confirm_or_refute(script):
    decisions = script("gpu_decisions")
    facts = {"dispatch": {"issuing one program (us)": 9.0, "front, ids read, experts (us)": 70.0}}
    facts["cells"] = {"passed": 3, "failed": 1}
    verdicts = {record["decision"]: record["verdict"] for record in decisions.judge(facts, "gpu")}
    assert verdicts["dispatch"] == "confirmed" and verdicts["exactness"] == "refuted"
    assert verdicts["overlap"] == verdicts["budget"] == "not taken"
    assert {record["verdict"] for record in decisions.judge(facts, "cpu")} == {"not taken"}


def test_both_calls_are_put_together(tmp_path, script):
    checks, about = script("gpu_checks"), {"device": "card", "platform": "gpu", "dry_run": False, "parts": {}}
    for name, facts in (("first", {"x": {"y": 1}}), ("second", {"tests": {"passed": 5, "failed": 0}})):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.json").write_text(json.dumps({**about, "facts": facts}))
    checks.write_summary(tmp_path, [tmp_path / "first" / "first.json", tmp_path / "second" / "second.json"])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [d["decision"] for d in summary["decisions"] if d["verdict"] == "confirmed"] == ["tests"]


@pytest.mark.parametrize(
    ("text", "counted"),
    [("..F.\n1 failed, 3 passed in 2.00s\n", (3, 1)), ("....F. [ 50%]\n..E", (7, 2)), ("", (0, 0))],
)
def test_tests_are_counted_also_where_they_were_stopped(text, counted, script):
    assert tuple(script("gpu_checks").counts(text).values()) == counted


def test_the_page_lists_every_decision(script):
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    rows = dict(
        re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|", page.partition("## What is to be measured")[2], re.MULTILINE)
    )
    assert {d.name: d.assumes for d in script("gpu_decisions").DECISIONS}.items() <= rows.items()


def test_the_parts_fit_their_call(script):
    checks = script("gpu_checks")
    assert sum(checks.CALLS.values()) <= 540, "fifteen minutes hold both calls and the machine's starts"
    for name, parts in checks.PARTS.items():
        assert sum(part.limit_s for part in parts[:-1]) < 0.8 * checks.CALLS[name], "the last takes what is left"
        for part in parts:
            for word in part.command:
                assert not re.match(r"(scripts|tests)/", word) or (ROOT / word).exists(), word


def test_the_first_cells_see_every_format(script, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    cells = script("gpu_cells")
    order = cells.cells_of("mixtral")
    first = order[: cells.AT_ONCE * len(cells.FORMATS)]
    assert len(set(order)) == len(order) and {cell.format for cell in first} == set(cells.FORMATS)
    assert len({cell.system for cell in first}) > 5 and len({cell.ratio for cell in first}) == 4
