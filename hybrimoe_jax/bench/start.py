"""`bench start`: seconds from a process's start to its first token and to its end, by part.

Every process is a fresh one and does what `generate` does (`start_process`). Three kinds take turns: one that keeps
nothing, one whose folder of kept things is empty ("first"), and one that finds what that one kept ("next").
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from hybrimoe_jax.bench.engine import processor
from hybrimoe_jax.errors import UserError

KINDS = ("nothing kept", "first", "next")
PARTS = ("importing", "reading", "building", "compiling", "measuring", "first token", "text", "ending")


def run(model: str | None, rounds: int, note: Callable[[str], None]) -> dict:
    """-> the record: medians of `rounds` processes of each kind, and every process."""
    from hybrimoe_jax.engine.load import bundled_model

    folder = str(bundled_model() if model is None else model)
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as kept:
            for kind in KINDS:
                note(f"round {number + 1} of {rounds}: {kind}")
                runs[kind].append(start_process(folder, "off" if kind == "nothing kept" else kept))
    medians = {
        kind: {part: statistics.median(times[part] for times in made) for part in (*PARTS, "total")}
        for kind, made in runs.items()
    }
    totals = {kind: median["total"] for kind, median in medians.items()}
    return {
        "benchmark": "start",
        "processor": processor(),
        "python": platform.python_version(),
        "clock": "wall",
        "model": Path(folder).name,
        "medians": medians,
        "times_faster": {kind: totals["nothing kept"] / totals[kind] for kind in KINDS[1:]},
        "runs": runs,
    }


def start_process(model: str, cache: str) -> dict[str, float]:
    """Seconds of one process's parts, and in all; UserError where it failed."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    begun = time.time()
    command = [sys.executable, "-m", "hybrimoe_jax.bench.start_process", str(begun), model, cache]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    total = time.time() - begun
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"a process ended with {done.returncode} and said nothing"]
        raise UserError(said[-1].removeprefix("error: "))
    times = json.loads(done.stdout)
    return {**times, "ending": total - sum(times.values()), "total": total}


def table(record: dict) -> str:
    medians, faster = record["medians"], record["times_faster"]
    lines = [
        f"{record['model']}, {record['processor']}",
        f"wall-clock seconds, medians of {len(record['runs']['next'])} processes of each kind",
        f"{'':12}" + "".join(f"{kind:>14}" for kind in KINDS),
        *(f"{part:12}" + "".join(f"{medians[kind][part]:>14.2f}" for kind in KINDS) for part in (*PARTS, "total")),
        f"faster than with nothing kept: first start {faster['first']:.2f}x, next start {faster['next']:.2f}x",
    ]
    return "\n".join(lines)
