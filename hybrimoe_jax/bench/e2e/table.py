"""The comparison as people read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybrimoe_jax.bench.e2e import parts

HEAD = ("contender", "TTFT ms", "TBT ms", "p90", "p99", "tokens/s", "over floor", "hits", "moved MB", "device MB")
HEAD = (*HEAD, "cpu/device/link", "differ")
BYTES_APART = 0.05
"""From what difference on it is said that contenders have not the same device bytes."""


def lines_of(record: dict[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """(title, rows of HEAD) of each model, format, prompt and cache ratio. Times are of the machine in the title."""
    grouped: dict[str, list[list[str]]] = {}
    for row in record["rows"]:
        paced = "" if row["device"] == "auto" else f", {row['device']}, times as that machine's"
        title = f"{row['model']} {row['format']}, prompt of {row['prompt_tokens']}{paced}"
        grouped.setdefault(title, []).append(cells(row))
    return list(grouped.items())


def cells(row: dict[str, Any]) -> list[str]:
    name = row["contender"] + ("" if row["cache_ratio"] is None else f", {100 * row['cache_ratio']:g} %")
    tbt = row["tbt_ms"]
    shown = [name, f"{row['ttft_ms']:.1f}", *(f"{tbt[key]:.2f}" for key in ("median", "p90", "p99"))]
    shown += [f"{row['tokens_s']:.1f}", f"{row['times_floor']['ttft']:.1f} / {row['times_floor']['tbt']:.1f}"]
    if "lanes" in row:
        busy = row["lanes"]["decode"]
        shown += [f"{row['hit_rate']:.0%}", f"{row['bytes_h2d'] / 1e6:.0f}", f"{row['peak_device_bytes'] / 1e6:.0f}"]
        shown += ["/".join(f"{busy[lane]:.2f}" for lane in ("cpu", "device", "link"))]
    else:
        shown += ["-"] * 4
    return [*shown, f"{row['token_differences']} of {row['tokens']}"]


def text(record: dict[str, Any]) -> str:
    """What was measured, then the bars."""
    made = []
    for title, rows in lines_of(record):
        made += [title, *columns([HEAD, *rows]), ""]
    if record["parts"]:
        made += ["why hybrimoe is faster than torch's fastest mode: milliseconds saved by each part"]
        made += [*columns([parts.HEAD, *map(parts.line, record["parts"])]), ""]
    made += doubts(record["rows"])
    for name, why in record["left_out"].items():
        made.append(f"left out: {name}: {why}")
    return "\n".join([*made, *map(bar_line, record["bars"])])


def doubts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Where contenders had not the same device bytes or kept not to their threads."""
    found = []
    for row in rows:
        name = f"{row['contender']}, {row['model']} {row['format']}, prompt of {row['prompt_tokens']}"
        share = row.get("device_bytes_share", 1.0)
        if abs(share - 1) > BYTES_APART:
            found.append(f"device bytes: {name}: {share:.2f} of the first one's")
        if not row["threads_kept"]:
            found.append(f"threads: {name}: {row['cores_used']:.1f} cores were used")
    return found


def columns(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of cells under one another: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join([cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths))])
        for line in lines
    ]


def bar_line(bar: dict[str, Any]) -> str:
    mark = {True: "met", False: "NOT MET", None: "not measured"}[bar["met"]]
    value = "" if bar["value"] is None else f" ({bar['value']:.2f})"
    return f"bar: {bar['bar']}: {mark}{value}"
