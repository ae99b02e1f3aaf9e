"""What a simulation reports of a run, as a record and as a line of a table: times, hits, bytes, prefetches, lanes.

Intervals are 95 % percentile bootstraps that draw whole sequences (for prompts: windows), since the steps of one
sequence are not independent. With fewer than two there is none.
"""

from __future__ import annotations

import functools
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from hybrimoe_jax.simulate.replay import Result

RESAMPLES = 1000
COLUMNS = ("system", "cache", "start", "ms", "95 %", "hit %", "MB", "useful", "late", "wasted", "cpu", "device", "link")


def interval(above: ArrayLike, below: ArrayLike, seed: int = 0) -> list[float] | None:
    """95 % bootstrap interval of sum(above) / sum(below) over groups, [low, high]; None for fewer than two groups."""
    parts, wholes = np.asarray(above, float), np.asarray(below, float)
    if len(parts) < 2:
        return None
    drawn = np.random.default_rng(seed).integers(0, len(parts), (RESAMPLES, len(parts)))
    ratios = parts[drawn].sum(axis=1) / wholes[drawn].sum(axis=1)
    return np.quantile(ratios, [0.025, 0.975]).tolist()


def measures(result: Result, expert_bytes: int, slots_bytes: int) -> dict:
    """The figures of a run. Times in seconds on the virtual clock, shares from 0 to 1."""
    c, steps = result.counters, result.steps
    seconds = np.array([step.seconds for step in steps])
    hits, asked = _by_sequence(result)
    spent_and_steps = _seconds_by_sequence(result)
    total = result.seconds or 1.0
    return {
        "steps": len(steps),
        "sequences": len(hits),
        "by_sequence": {
            "seconds": [round(spent, 9) for spent in spent_and_steps[0].tolist()],
            "steps": spent_and_steps[1].astype(int).tolist(),
            "hits": hits.astype(int).tolist(),
            "activated": asked.astype(int).tolist(),
        },
        "seconds_per_step": {
            "mean": float(seconds.mean()),
            "ci95": interval(*spent_and_steps),
            "median": float(np.median(seconds)),
            "p90": float(np.quantile(seconds, 0.9)),
            "p99": float(np.quantile(seconds, 0.99)),
        },
        "hit_rate": {"mean": c.hits / c.activated if c.activated else None, "ci95": interval(hits, asked)},
        "hits": c.hits,
        "misses": c.misses,
        "cpu_experts": c.cpu,
        "device_experts": c.device,
        "demand_fetches": c.fetched,
        "streamed": c.streamed,
        "layer_streamed": c.layer_streamed,
        "layer_streamed_used": c.layer_streamed_used,
        "bytes_h2d": (c.fetched + c.layer_streamed + c.prefetch_issued) * expert_bytes,
        "slots_bytes": slots_bytes,
        "prefetch": {
            "issued": c.prefetch_issued,
            "useful": c.prefetch_useful,
            "late": c.prefetch_late,
            "wasted": c.prefetch_wasted,
            **{f"{name}_s": getattr(c, f"prefetch_{name}_s") for name in ("useful", "late", "wasted", "wait")},
        },
        "occupancy": {
            "cpu": result.cpu / total,
            "device": result.device / total,
            "link": result.link / total,
            "attention": result.attention / total,
        },
    }


def versions() -> dict[str, str]:
    """Of everything that a result depends on; `commit` where this package runs from a checkout."""
    from hybrimoe_jax import __version__

    found = {"hybrimoe_jax": __version__, "python": platform.python_version(), "numpy": np.__version__}
    return found | ({"commit": commit()} if commit() else {})


@functools.cache
def commit() -> str:
    """The checkout's commit, with "+" behind it where the package differs; "" outside a checkout or without git.

    What is made from runs, in `results/` and `docs/`, may differ: it changes no figure.
    """
    package = Path(__file__).parents[1]
    if not (package.parent / ".git").exists():
        return ""
    git = ["git", "-C", str(package)]
    try:
        told = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "."], capture_output=True).returncode == 1
    except OSError:
        return ""
    return told.stdout.strip() + "+" * changed if not told.returncode else ""


def _groups(result: Result, values: Sequence[float]) -> np.ndarray:
    """Sums of a value over each sequence, in order of appearance."""
    number: dict[int, int] = {}
    index = [number.setdefault(step.sequence, len(number)) for step in result.steps]
    return np.bincount(index, values, minlength=len(number))


def _by_sequence(result: Result) -> tuple[np.ndarray, np.ndarray]:
    hits = _groups(result, [step.hits for step in result.steps])
    return hits, hits + _groups(result, [step.misses for step in result.steps])


def _seconds_by_sequence(result: Result) -> tuple[np.ndarray, np.ndarray]:
    return _groups(result, [step.seconds for step in result.steps]), _groups(result, [1] * len(result.steps))


def table(records: Sequence[dict]) -> str:
    """One block for every trace, profile and kind of rows, with a line a run.

    A legend stands under each.
    """
    blocks: dict[tuple, list[dict]] = {}
    for record in records:
        blocks.setdefault(
            (record["trace"], record["model"], record["profile"], record["format"], record["rows"]), []
        ).append(record)
    return "\n\n".join(_block(key, rows) for key, rows in blocks.items())


def _block(key: tuple, records: list[dict]) -> str:
    trace, model, profile, fmt, rows = key
    first = records[0]
    what = "TTFT" if first["prompt_tokens"] else "TBT"
    title = (
        f"{trace} ({model}, {fmt}) on {profile}: {what}, {rows}; {first['steps']} steps, {first['sequences']} "
        f"{'prompts' if first['prompt_tokens'] else 'sequences'}; simulated times"
    )
    lines = [list(COLUMNS), *(_line(record) for record in records)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    text = [
        "  ".join(cell.ljust(w) if i in (0, 2) else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
        for line in lines
    ]
    least: dict[float, float] = {}
    for record in records:
        bound: float = record["bound_seconds_per_step"]
        least[record["cache_ratio"]] = min(bound, least.get(record["cache_ratio"], bound))
    said = ", ".join(f"{1e3 * bound:.4g} ms at cache {ratio:g}" for ratio, bound in least.items())
    unit, group = ("prompt", "prompts") if first["prompt_tokens"] else ("token", "sequences")
    text.append(
        f"ms: mean of a {unit}, and its 95 % interval over {group}; MB: moved to the device in it;\n"
        "useful, late, wasted: prefetches in it; cpu, device, link: share of the time that each is busy"
    )
    text.append(f"none of them can take less than {said}, see simulate/bound.py")
    return "\n".join([title, *(line.rstrip() for line in text), *(f"  {note}" for note in _notes(records))])


def _notes(records: list[dict]) -> list[str]:
    """What is to be said, once, with the systems or single runs that it concerns; without where it concerns all."""
    runs: dict[str, list[str]] = {}
    who: dict[str, dict[str, list[str]]] = {}
    for record in records:
        run = f"{record['cache_ratio']:g} {record['start']}"
        runs.setdefault(record["system"], []).append(run)
        for note in record["notes"]:
            who.setdefault(note, {}).setdefault(record["system"], []).append(run)
    notes = []
    for note, systems in who.items():
        names = [
            name if concerned == runs[name] else f"{name} ({', '.join(concerned)})"
            for name, concerned in systems.items()
        ]
        notes.append(note if systems == runs else f"{', '.join(names)}: {note}")
    return notes


def _line(record: dict) -> list[str]:
    seconds, steps, prefetch, lanes = (
        record["seconds_per_step"],
        record["steps"],
        record["prefetch"],
        record["occupancy"],
    )
    low_high = seconds["ci95"]
    hit = record["hit_rate"]["mean"]
    return [
        record["system"],
        f"{record['cache_ratio']:g}",
        record["start"],
        _ms(seconds["mean"]),
        f"{_ms(low_high[0])}-{_ms(low_high[1])}" if low_high else "-",
        "-" if hit is None else f"{100 * hit:.1f}",
        f"{record['bytes_h2d'] / steps / 1e6:.1f}",
        *(f"{prefetch[name] / steps:.2f}" for name in ("useful", "late", "wasted")),
        *(f"{lanes[name]:.2f}" for name in ("cpu", "device", "link")),
    ]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.4g}"
