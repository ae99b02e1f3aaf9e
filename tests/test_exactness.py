"""Placement never changes the answer: every cell of the exactness matrix gives the dense model's tokens and logits.

A covering sample runs by default, the whole matrix with `--slow`. Cells of the overlapped executor run here; those of the callback
executor in one process of their own (see `exactness_cells`), beside which another worker may run these. Executables are shared between the
cells of a process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import exactness_cells
import numpy as np
import pytest
import tiny
from exactness_cells import BUNDLED, CLEAR, Cell

from hybrimoe_jax.engine.load import bundled_model
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.packing import Format, pack_expert
from hybrimoe_jax.host_kernels import get_kernel
from hybrimoe_jax.host_kernels.native import library as native

MATRIX = exactness_cells.matrix([*tiny.CONFIGS, BUNDLED])
QUANTISED = exactness_cells.quantised_matrix(list(tiny.CONFIGS))
SAMPLE = exactness_cells.covering(MATRIX, at_least=92)
QUANTISED_SAMPLE = exactness_cells.covering_formats(QUANTISED)
SAMPLED = frozenset([*SAMPLE, *QUANTISED_SAMPLE])


def params(executor: str):
    """Parametrisation over an executor's cells: the sample, and the rest of the matrix marked slow."""
    cells = [cell for cell in (*MATRIX, *QUANTISED) if cell.executor == executor]
    cells.sort(key=lambda cell: cell not in SAMPLED)
    marks = {True: (), False: pytest.mark.slow}
    return pytest.mark.parametrize("cell", [pytest.param(c, id=c.label, marks=marks[c in SAMPLED]) for c in cells])


def missing(cell: Cell) -> str | None:
    """Why a cell cannot run here."""
    if cell.model == BUNDLED and not (bundled_model() / "manifest.json").is_file():
        return "no bundled model in hybrimoe_jax/assets"
    if cell.kernel == "onednn" and not ONEDNN:
        return "oneDNN is not installed (extra onednn)"
    if cell.kernel == "native" and not native.available():
        return "the package was installed without a C++ compiler"
    if cell.kernel == "native" and cell.format != "f32" and not NATIVE_PACKED:
        return "the native kernel computes no quantised experts"
    return None


def there_is(kernel: str, sample=None) -> bool:
    try:
        get_kernel(kernel, sample)
    except UserError:
        return False
    return True


ONEDNN = there_is("onednn")
NATIVE_PACKED = there_is("native", pack_expert(*np.ones((3, 8, 8), np.float32), Format.parse("int8-g32")))


def check(cell: Cell, result: dict) -> None:
    assert result["margin"] > CLEAR, "the dense model's best tokens are nearly tied: other prompts are needed"
    assert result["error"] <= cell.tolerance
    assert result["same_tokens"]


@pytest.fixture(scope="module")
def callback_results(request, tmp_path_factory):
    """One process for all callback cells that this session will ask for -> (what it printed by cell, its standard error)."""
    cells = [item.callspec.params["cell"] for item in request.session.items if "callback_results" in item.fixturenames]
    slow = request.config.getoption("--slow")
    cells = [cell for cell in cells if (slow or cell in SAMPLED) and not missing(cell)]
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, exactness_cells.__file__],
        input="".join(cell.label + "\n" for cell in cells),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        timeout=300 + 10 * len(cells),
    )
    return {record["cell"]: record for record in map(json.loads, done.stdout.splitlines())}, done.stderr


@params("overlapped")
def test_overlapped_gives_the_dense_answer(cell):
    if reason := missing(cell):
        pytest.skip(reason)
    check(cell, exactness_cells.run_cell(cell))


@params("callback")
def test_callback_gives_the_dense_answer(cell, callback_results):
    if reason := missing(cell):
        pytest.skip(reason)
    results, stderr = callback_results
    assert cell.label in results, stderr[-2000:]
    check(cell, results[cell.label])


def test_the_sample_covers_every_pair_of_values():
    def covered(cells):
        return set().union(*map(exactness_cells.pairs, cells))

    assert covered(SAMPLE) == covered(MATRIX)
    assert len(set(SAMPLE)) >= 80


def test_both_executors_meet_every_format():
    def covered(cells):
        return set().union(*map(exactness_cells.format_pairs, cells))

    assert covered(QUANTISED_SAMPLE) == covered(QUANTISED) and {c.format for c in QUANTISED_SAMPLE} == set(
        exactness_cells.FORMATS
    )
