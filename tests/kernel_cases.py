"""What the tests of host kernels share: random experts and tokens, and the answer in float64."""

from __future__ import annotations

import numpy as np
import pytest

from hybrimoe_jax.formats.plain import F32, aligned_copy, to_f32
from hybrimoe_jax.host_kernels import ExpertWeights
from hybrimoe_jax.host_kernels.onednn import available

needs_onednn = pytest.mark.skipif(not available(), reason="the onednn-cpu-gomp wheel is not installed")
TOLERANCE = 5e-6


def make_expert(width: int, hidden: int, seed: int = 0, dtype=F32) -> ExpertWeights:
    rng = np.random.default_rng(seed)
    gate_up = rng.standard_normal((2 * hidden, width), np.float32) * width**-0.5
    down = rng.standard_normal((width, hidden), np.float32) * hidden**-0.5
    return ExpertWeights(aligned_copy(gate_up, dtype), aligned_copy(down, dtype))


def tokens_of(load: int, width: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((load, width), np.float32)


def exact(weights: ExpertWeights, x: np.ndarray) -> np.ndarray:
    """The expert in float64, from the definition."""
    gate_up, down = (to_f32(w).astype(np.float64) for w in weights)
    gate, up = np.split(x.astype(np.float64) @ gate_up.T, 2, axis=1)
    return (gate * np.exp(-np.logaddexp(0, -gate)) * up) @ down.T


def assert_close(got: np.ndarray, want: np.ndarray) -> None:
    assert got.dtype == np.float32 and got.shape == want.shape
    assert np.abs(got - want).max() <= TOLERANCE * np.abs(want).max()
