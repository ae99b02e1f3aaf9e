"""Grids of parameters and random examples, of which a few cases run by default and all with `--slow`."""

from __future__ import annotations

import itertools

import hypothesis
import pytest


def few(by_default, cases) -> list:
    """All `cases`, marked slow but for those of `by_default`."""
    by_default, cases = list(by_default), list(cases)
    assert all(case in cases for case in by_default)
    tuples = all(isinstance(case, tuple) for case in cases)
    return [
        pytest.param(*(case if tuples else (case,)), marks=[pytest.mark.slow] * (case not in by_default))
        for case in cases
    ]


def each_once(*axes) -> list:
    """All combinations, of which by default so many run that each value occurs."""
    axes = [list(axis) for axis in axes]
    longest = max(map(len, axes))
    diagonal = [tuple(axis[i % len(axis)] for axis in axes) for i in range(longest)]
    return few(diagonal, itertools.product(*axes))


def examples(count: int) -> hypothesis.settings:
    """So many random examples with `--slow`, by default a share of them."""
    return hypothesis.settings(max_examples=count * hypothesis.settings().max_examples // 100)
