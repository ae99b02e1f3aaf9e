"""The cells of the exactness matrix that `test_exactness` leaves out: with `--slow` a share, with `--nightly` all."""

from __future__ import annotations

import functools
import random

import exactness_cells
import exactness_samples
import pytest
from exactness_samples import REST, TORCH, check, missing, torch_few

SLOW = set(random.Random(0).sample(REST, len(REST) // 5))
"""All of them take hours."""


def cells(*executors: str):
    marked = [pytest.param(cell, marks=pytest.mark.slow if cell in SLOW else pytest.mark.nightly) for cell in REST]
    marked = [cell for cell in marked if cell.values[0].executor in executors]
    return pytest.mark.parametrize("cell", marked, ids=lambda c: c.label)


def torch_cells():
    """The PyTorch engine's; a tenth of them slow."""
    rest = [cell for cell in TORCH if cell not in torch_few()]
    slow = set(random.Random(0).sample(rest, len(rest) // 10))
    return [pytest.param(cell, marks=pytest.mark.slow if cell in slow else pytest.mark.nightly) for cell in rest]


overlapped, callback = cells("overlapped", "stacked"), cells("callback")


@pytest.fixture(scope="module")
def results(request):
    """By model: a worker runs all cells of one."""
    return functools.cache(lambda model: exactness_samples.callback_results(request, model))


@overlapped
def test_overlapped_gives_the_dense_answer(cell):
    if reason := missing(cell):
        pytest.skip(reason)
    check(cell, exactness_cells.run_cell(cell))


@pytest.mark.parametrize("cell", torch_cells(), ids=lambda cell: cell.label)
def test_pytorch_gives_the_dense_answer(cell):
    if reason := missing(cell):
        pytest.skip(reason)
    check(cell, exactness_cells.run_cell(cell))


@callback
def test_callback_gives_the_dense_answer(cell, results):
    if reason := missing(cell):
        pytest.skip(reason)
    found, stderr = results(cell.model)
    assert cell.label in found, stderr[-2000:]
    check(cell, found[cell.label])
