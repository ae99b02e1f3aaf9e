"""From options to a record: every model and format, one after the other, then the paced part."""

from __future__ import annotations

import dataclasses
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hybrimoe_jax.bench.e2e import grid
from hybrimoe_jax.bench.e2e.bars import bars
from hybrimoe_jax.bench.e2e.grid import Options
from hybrimoe_jax.bench.e2e.parts import parts
from hybrimoe_jax.bench.e2e.rounds import measure
from hybrimoe_jax.bench.engine import processor
from hybrimoe_jax.decide.systems import get_system
from hybrimoe_jax.errors import UserError, shown
from hybrimoe_jax.files import check_folder_to_be
from hybrimoe_jax.formats.layout import check_format
from hybrimoe_jax.machine.paced import check_device
from hybrimoe_jax.simulate.records import commit

QUICK = {"ratios": (0.25,), "prompts": (128,), "new": 16}
QUICK |= {"systems": ("hybrimoe", "ktransformers", "adapmoe", "on-demand")}
"""What `--quick` measures less of."""
QUICK_FORMATS = {"bundled": ("f32",), "mid": ("f32", "int4-g64")}
PACED = {"models": ("bundled",), "formats": ("f32",), "prompts": (32,), "rounds": 2, "device": "paced:a6000-paper:8"}
"""The part of a quick run that a paced device does."""


def parts_of(flags: Mapping[str, Any]) -> list[Options]:
    """What a command line asks for, checked: UserError before a model is written or read."""
    given = {name: flags[name] for name in ("threads", "rounds", "new", "device") if flags[name] is not None}
    for name in ("models", "formats", "systems", "peers"):
        if flags[name] is not None:
            given[name] = tuple(filter(None, flags[name].split(",")))
    if own := tuple((part, flags[part]) for part in grid.PARTS if flags[part] is not None):
        given["own"] = own
    given |= {name: numbers(f"--{name}", flags[name]) for name in ("ratios", "prompts") if flags[name] is not None}
    if not flags["quick"]:
        parts = [Options(**given)]
    else:
        parts = [Options(**{**QUICK, "models": (m,), "formats": f, **given}) for m, f in QUICK_FORMATS.items()]
        if {"models", "formats"} & set(given):
            parts = [Options(**{**QUICK, "formats": QUICK_FORMATS["mid"], **given})]
        if "device" not in given:
            parts.append(Options(**{**QUICK, **given, **PACED}))
    for options in parts:
        check(options)
    if flags["workdir"] is not None:
        check_folder_to_be(flags["workdir"], "--workdir")
    return parts


def numbers(option: str, text: str) -> tuple[Any, ...]:
    kind = int if option == "--prompts" else float
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{option} {shown(text)}: write numbers separated by commas") from None


def check(options: Options) -> None:
    for model in options.models:
        if model not in grid.MODELS and not Path(model).is_dir():
            raise UserError(f"--models {shown(model)}: neither bundled, mid nor a folder")
    for format in options.formats:
        check_format(format)
    for system in options.systems:
        get_system(system)
    own = dict(options.own)
    get_system(grid.REFERENCE).override(
        cache=own.get("cache"), scheduler=own.get("scheduler"), predictor=own.get("predictor")
    )
    if unknown := set(options.peers) - set(grid.PEERS):
        raise UserError(f"--peers {shown(min(unknown))} is not known (known: {', '.join(grid.PEERS)})")
    if not options.systems:
        raise UserError("--systems: name one at least")
    for name, values in (("threads", [options.threads]), ("rounds", [options.rounds]), ("prompts", options.prompts)):
        if min(values, default=0) < 1:
            raise UserError(f"--{name} must be at least 1")
    if options.new < 2:
        raise UserError("--new must be at least 2")
    if not options.ratios or not all(0 <= ratio <= 1 for ratio in options.ratios):
        raise UserError(f"--ratios {options.ratios}: a ratio is from 0 to 1")
    check_device(options.device)


def run(asked: list[Options], workdir: Path | None, note: Callable[[str], None]) -> dict[str, Any]:
    """-> the record of all parts. Models are written to `workdir`, or to a folder that goes when it ends."""
    started, rows, figures = time.perf_counter(), [], {}
    left_out: dict[str, str] = {}
    versions: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for options in asked:
            for model in options.models:
                for format in options.formats if model in grid.MODELS else (own_format(model),):
                    note(f"{model} {format}: writing the model")
                    files = grid.prepare(model, format, workdir or Path(scratch), options.peers, options.threads)
                    made = measure(files, options, note)
                    rows += made["rows"]
                    left_out |= made["left_out"]
                    versions |= {kind: about for kind, about in made["versions"].items() if about}
                    figures[f"{files.name} {format}, {options.device}"] = made["figures"]
    return {
        "benchmark": "e2e",
        "clock": "wall",
        "machine": platform.machine(),
        "processor": processor(),
        "python": platform.python_version(),
        "commit": commit(),
        "seconds": time.perf_counter() - started,
        "options": [dataclasses.asdict(options) for options in asked],
        "versions": versions,
        "figures": figures,
        "left_out": left_out,
        "rows": rows,
        "bars": bars(rows),
        "parts": list(parts(rows)),
    }


def own_format(model: str) -> str:
    from hybrimoe_jax.checkpoint.reader import open_checkpoint

    return open_checkpoint(model).format
