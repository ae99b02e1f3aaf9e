"""What `auto` measured of an expert on a machine, as a record that outlives the process.

A record holds, per load, the seconds of each form, and the key under which they may be used again: everything that decides how fast a form
runs. That is the expert (format and shape), the threads of a call, the libraries behind the forms (the native one by the hash of its file, so
that a rebuilt kernel is measured anew) and the processor. The machine's profile keeps records as plain values
(`machine.costs.CostModel.save`), of models with experts of one size and of several machines side by side; the one with an equal key is taken, and without one the
kernel measures.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.packing import HostExpert, format_of

REFERENCE, NATIVE, PLAIN, PACKED = "reference", "native", "onednn", "onednn-packed"
FORMS = frozenset((REFERENCE, NATIVE, PLAIN, PACKED))
"""What can compete: NumPy, the native kernel, oneDNN on weights as they lie, and on a copy packed for it."""

METHOD = 2
"""Raised when `auto` measures in another way, so that older records are not used."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """`key`: see `key_of`. `seconds[load][form]` of one expert; `pack_seconds` of making oneDNN's packed copy (0 without)."""

    key: dict[str, Any]
    seconds: dict[int, dict[str, float]]
    pack_seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**dataclasses.asdict(self), "seconds": {str(load): row for load, row in self.seconds.items()}}

    def covers(self, key: dict[str, Any], loads: Sequence[int]) -> bool:
        """Whether it answers for this key at all these loads."""
        return self.key == key and set(loads) <= set(self.seconds)


def read_measurement(record: dict[str, Any], where: Any) -> Measurement:
    """What `Measurement.record` gave; UserError naming `where` it was read for anything else."""
    try:
        key, pack_seconds = record["key"], record["pack_seconds"]
        seconds = {int(load): dict(row) for load, row in record["seconds"].items()}
        times = [pack_seconds, *(time for row in seconds.values() for time in row.values())]
        forms = {frozenset(row) for row in seconds.values()}
        sound = all(isinstance(time, (int, float)) and math.isfinite(time) and time >= 0 for time in times)
        known = all(form <= FORMS and form != {PACKED} and (PACKED not in form or pack_seconds > 0) for form in forms)
        if not (isinstance(key, dict) and sound and known and len(forms) == 1 and all(forms) and min(seconds) > 0):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(
            f"{where}: not a usable profile: a record of host kernels is damaged; measure it again"
        ) from None
    return Measurement(key, seconds, float(pack_seconds))


def merged(records: Iterable[Measurement], new: Measurement | None) -> list[Measurement]:
    """The records with the new one in the place of any of its key."""
    if new is None:
        return list(records)
    return [*(record for record in records if record.key != new.key), new]


def key_of(sample: HostExpert, threads: int, libraries: dict[str, str]) -> dict[str, Any]:
    """What a measurement depends on. `libraries`: the kernels that compete and which build each is."""
    return {
        "method": METHOD,
        "format": format_of(sample),
        "width": sample.width,
        "hidden": sample.hidden,
        "threads": threads,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "processor": processor(),
        "libraries": {"numpy": np.__version__, **libraries},
    }


def processor(cpuinfo: str = "/proc/cpuinfo") -> str:
    """The processor's name and, where the system tells them, family, model and stepping: a virtual machine's name may stand for several."""
    try:
        lines = Path(cpuinfo).read_text().splitlines()
    except OSError:
        lines = []
    told = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))
    name = told.get("model name") or platform.processor() or platform.machine()
    return " ".join([name, *(f"{what} {told[what]}" for what in ("cpu family", "model", "stepping") if what in told)])


def file_digest(path: str | Path) -> str:
    """The start of a file's SHA-256: which build of a library it is."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
