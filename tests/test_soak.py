"""Whether the soak would notice: what grows between the middle third of a run and the last."""

from __future__ import annotations

import importlib

import pytest


@pytest.fixture
def soak(monkeypatch):
    monkeypatch.setenv("HYBRIMOE_START_CACHE", "off")  # which the module sets for its process
    return importlib.import_module("soak")


def samples(count: int = 30, **growing: float) -> list[dict[str, int]]:
    """Of a run, in which these grow by so much from one engine to the next."""
    usual = {"memory": 700_000_000, "threads": 19, "files": 6, "arrays": 40, "programs": 90}
    return [{what: int(held + growing.get(what, 0) * n) for what, held in usual.items()} for n in range(count)]


def test_what_is_flat_is_not_reported(soak):
    assert soak.grown(samples()) == []
    assert soak.grown(samples(memory=0.2e6)) == [], "what an allocator keeps comes and goes"


@pytest.mark.parametrize(("what", "by"), [("memory", 1e6), ("threads", 1), ("files", 0.2), ("arrays", 2)])
def test_what_grows_is_named(soak, what, by):
    (said,) = soak.grown(samples(**{what: by}))
    assert said.startswith(f"{what} grow")


def test_programs_explain_memory_and_a_short_run_tells_nothing(soak):
    assert soak.grown(samples(memory=1e6, programs=1)) == []
    assert soak.grown(samples(5)) == ["too short to tell whether anything grows"]


def test_every_system_is_soaked_at_every_ratio(soak):
    from hybrimoe_jax.decide.systems import SYSTEMS

    held = {(case["system"], case["cache_ratio"]) for case in soak.CASES}
    assert {(s, r) for s in SYSTEMS if s not in ("oracle", "cpu-only") for r in soak.RATIOS} <= held
