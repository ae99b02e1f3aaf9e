"""`python scripts/gpu_cells.py`: cells of the exactness matrix (tests/exactness_cells.py), one after another.

Each compares an engine's tokens and logits with the dense model's on the same device. They go in an order in which the
first few see every system, kernel and format, so that a run which is stopped has seen the most.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from gpu_report import report

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

MODELS = ("deepseek_v2", "qwen2_moe", "mixtral")
FEW = 4
"""Cells of a dry run."""


def main() -> int:
    top = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    top.add_argument("--small", action="store_true", help=f"only {FEW} cells (for a dry run)")
    top.add_argument("--json", type=Path, help="where the figures go")
    args = top.parse_args()
    import exactness_cells as matrix  # pyright: ignore[reportMissingImports]  # of tests/

    cells = [cell for cell in matrix.matrix(MODELS) if cell.executor == "overlapped" and cell.kernel == "native"]
    cells += [cell for cell in matrix.quantised_matrix(MODELS) if cell.executor == "overlapped"]
    apart = 97  # a step that shares no factor with the axes' lengths: neighbours differ in everything
    order = [cells[i * apart % len(cells)] for i in range(len(cells))]
    passed, failed, worst = 0, [], 0.0
    for cell in order[:FEW] if args.small else order:
        done: dict[str, Any] = {}
        try:
            done = matrix.run_cell(cell)
            good = done["error"] <= cell.tolerance and (done["same_tokens"] or done["margin"] < matrix.CLEAR)
        except Exception as error:
            good, done = False, {"cell": cell.label, "raised": f"{type(error).__name__}: {error}"[:200]}
        passed += good
        worst = max(worst, done.get("error", 0.0) / cell.tolerance)
        if not good:
            failed.append(done)
            print(done, flush=True)
        facts = {"passed": passed, "failed": len(failed), "worst error over its tolerance": worst}
        report(args.json, {"cells": facts, "failures": {"first": failed[:20]}})
        if (passed + len(failed)) % 20 == 0:
            print(f"{passed} passed, {len(failed)} failed, worst {worst:.3f} of its tolerance", flush=True)
    print(f"{passed} passed, {len(failed)} failed, worst {worst:.3f} of its tolerance")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
