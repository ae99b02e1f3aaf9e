"""What was measured at a load, kept for the next one of the same model on the same machine.

A file for each machine, model and choice of options, under a name made from all that a measurement may depend on. It is
written beside its place and renamed. No answer depends on it. Measured anew is what is older than a week, since the
machine may have been busy, and what cannot be read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybrimoe_jax.engine.fused.program import MAX_STEPS_PER_CALL
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.files import is_object, replacing
from hybrimoe_jax.machine.costs import CostModel
from hybrimoe_jax.machine.identity import digest

VERSION = 3
MAX_AGE_S = 7 * 86400
MOST_FILES = 256


@dataclasses.dataclass(frozen=True)
class DecodeChoice:
    """How decode steps of one sequence begin to run: `fused`, as one program with so many threads and steps a call.

    `fused_s`, `layered_s`: the median of a step as one program and layer by layer.
    """

    fused: bool
    threads: int
    max_steps: int
    fused_s: float
    layered_s: float

    def __post_init__(self) -> None:
        whole = all(type(value) is int for value in (self.threads, self.max_steps))
        whole = whole and type(self.fused) is bool and self.fused_s > 0 and self.layered_s > 0
        if not (whole and 1 <= self.threads < 1 << 16 and 1 <= self.max_steps <= MAX_STEPS_PER_CALL):
            raise UserError(f"not a choice of decoding: {self}")


@dataclasses.dataclass(frozen=True)
class Measurements:
    """`costs` and `decode` are None where they were not measured."""

    costs: CostModel | None = None
    decode: DecodeChoice | None = None


class KeptMeasurements:
    """The file in `folder` for these facts; None: nothing is kept."""

    def __init__(self, folder: Path | None, facts: Sequence[str]):
        self._path = folder and folder / "measurements" / f"{digest(facts)}.json"

    def read(self) -> Measurements:
        """What is kept, all of it None where that is nothing of use."""
        try:
            if self._path is None or time.time() - self._path.stat().st_mtime > MAX_AGE_S:
                return Measurements()
            raw: Any = json.loads(self._path.read_text(encoding="utf-8"))
            if not is_object(raw) or raw.get("version") != VERSION:
                return Measurements()
            costs, decode = raw["costs"], raw["decode"]
            return Measurements(costs and CostModel(**costs), decode and DecodeChoice(**decode))
        except (OSError, ValueError, TypeError, KeyError, RecursionError, UserError):
            return Measurements()

    def write(self, measured: Measurements) -> None:
        """Keeps them if it can, and drops the oldest files of others."""
        if self._path is None:
            return
        with contextlib.suppress(OSError, UserError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._path) as file:
                file.write(json.dumps({"version": VERSION, **dataclasses.asdict(measured)}, indent=2) + "\n")
            files = sorted(self._path.parent.glob("*.json"), key=lambda path: path.stat().st_mtime)
            for path in files[:-MOST_FILES]:
                path.unlink(missing_ok=True)
