"""The notebook runs from the first cell to the last, and what it shows is small and was really printed.

Its code cells are executed in order in a process of their own, without jupyter. Cells tagged `plot` need matplotlib,
which only the extra `notebooks` installs; where it is absent they are left out and their test is skipped.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hybrimoe_jax.engine.load import bundled_model

pytestmark = pytest.mark.slow
NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "tour.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
PLOTTING = importlib.util.find_spec("matplotlib") is not None

DRIVER = """
import contextlib, io, json, sys

space = {"__name__": "__main__"}
for number, source in json.load(sys.stdin):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, f"cell {number}", "exec"), space)
    print(json.dumps([number, printed.getvalue()]), flush=True)
"""


def plots(cell: dict) -> bool:
    return "plot" in cell["metadata"].get("tags", [])


def stored_text(cell: dict) -> str:
    return "".join("".join(output.get("text", ())) for output in cell["outputs"])


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> dict[int, str]:
    """What each cell printed, by number."""
    if not (bundled_model() / "manifest.json").is_file():
        pytest.skip("no bundled model in hybrimoe_jax/assets")
    cells = [(n, "".join(cell["source"])) for n, cell in enumerate(CODE) if PLOTTING or not plots(cell)]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(cells),
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path_factory.mktemp("notebook"),
        env={**os.environ, "MPLBACKEND": "Agg"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(map(json.loads, done.stdout.splitlines()))


def test_every_cell_runs_in_order(printed):
    assert list(printed) == [n for n, cell in enumerate(CODE) if PLOTTING or not plots(cell)]


def test_every_system_gives_the_dense_tokens(printed):
    tables = [text for text in printed.values() if "hit rate" in text and "same" in text]
    rows = [line for text in tables for line in text.splitlines()[1:]]
    assert len(rows) >= 10
    assert all(line.endswith("yes") for line in rows)


def test_an_invented_machine_makes_all_three_lanes_work(printed):
    lanes = next(text for text in printed.values() if text.startswith("cpu ") and " events" in text)
    events = {lane: int(count) for lane, count in re.findall(r"^(\w+) +(\d+) events", lanes, re.MULTILINE)}
    assert events.keys() == {"cpu", "device", "link"} and min(events.values()) > 0


def test_lookahead_beats_chance_and_falls_with_distance(printed):
    text = next(text for text in printed.values() if "by chance" in text)
    chance = float(re.search(r"by chance ([\d.]+)", text)[1])
    recalls = [float(found) for found in re.findall(r"lookahead \d: ([\d.]+)", text)]
    assert len(recalls) >= 3 and recalls == sorted(recalls, reverse=True) and min(recalls) > chance


@pytest.mark.skipif(not PLOTTING, reason="matplotlib is not installed (extra notebooks)")
def test_plot_cells_run(printed):
    assert {n for n, cell in enumerate(CODE) if plots(cell)} <= printed.keys()


def test_stored_outputs_are_real_and_small(printed):
    assert NOTEBOOK.stat().st_size < 200_000
    assert sum(plots(cell) for cell in CODE) >= 2
    for n, cell in enumerate(CODE):
        assert cell["execution_count"] == n + 1, "run the notebook from the top and save it"
        assert not any(output["output_type"] == "error" for output in cell["outputs"])
        shape = [output for output in cell["outputs"] if "image/png" in output.get("data", {})]
        assert len(shape) == plots(cell)
        if n in printed and not plots(cell):  # figures differ from run to run; whether there are any does not
            assert bool(stored_text(cell).strip()) == bool(printed[n].strip())
