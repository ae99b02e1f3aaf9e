"""The least time that a machine's own figures allow: for each lane bytes over bandwidth, or operations over the peak.

Two kinds. Where all lanes are one processor's, the floor is that of the work itself: every activated expert and every
other matrix is read once in a step, whoever computes it; copies are not needed, so they count for nothing. On a GPU or
a paced device it is that of the plan: the busiest lane's seconds by the measured costs, or by the profile. Kernels that
round activations (`-a8`) have another peak, which is not measured: there bytes alone count.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np

SMALLEST, LARGEST = 16 << 20, 1 << 28
"""Bytes that bandwidth is measured over: a model that fits into the processor's caches is read from there."""


def machine_figures(nbytes: int, seconds: float = 0.4) -> dict[str, float]:
    """Bytes a second read by a product with a vector over `nbytes`, and operations a second of a product of matrices.

    Both in float32, on all cores, by NumPy's BLAS: nearly the best that was seen.
    """
    rows = max(1, min(max(nbytes, SMALLEST), LARGEST) // (4 * 4096))
    matrix, vector, out = np.ones((rows, 4096), np.float32), np.ones(4096, np.float32), np.empty(rows, np.float32)
    left, right = np.ones((768, 2048), np.float32), np.ones((2048, 768), np.float32)
    product = np.empty((768, 768), np.float32)
    reading = fastest(lambda: np.dot(matrix, vector, out), seconds)
    computing = fastest(lambda: np.dot(left, right, product), seconds)
    return {"bandwidth": matrix.nbytes / reading, "peak": 2 * left.size * right.shape[1] / computing}


def fastest(run: Any, seconds: float) -> float:
    """The 10th percentile of a call's times: the least of all is a matter of luck."""
    times, end = [], time.perf_counter() + seconds
    run()
    while time.perf_counter() < end or len(times) < 5:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.quantiles(times, n=10)[0]


def work_floor(
    sizes: dict[str, Any], phase: dict[str, Any], decoding: bool, tokens: int, figures: dict[str, float]
) -> float:
    """Seconds of a phase of one processor, all its steps together. What attention computes is left out.

    Args:
      sizes: of the model, as a contender's `sizes` gives them.
      phase: of a run, as `served.phase_work` gives it: of decoding, or of the prompt.
      tokens: of the prompt, which a decode step's attention reads the cache of.
      figures: see `machine_figures`; without "peak", bytes alone count.
    """
    experts, loads = sum(phase["experts"].values()), sum(phase["loads"].values())
    nbytes = experts * sizes["expert_bytes"] + phase["steps"] * sizes["dense_bytes"]
    nbytes += phase["steps"] * tokens * sizes["cache_bytes_per_token"] if decoding else 0
    passed = phase["steps"] if decoding else tokens
    operations = loads * sizes["expert_operations"] + passed * sizes["dense_operations"]
    operations += phase["steps"] * sizes["head_operations"]
    peak = figures.get("peak")
    return max(nbytes / figures["bandwidth"], operations / peak if peak else 0.0)
