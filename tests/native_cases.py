"""What the native kernels' tests share: the instruction sets, and random runs of experts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import strategies as st

from hybrimoe_jax.host_kernels.native import library

ISAS = ("avx512vnni", "avx512", "avxvnni", "avx2", "portable")
HERE = library.isas() if library.available() else {}
needs_native = pytest.mark.skipif(not HERE, reason="the package was installed without a C++ compiler")


def every_isa(test):
    marks = {isa: pytest.mark.skipif(isa not in HERE, reason=f"no {isa} here") for isa in ISAS}
    return pytest.mark.parametrize("isa", [pytest.param(isa, marks=mark) for isa, mark in marks.items()])(test)


def runs(width: int, hidden: int, count: int) -> dict:
    """Strategies for a run of experts: its sizes up to these, tokens and threads."""
    return dict(
        seed=st.integers(0, 999),
        width=st.integers(1, width),
        hidden=st.integers(1, hidden),
        total=st.integers(1, 40),
        count=st.integers(1, count),
        threads=st.integers(1, 4),
    )


def routing(rng: np.random.Generator, total: int, count: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Per expert random rows of `total` (some none) and a routing weight for each."""
    rows = [np.sort(rng.choice(total, rng.integers(0, total + 1), replace=False)) for _ in range(count)]
    return rows, [rng.standard_normal(len(r)).astype(np.float32) for r in rows]
