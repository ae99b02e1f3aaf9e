"""Records: the JSON lines that commands print or write for programs, each with its kind and the version of its keys.

Within a version a kind of record keeps its keys, what they mean and their units. A key that comes, goes, or changes its
meaning makes a new version. `read_records` reads files of every version that there ever was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from hybrimoe_jax import arguments
from hybrimoe_jax.encoding import read_text
from hybrimoe_jax.errors import UserError, shown
from hybrimoe_jax.files import is_object

PREFIX = "hybrimoe-jax "
VERSIONS = {
    "generation": 1,
    "simulation": 2,
    "repeated run": 1,
    "reproduction": 1,
    "reproduction inputs": 1,
    "reproduction links": 1,
    "reproduction live": 1,
    "reproduction reuse": 1,
    "reproduction similarity": 1,
    "reproduction traces": 1,
    "training": 1,
    "calibration": 1,
    "trace recording": 1,
    "trace import": 1,
    "trace export": 1,
    "trace info": 1,
    "trace overlap": 1,
    "trace check": 1,
    "bench engine": 1,
    "bench e2e": 2,
    "bench llamacpp": 1,
    "bench paced": 1,
    "bench cache": 1,
    "bench schedule": 1,
    "bench kernels": 1,
    "bench formats": 1,
    "bench start": 1,
}
"""The newest version of every kind."""


def stamped(kind: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with its `kind` and `version` first."""
    return {"kind": PREFIX + kind, "version": VERSIONS[kind], **record}


def read_records(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a file of JSON lines, as they were written.

    UserError naming the line that is no record of ours, or of a version that is newer than this program.
    """
    lines = read_text(arguments.path("records", path)).split("\n")
    records = [_record(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not records:
        raise UserError(f"{path}: it holds no records")
    return records


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    kind = str(record.get("kind", "")) if is_object(record) else ""
    if kind.removeprefix(PREFIX) not in VERSIONS or not kind.startswith(PREFIX):
        raise UserError(f"{where}: not a record of ours (its kind is {shown(kind)})")
    newest, version = VERSIONS[kind.removeprefix(PREFIX)], record.get("version")
    if type(version) is not int or not 1 <= version <= newest:
        raise UserError(f"{where}: {kind} version {shown(version)} is not known (this program reads 1 to {newest})")
    return record
