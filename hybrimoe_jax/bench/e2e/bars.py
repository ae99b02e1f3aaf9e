"""What was wanted of the comparison, and whether it came out: from a record's rows alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from hybrimoe_jax.bench.e2e.grid import REFERENCE, TORCH_MODES

DECODE, PREFILL = 1.5, 1.2
"""How much faster than the best torch mode, on a CPU alone at a quarter of the experts."""
SAME_PLANNER, SIMULATED = 0.05, 0.10
"""How far torch's engine with our planner may be from ours on a paced device, and ratios from the virtual clock's."""
MODEL, RATIO = "mid", 0.25
TORCH = [f"torch {mode}" for mode in TORCH_MODES]
MEASURES = {"decode": "tbt_ms", "prefill": "ttft_ms"}
Rows = Sequence[dict[str, Any]]


def bars(rows: Rows) -> list[dict[str, Any]]:
    """Each {"bar", "value", "met"}; met is None where nothing was measured for it."""
    return [*cpu_bars(rows), *paced_bars([row for row in rows if row["device"] != "auto"])]


def cpu_bars(rows: Rows) -> Iterator[dict[str, Any]]:
    found: dict[str, dict[str, float | None]] = {}
    for format in ("f32", "int4-g64"):
        here = [row for row in rows if (row["model"], row["format"], row["device"]) == (MODEL, format, "auto")]
        found[format] = {phase: over_torch(here, measure) for phase, measure in MEASURES.items()}
    for phase, least in (("decode", DECODE), ("prefill", PREFILL)):
        plain, int4 = found["f32"][phase], found["int4-g64"][phase]
        yield bar(f"CPU only, mid, f32, {phase}: hybrimoe over the best torch mode, at least {least}x", plain, least)
        yield bar(f"the same in int4-g64, {phase}: more than in f32", int4, plain, above=True)


def bar(text: str, value: float | None, least: float | None, above: bool = False) -> dict[str, Any]:
    """`above`: the least itself is not enough."""
    met = None if value is None or least is None else value > least or (value == least and not above)
    return {"bar": text, "value": value, "met": met}


def over_torch(rows: Rows, measure: str) -> float | None:
    """How many times faster hybrimoe is than the best torch mode: the median over prompts of the rounds' medians."""
    ratios = []
    for cell in cells([row for row in rows if row["cache_ratio"] == RATIO]):
        theirs = [ratio(cell[name], cell[REFERENCE], measure) for name in cell if name in TORCH]
        if theirs:
            ratios.append(min(theirs))
    return statistics.median(ratios) if ratios else None


def cells(rows: Rows) -> Iterator[dict[str, dict[str, Any]]]:
    """Rows that were measured in the same turns, by contender; only those with our reference."""
    keys = ("model", "format", "device", "cache_ratio", "prompt_tokens")
    grouped: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        grouped.setdefault(tuple(row[key] for key in keys), {})[row["contender"]] = row
    yield from (cell for cell in grouped.values() if REFERENCE in cell)


def ratio(slow: dict[str, Any], fast: dict[str, Any], measure: str) -> float:
    """The median of the rounds' ratios: a machine's speed drifts over rounds, and both with it."""
    pairs = zip(slow["rounds"][measure], fast["rounds"][measure], strict=True)
    return statistics.median(one / other for one, other in pairs)


def paced_bars(rows: Rows) -> Iterator[dict[str, Any]]:
    least: dict[str, float] = {}
    same, apart = [], []
    for cell in cells(rows):
        ours = cell[REFERENCE]
        for name, row in cell.items():
            over = ratio(row, ours, "tbt_ms")
            if name == "torch hybrid":
                same.append(over)
            elif name in TORCH:
                least[name] = min(over, least.get(name, over))
            if name != REFERENCE and "computed" in row:
                wanted = row["computed"]["tbt_ms"] / ours["computed"]["tbt_ms"]
                apart.append(abs(over / wanted - 1))
    for name, over in least.items() or {"every torch mode": None}.items():
        yield bar(f"paced, decode: hybrimoe over {name}, more than 1x", over, 1.0, above=True)
    off = max((abs(over - 1) for over in same), default=None)
    text = f"paced, decode: torch hybrid with the same planner, at most {SAME_PLANNER:.0%} apart"
    yield {"bar": text, "value": off, "met": None if off is None else off <= SAME_PLANNER}
    most = max(apart, default=None)
    text = f"paced, decode: ratios to hybrimoe, at most {SIMULATED:.0%} from the virtual clock's"
    yield {"bar": text, "value": most, "met": None if most is None else most <= SIMULATED}
