"""Notebooks: each is that of its `.py`, its outputs are those of the present source, and it runs.

By default their cells run one after the other with smaller numbers, without jupyter. The slow test
executes them whole, by nbclient, and compares what they give with what is kept.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from grids import few
from public_traces import DATA

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
notebooks = importlib.import_module("notebooks")
sys.path.pop(0)

NAMES = notebooks.names()
APART = ("01-quickstart", "03-cpu-and-device", "06-prefetching", "07-end-to-end", "08-own-policy", "09-own-model")
"""Those that measure a machine, or need torch."""
NEED_TORCH, LONG = APART[3:], ("07-end-to-end", "09-own-model")
"""LONG: their short form, too, takes tens of seconds."""
NEAR = 0.02
"""By which share a number may differ on another processor, where rounding can turn a choice."""


def test_every_notebook_has_its_line_in_the_documents():
    listed = re.findall(
        r"^\| `([\w-]+)` \|", (notebooks.FOLDER.parent / "docs" / "notebooks.md").read_text(), re.MULTILINE
    )
    assert NAMES and listed == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_its_source_executed(name):
    assert notebooks.problems(name) == []


def test_a_notebook_that_is_out_of_date_or_shows_the_machine_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks, "FOLDER", tmp_path)
    source = '# %% [markdown]\n# # Title\n#\n# text\n\n# %% tags=["measured"] short="x = 1"\nx = 2\nprint(x)\n'
    (tmp_path / "a.py").write_text(source)
    assert notebooks.cells("a") == [
        notebooks.Cell("markdown", "# Title\n\ntext", {}),
        notebooks.Cell("code", "x = 2\nprint(x)", {"tags": ["measured"], "short": "x = 1"}),
    ]
    assert notebooks.problems("a") == ["there is no .ipynb beside the .py"]
    made = notebooks.notebook("a")
    notebooks.write("a", made)
    assert notebooks.problems("a") == ["its cells were not executed in order"]
    made["cells"][1] |= {"execution_count": 1, "outputs": [{"output_type": "stream", "name": "stdout", "text": ["2"]}]}
    notebooks.write("a", made)
    assert notebooks.problems("a") == []
    made["cells"][1]["outputs"] += [{"output_type": "stream", "name": "stderr", "text": ["Warning in /home/me/x.py"]}]
    notebooks.write("a", made)
    said = notebooks.problems("a")
    assert said == ["a cell shows an error or a warning", "it shows a path of the machine: /home/me/x.py"]
    (tmp_path / "a.py").write_text(source.replace("x = 2", "x = 3"))
    assert "its cells are not those of the .py" in notebooks.problems("a")
    assert notebooks.reworded("a") is None
    (tmp_path / "a.py").write_text(source.replace("text", "words"))
    assert "its cells are not those of the .py" in notebooks.problems("a")
    notebooks.write("a", notebooks.reworded("a"))
    assert notebooks.problems("a") == said, "outputs stay where only the text has changed"
    kept = notebooks.stored("a")
    kept["metadata"]["source"] = "another"
    notebooks.write("a", kept)
    assert "its outputs are not those of the present source" in notebooks.problems("a")


def run_in_short(name: str) -> None:
    """Its cells, one after the other in this process, as in a kernel."""
    space = {"__name__": "__main__"}
    for number, cell in enumerate(notebooks.cells(name), 1):
        if cell.kind == "code":
            for part in (cell.source, cell.metadata.get("short", "")):
                exec(compile(part, f"{name}.py, cell {number}", "exec", dont_inherit=True), space)


@pytest.fixture
def no_traces(monkeypatch, tmp_path):
    """An empty folder to run in, and of the public traces none: reading them takes seconds."""
    pytest.importorskip("matplotlib", reason="the extra `plots` is not installed").use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYBRIMOE_DATA", str(tmp_path))
    yield
    importlib.import_module("matplotlib.pyplot").close("all")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in APART])
def test_a_notebook_runs_in_short(name, no_traces, capsys):
    run_in_short(name)


@pytest.mark.parametrize("name", few([name for name in APART if name not in LONG], APART))
def test_a_notebook_runs_in_short_in_a_process_of_its_own(name, no_traces, monkeypatch):
    """A paced device is there before any other use of jax, with two threads of XLA's."""
    if name in NEED_TORCH:
        pytest.importorskip("torch")
    monkeypatch.setenv("NPROC", "2")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])]))
    code = f"import test_notebooks; test_notebooks.run_in_short({name!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    not (find_spec("nbclient") and find_spec("ipykernel") and find_spec("pandas")),
    reason="no nbclient, ipykernel or pandas: the extra `notebooks`, which `make test-slow` installs",
)
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_gives_what_is_kept(name, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(notebooks.FOLDER.parent))
    monkeypatch.setenv("HYBRIMOE_DATA", str(DATA))
    code = [cell for cell in notebooks.cells(name) if cell.kind == "code"]
    kept, made = (
        [list(filter(shows, cell["outputs"])) for cell in book["cells"] if cell["cell_type"] == "code"]
        for book in (notebooks.stored(name), notebooks.execute(name))
    )
    for cell, before, now in zip(code, kept, made, strict=True):
        if "data" in cell.tags and not DATA.is_dir():
            continue
        assert [kinds(output) for output in now] == [kinds(output) for output in before], cell.source
        if "measured" not in cell.tags:
            assert numbers_of(now) == pytest.approx(numbers_of(before), rel=NEAR, abs=NEAR), cell.source
            assert words_of(now) == words_of(before), cell.source


def shows(output: dict) -> bool:
    """Not so a line of progress that has vanished."""
    return "".join(output.get("data", {}).get("text/plain", "something")) != ""


def kinds(output: dict) -> set[str]:
    return {output["output_type"], *output.get("data", {})} - {"text/html"}  # which pandas may add


def text_of(outputs: list[dict]) -> str:
    """What was printed, and the last expressions as text."""
    return "\n".join("".join(o.get("text") or o.get("data", {}).get("text/plain", "")) for o in outputs)


def numbers_of(outputs: list[dict]) -> list[float]:
    return [float(found) for found in re.findall(r"\d+\.?\d*(?:e[-+]?\d+)?", text_of(outputs))]


def words_of(outputs: list[dict]) -> str:
    return " ".join(re.sub(r"\d+\.?\d*(?:e[-+]?\d+)?", "", text_of(outputs)).split())


def test_jupytext_reads_the_same_cells():
    jupytext = pytest.importorskip("jupytext", reason="the extra `notebooks` is not installed")
    for name in NAMES:
        book = json.loads(json.dumps(jupytext.read(notebooks.FOLDER / f"{name}.py")))
        read = [(cell["cell_type"], cell["source"]) for cell in book["cells"]]
        assert read == [(cell.kind, cell.source) for cell in notebooks.cells(name)]
