"""`python scripts/gpu_cells.py`: cells of the exactness matrix (tests/exactness_cells.py), a process for each model.

Each cell compares an engine's tokens and logits with the dense model's on the same device. Cells that share programs
follow each other, a few of every format first, so that a run which is stopped has seen the most.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_report import report

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

MODELS = ("deepseek_v2", "qwen2_moe", "mixtral")
FORMATS = ("f32", "int4-g64-a8", "int8-g64", "int4-g32", "int4z-g128")
AT_ONCE, FEW = 8, 2
"""Cells of a format before the next one's turn; cells of a model in a dry run."""


def cells_of(model: str) -> list[Any]:
    """The cells in their order: a handful of each format, then a handful more."""
    import exactness_cells as matrix  # pyright: ignore[reportMissingImports]  # of tests/

    every = [cell for cell in matrix.matrix([model]) if cell.kernel == "native"] + matrix.quantised_matrix([model])
    turns: list[tuple[int, int, Any]] = []
    for place, format in enumerate(FORMATS):
        cells = [cell for cell in every if cell.format == format and cell.executor == "overlapped"]
        apart = 37  # shares no factor with how many there are: neighbours differ in system, ratio and batch
        turns += [(i // AT_ONCE, place, cells[i * apart % len(cells)]) for i in range(len(cells))]
    return [cell for *_, cell in sorted(turns, key=lambda turn: turn[:2])]


def run(model: str, small: bool, file: Path) -> None:
    """Runs one model's cells; the file is brought up to date after each."""
    import exactness_cells as matrix  # pyright: ignore[reportMissingImports]  # of tests/

    passed, failed, worst = 0, [], 0.0
    for cell in cells_of(model)[: FEW if small else None]:
        done: dict[str, Any] = {}
        try:
            done = matrix.run_cell(cell)
            good = done["error"] <= cell.tolerance and (done["same_tokens"] or done["margin"] < matrix.CLEAR)
        except Exception as error:
            good, done = False, {"cell": cell.label, "raised": f"{type(error).__name__}: {error}"[:300]}
        passed += good
        worst = max(worst, done.get("error", 0.0) / cell.tolerance)
        if not good:
            failed.append(done)
            print(done, flush=True)
        report(file, {"passed": passed, "failed": failed, "worst": worst})


def together(folder: Path) -> tuple[dict[str, Any], list[dict]]:
    """-> the counts of all models' files so far, and the cells that failed."""
    found = [json.loads(file.read_text(encoding="utf-8"))["facts"] for file in sorted(folder.glob("*.json"))]
    failed = [cell for facts in found for cell in facts["failed"]]
    worst = max((facts["worst"] for facts in found), default=0.0)
    passed = sum(facts["passed"] for facts in found)
    return {"passed": passed, "failed": len(failed), "worst error over its tolerance": worst}, failed


def main() -> int:
    top = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    top.add_argument("--small", action="store_true", help="one model and few cells (for a dry run)")
    top.add_argument("--json", type=Path, help="where the figures go")
    top.add_argument("--model", choices=MODELS, help="only this one's cells, in this process")
    args = top.parse_args()
    if args.model:
        run(args.model, args.small, args.json)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder, small = Path(name), ["--small"] if args.small else []
        command = [sys.executable, __file__, *small]
        models = MODELS[:1] if args.small else MODELS
        running = [subprocess.Popen([*command, "--model", m, "--json", folder / f"{m}.json"]) for m in models]
        while True:
            over = all(process.poll() is not None for process in running)
            facts, failed = together(folder)
            report(args.json, {"cells": facts, "failures": {"first": failed[:20]}})
            if over:
                break
            time.sleep(1)
    print(facts)
    return 1 if failed or any(process.returncode for process in running) else 0


if __name__ == "__main__":
    sys.exit(main())
