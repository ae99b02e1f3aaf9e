"""Engines on paced devices, in processes of their own (`paced_process`): overlap, counts and answers."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from exactness_cells import Cell
from exactness_samples import check, missing
from grids import few

from hybrimoe_jax.host_kernels.native import pace

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(not pace.available(), reason="the package was installed without its FFI handlers")
TIMELESS = ["ktransformers", "llamacpp", "on-demand", "cpu-only", "fiddler"]
"""Systems whose decisions do not depend on when things land."""


def process(script: str, *arguments: str, given: str = "") -> list[dict]:
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(HERE / script), *arguments],
        input=given,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.alone
def test_three_lanes_of_fifty_milliseconds_make_a_layer_of_less_than_sixty(tmp_path):
    (seen,) = process("paced_process.py", "null", str(tmp_path))
    assert 0.050 <= seen.pop("as it is") < 0.060
    assert len(seen) == 3 and all(seconds > 0.095 for seconds in seen.values()), "a lane that waits is seen"


def counted(tmp_path, systems: list[str], runs: int, copies_wait: bool, slots: str = "auto") -> dict[str, dict]:
    asked = {"systems": systems, "runs": runs, "copies_wait": copies_wait, "slots": slots}
    (found,) = process("paced_process.py", json.dumps(asked), str(tmp_path))
    assert all(seen["same_tokens"] for seen in found.values())
    return found


@pytest.mark.parametrize(
    ("copies_wait", "systems"), few([(True, ["on-demand"])], [(True, ["on-demand"]), (False, TIMELESS)])
)
def test_where_time_decides_nothing_all_counts_are_the_virtual_clock_s(tmp_path, copies_wait, systems):
    for system, seen in counted(tmp_path, systems, 1, copies_wait).items():
        assert seen["paced"] == [seen["virtual"]], system


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("system", ["hybrimoe", "adapmoe", "freetoken"])
def test_where_time_decides_counts_are_near_the_virtual_clock_s(tmp_path, system):
    seen = counted(tmp_path, [system], 5, False)[system]
    activations = seen["virtual"]["hits"] + seen["virtual"]["misses"]
    for name, wanted in seen["virtual"].items():
        assert abs(statistics.median(run[name] for run in seen["paced"]) - wanted) <= 0.02 * activations, name


def paced_cells() -> list:
    """Of the exactness matrix: what fetches, prefetches and streams; with `--slow` every family, and many more."""
    few = [
        Cell("qwen2_moe", "hybrimoe", "paced", 0.25, "native", "ragged"),
        Cell("mixtral", "freetoken", "paced", 0.25, "native", "one", "int4-g32"),
    ]
    more = [
        Cell(model, system, "paced", ratio, "native", "ragged")
        for model in ("qwen2_moe", "deepseek_v2", "mixtral")
        for system in (
            "hybrimoe",
            "ktransformers",
            "adapmoe",
            "llamacpp",
            "fiddler",
            "freetoken",
            "on-demand",
            "hybrimoe+pooled",
        )
        for ratio in (0.0, 0.5, 1.0)
    ]
    marked = [pytest.param(cell, marks=pytest.mark.slow) for cell in more if cell not in few]
    return [*few, *marked]


@pytest.fixture(scope="module")
def results(request):
    """All cells of this run in one process."""
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    cells = [item.callspec.params["cell"] for item in items if "cell" in item.callspec.params]
    labels = "".join(cell.label + "\n" for cell in cells if not missing(cell))
    return {found["cell"]: found for found in process("exactness_cells.py", "paced", given=labels)}


@pytest.mark.slow
@pytest.mark.parametrize("cell", paced_cells(), ids=lambda cell: cell.label)
def test_a_paced_device_gives_the_dense_answer(cell, results):
    if reason := missing(cell):
        pytest.skip(reason)
    check(cell, results[cell.label])


@pytest.mark.slow
def test_what_fails_once_ends_one_call_and_the_next_are_exact(tmp_path):
    faults = process("paced_faults.py", str(tmp_path))
    assert len(faults) == 12
    for fault in faults:
        assert fault["raised"] == f"{fault['error']}: it failed once" and all(fault["exact"]), fault
