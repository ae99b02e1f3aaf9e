"""All cells of the exactness matrix that `test_exactness` leaves out."""

from __future__ import annotations

import exactness_cells
import exactness_samples
import pytest
from exactness_samples import REST, check, missing

pytestmark = pytest.mark.slow


def cells(executor: str):
    return pytest.mark.parametrize("cell", [cell for cell in REST if cell.executor == executor], ids=lambda c: c.label)


overlapped, callback = cells("overlapped"), cells("callback")


@pytest.fixture(scope="module")
def results(request):
    return exactness_samples.callback_results(request)


@overlapped
def test_overlapped_gives_the_dense_answer(cell):
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
