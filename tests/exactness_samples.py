"""Which cells of the exactness matrix run when, whether they can run here, and what is asked of their results."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import exactness_cells
import numpy as np
import tiny
from exactness_cells import BUNDLED, CLEAR, FORMATS, Cell

from hybrimoe_jax.engine.load import bundled_model
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.packing import Format, pack_expert
from hybrimoe_jax.host_kernels import get_kernel
from hybrimoe_jax.host_kernels.native import library as native


def values(cell: Cell) -> set:
    """The values of axes that a cell covers."""
    return set(enumerate(cell))


def pairs(cell: Cell) -> set:
    """The pairs of (axis, value) that a cell covers."""
    return set(itertools.combinations(enumerate(cell), 2))


def format_pairs(cell: Cell) -> set:
    """The pairs with the executor, that of the system left out: each costs programs of its own."""
    return {(axis, value, cell.executor) for axis, value in enumerate(cell) if axis != 1}


def _round(cells: list[Cell], covered) -> list[Cell]:
    """Greedily the fewest cells that cover all that `cells` covers."""
    cells = list(cells)
    random.Random(0).shuffle(cells)
    chosen, missing = [], {cell: covered(cell) for cell in cells}
    while missing:
        chosen.append(max(missing, key=lambda cell: len(missing[cell])))
        found = missing[chosen[-1]]
        missing = {cell: rest for cell, those in missing.items() if (rest := those - found)}
    return chosen


MATRIX = exactness_cells.matrix([*tiny.CONFIGS, BUNDLED])
QUANTISED = exactness_cells.quantised_matrix(list(tiny.CONFIGS))


def few() -> list[Cell]:
    """At least one cell of every system, model, ratio, kernel, batch and format.

    The callback executor takes longer: two models, one format, and what another cell's reference serves as well.
    Stacked slots: a system for each way that experts come and go, on one model.
    """
    overlapped = [cell for cell in (*MATRIX, *QUANTISED) if cell.executor == "overlapped" and cell.model != BUNDLED]
    chosen = _round(overlapped, values)
    answered = {(cell.model, cell.batch, cell.format) for cell in chosen}
    callback = [cell for cell in (*MATRIX, *QUANTISED) if cell.executor == "callback" and cell.system == "hybrimoe"]
    callback = [cell for cell in callback if (cell.model, cell.batch, cell.format) in answered]
    first, _, last = tiny.CONFIGS
    chosen.append(next(c for c in callback if (c.model, c.batch, c.format, c.ratio) == (last, "one", "f32", 0.5)))
    chosen.append(next(c for c in callback if c.model == first and c.format != "f32"))
    stacked = [cell for cell in MATRIX if cell.executor == "stacked" and cell.model == first and cell.ratio]
    stacked = [cell for cell in stacked if cell.system in ("hybrimoe", "adapmoe", "on-demand", "freetoken")]
    chosen += _round(stacked, values)
    stacked = [cell for cell in QUANTISED if cell.executor == "stacked" and cell.model == last]
    chosen.append(
        next(cell for cell in stacked if (cell.batch, cell.ratio, cell.format) == ("ragged", 0.5, FORMATS[3]))
    )
    return chosen


def sample() -> list[Cell]:
    """Every pair of values of two axes, once, and again without the bundled model; both executors with every format."""
    chosen = _round(MATRIX, pairs)
    chosen += _round([cell for cell in MATRIX if cell.model != BUNDLED and cell not in chosen], pairs)
    return [*chosen, *_round(QUANTISED, format_pairs)]


FEW = few()
TORCH = exactness_cells.torch_matrix(list(tiny.CONFIGS))
SAMPLE = [*FEW, *(cell for cell in sample() if cell not in FEW)]
REST = [cell for cell in (*MATRIX, *QUANTISED) if cell not in set(SAMPLE)]


def torch_few() -> list[Cell]:
    """Every model, system, ratio and format of the PyTorch engine once, where another cell needs the reference too."""
    answered = {(cell.model, cell.batch, cell.format) for cell in FEW}
    return _round([cell for cell in TORCH if (cell.model, cell.batch, cell.format) in answered], values)


def there_is(kernel: str, sample=None) -> bool:
    try:
        get_kernel(kernel, sample)
    except UserError:
        return False
    return True


ONEDNN = there_is("onednn")
NATIVE_PACKED = there_is("native", pack_expert(*np.ones((3, 8, 8), np.float32), format=Format.parse("int8-g32")))


def missing(cell: Cell) -> str | None:
    """Why a cell cannot run here."""
    if cell.model == BUNDLED and not (bundled_model() / "manifest.json").is_file():
        return "no bundled model in hybrimoe_jax/assets"
    if cell.executor == "torch" and importlib.util.find_spec("torch") is None:
        return "torch is not installed (extra baseline)"
    if cell.kernel == "onednn" and not ONEDNN:
        return "oneDNN is not installed (extra onednn)"
    if cell.kernel == "native" and not native.available():
        return "the package was installed without a C++ compiler"
    if cell.kernel == "native" and cell.format != "f32" and not NATIVE_PACKED:
        return "the native kernel computes no quantised experts"
    return None


def check(cell: Cell, result: dict) -> None:
    assert result["margin"] > CLEAR, "the dense model's best tokens are nearly tied: other prompts are needed"
    assert result["error"] <= cell.tolerance
    assert result["same_tokens"]


def callback_results(request, model: str | None = None) -> tuple[dict[str, dict], str]:
    """One process for all callback cells that this module's tests ask for, or those of one model.

    -> (results by cell, its standard error)
    """
    items = [item for item in request.session.items if item.path == request.path]
    cells = [item.callspec.params["cell"] for item in items if "results" in item.fixturenames]
    cells = [cell for cell in cells if model in (None, cell.model) and not missing(cell)]
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
