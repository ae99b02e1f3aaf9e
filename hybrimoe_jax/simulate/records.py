"""What a simulation reports: times, hits, bytes, prefetches and lane occupancy of one run, with intervals over sequences.

Intervals are 95 % percentile bootstraps that draw whole sequences (for prompts: windows), since the steps of one sequence are not
independent. With fewer than two there is none.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence

import numpy as np

from hybrimoe_jax.simulate.replay import Result

RESAMPLES = 1000


def interval(above: Sequence[float], below: Sequence[float], seed: int = 0) -> list[float] | None:
    """95 % bootstrap interval of sum(above) / sum(below) over groups: [low, high], or None for fewer than two groups."""
    above, below = np.asarray(above, float), np.asarray(below, float)
    if len(above) < 2:
        return None
    drawn = np.random.default_rng(seed).integers(0, len(above), (RESAMPLES, len(above)))
    ratios = above[drawn].sum(axis=1) / below[drawn].sum(axis=1)
    return np.quantile(ratios, [0.025, 0.975]).tolist()


def measures(result: Result, expert_bytes: int, slots_bytes: int) -> dict:
    """The figures of a run. Times in seconds on the virtual clock, shares from 0 to 1."""
    c, steps = result.counters, result.steps
    seconds = np.array([step.seconds for step in steps])
    hits, asked = _by_sequence(result)
    total = result.seconds or 1.0
    return {
        "steps": len(steps),
        "sequences": len(hits),
        "seconds_per_step": {
            "mean": float(seconds.mean()),
            "ci95": interval(*_seconds_by_sequence(result)),
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
    """Of everything that a result depends on."""
    from hybrimoe_jax import __version__

    return {"hybrimoe_jax": __version__, "python": platform.python_version(), "numpy": np.__version__}


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
