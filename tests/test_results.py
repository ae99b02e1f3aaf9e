"""`scripts/results.py`: the documents' tables are those of the records, and a record says where it comes from."""

from __future__ import annotations

import importlib
import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("results")


def test_the_documents_hold_what_the_command_makes(script):
    made = script.tables(ROOT)
    for name in script.DOCUMENTS:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert script.places(text) and set(script.places(text)) <= set(made)
        assert script.renewed(text, made) == text, f"{name}: run `python scripts/results.py`"
        assert "<!-- end -->" in text


def test_every_figure_of_the_readme_names_its_machine_and_commit(script):
    rows = script.tables(ROOT)["results"].splitlines()[2:]
    assert len(rows) >= 4
    for row in rows:
        what, machine, ours, others, commit = (cell.strip() for cell in row.strip("|").split("|"))
        assert machine.startswith(("measured: ", "computed: ")) and ours and others and what
        assert re.fullmatch(r"[0-9a-f]{7,}", commit), row


def test_a_record_is_kept_with_its_machine_and_replaces_the_one_before(script, tmp_path, monkeypatch):
    for name in ("results", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.setattr(script, "ROOT", tmp_path)
    kept = tmp_path / script.MEASURED / "formats.jsonl"
    before = [json.loads(line) for line in kept.read_text().splitlines()]
    printed = {**before[0]["record"], "tokens": 7}
    for _ in range(2):
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"a table\n{json.dumps(printed)}\n"))
        script.main(["--add", "formats"])
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    new = [row for row in rows if row["record"]["tokens"] == 7]
    assert len(new) == 1 and len(rows) <= len(before) + 1
    assert new[0]["processor"] and new[0]["cores"] and new[0]["jax"] and new[0]["date"]
    text = (tmp_path / "docs/results.md").read_text()
    assert f"commit {new[0]['commit']}, {new[0]['date']}" in text


def test_the_readme_has_a_row_of_each_format_beside_torch(script):
    part = {"model": "mid", "device": "auto", "phase": "decode", "format": "f32", "prompt_tokens": 128, "mode": "lru"}
    part |= {"hybrimoe_ms": 10.0, "torch_ms": 25.5}
    parts = [part, {**part, "phase": "prefill"}, {**part, "model": "bundled"}]
    row = {"processor": "A CPU cpu family 6", "cores": 2, "commit": "abcdef1", "record": {"parts": parts}}
    ((_, machine, ours, theirs, commit),) = script.beside_torch(row)
    assert (machine, ours, commit) == ("measured: A CPU, 2 cores", "10.00 ms", "abcdef1")
    assert theirs == "offloading in torch, lru: 25.50"
