"""Simulation records as a table for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

COLUMNS = ("system", "cache", "start", "ms", "95 %", "hit %", "MB", "useful", "late", "wasted", "cpu", "device", "link")


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
        ratio, bound = record["cache_ratio"], record["bound_seconds_per_step"]
        least[ratio] = min(bound, least.get(ratio, bound))
    said = ", ".join(f"{1e3 * bound:.4g} ms at cache {ratio:g}" for ratio, bound in least.items())
    unit, group = ("prompt", "prompts") if first["prompt_tokens"] else ("token", "sequences")
    text.append(
        f"ms: mean of a {unit}, and its 95 % interval over {group}; MB: moved to the device in it;\n"
        "useful, late, wasted: prefetches in it; cpu, device, link: share of the time that each is busy"
    )
    text.append(f"none of them can take less than {said}, see simulate/bound.py")
    return "\n".join([title, *(line.rstrip() for line in text), *(f"  {note}" for note in _notes(records))])


def _notes(records: list[dict]) -> list[str]:
    """What is to be said, once, with those whom it concerns: systems, or single runs of them; nobody where it concerns all."""
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
