"""Placement never changes the answer: cells of the exactness matrix give the dense model's tokens and logits.

Each system, model, kernel, ratio and format runs by default; with `--slow` each pair of them here, and all other cells
in `test_exactness_matrix`. Cells of the overlapped executor run here; those of the callback executor run in one process
of their own (see `exactness_cells`). Executables are shared between the cells of a process.
"""

from __future__ import annotations

import os

import exactness_cells
import exactness_samples
import pytest
from exactness_cells import BUNDLED
from exactness_samples import FEW, MATRIX, QUANTISED, SAMPLE, check, format_pairs, missing, pairs, torch_few, values


def cells(*executors: str):
    """Parametrisation over executors' cells: the few, and the rest of the sample marked slow."""
    few = [pytest.param(cell, id=cell.label) for cell in FEW if cell.executor in executors]
    more = [cell for cell in SAMPLE if cell.executor in executors and cell not in FEW]
    return pytest.mark.parametrize("cell", [*few, *(pytest.param(c, id=c.label, marks=pytest.mark.slow) for c in more)])


overlapped, callback = cells("overlapped", "stacked"), cells("callback")


@pytest.fixture(scope="module", autouse=True)
def shared_references(tmp_path_factory):
    """The dense model answers once for all workers of this run and for the callback executor's process."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "references"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(exactness_cells.REFERENCES, str(folder))
        yield


@pytest.fixture(scope="module")
def results(request, shared_references):
    return exactness_samples.callback_results(request)


@overlapped
def test_overlapped_gives_the_dense_answer(cell):
    if reason := missing(cell):
        pytest.skip(reason)
    check(cell, exactness_cells.run_cell(cell))


@pytest.mark.parametrize("cell", torch_few(), ids=lambda cell: cell.label)
def test_pytorch_gives_the_dense_answer(cell):
    if reason := missing(cell):
        pytest.skip(reason)
    check(cell, exactness_cells.run_cell(cell))


@callback
def test_callback_gives_the_dense_answer(cell, results):
    if reason := missing(cell):
        pytest.skip(reason)
    found, stderr = results
    assert cell.label in found, stderr[-2000:]
    check(cell, found[cell.label])


def covered(cells, by=pairs):
    return set().union(*map(by, cells))


def test_the_few_cover_every_value():
    """All but the bundled model, whose answers the command's tests know."""
    every = [cell for cell in (*MATRIX, *QUANTISED) if cell.model != BUNDLED]
    assert covered(FEW, values) == covered(every, values) and len(FEW) < 45


def test_the_sample_covers_every_pair_of_values():
    assert covered(SAMPLE) >= covered(MATRIX)
    assert len(set(SAMPLE)) >= 80


def test_both_executors_meet_every_format():
    assert covered(SAMPLE, format_pairs) >= covered(QUANTISED, format_pairs)
