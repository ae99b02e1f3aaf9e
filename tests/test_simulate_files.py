"""What a simulation keeps between runs follows its files; pictures and timelines leave a run's own files alone."""

from __future__ import annotations

import json
from importlib import resources

import numpy as np
import pytest

import hybrimoe_jax as hj
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.simulate import __main__ as simulate
from hybrimoe_jax.simulate.synthetic import Knobs, synthetic_trace
from hybrimoe_jax.trace.file import save_trace

CASE = {"machine": "a6000-paper", "systems": ["on-demand"]}


def written(path, tokens: int, seed: int, stay: float = 0.1):
    trace = synthetic_trace("mixtral-8x7b", sequences=2, tokens=tokens, seed=seed, knobs=Knobs(1.0, stay, 0.4))
    save_trace(trace, path)
    return trace


def test_a_trace_that_is_written_anew_is_read_anew(tmp_path, monkeypatch):
    first = written(tmp_path / "run.npz", 4, 1)
    assert hj.replay(tmp_path / "run.npz", **CASE).records[0]["steps"] == 8
    second = written(tmp_path / "run.npz", 7, 2, stay=0.9)
    (again,), (directly,) = hj.replay(tmp_path / "run.npz", **CASE), hj.replay(second, **CASE)
    assert again["steps"] == 14
    for what in ("hit_rate", "seconds_per_step", "bound_seconds_per_step"):
        assert again[what] == directly[what], what
    (tmp_path / "other").mkdir()
    save_trace(first, tmp_path / "other" / "run.npz")
    for folder, steps in ((tmp_path, 14), (tmp_path / "other", 8)):  # one relative path, two files
        monkeypatch.chdir(folder)
        assert hj.replay("run.npz", **CASE).records[0]["steps"] == steps


def test_the_bound_is_that_of_the_profile_as_it_is_now(tmp_path):
    trace = written(tmp_path / "run.npz", 4, 1)
    text = (resources.files("hybrimoe_jax.machine") / "profiles" / "a6000-paper.json").read_text()
    profile, before = tmp_path / "mine.json", None
    for faster in (1.0, 10.0):
        values = json.loads(text)
        for figure in values["figures"].values():
            per_second = figure["unit"].endswith("/s")
            figure["value"] *= faster if per_second else 1 / faster
        profile.write_text(json.dumps(values))
        (record,) = hj.replay(trace, machine=str(profile), systems=["on-demand"], ratios=0.0)
        assert record["bound_seconds_per_step"] <= record["seconds_per_step"]["mean"]
        assert record["bound_seconds_per_step"] != before
        before = record["bound_seconds_per_step"]


@pytest.mark.parametrize("flags", [["--timeline", "t.json"], ["--plots", "pictures"]])
def test_the_state_that_is_kept_is_that_of_the_whole_run(flags, tmp_path, monkeypatch):
    if "--plots" in flags:
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    run = "--trace synthetic:mixtral-8x7b --systems on-demand --cache-ratios 0.5 --starts cold --steps 40".split()
    for name, more in (("plain.npz", []), ("with.npz", flags)):
        assert simulate.main([*run, "--save-cache-state", name, *more]) == 0
    one, other = (np.load(tmp_path / name)["meta"] for name in ("plain.npz", "with.npz"))
    assert str(one) == str(other)


def test_two_systems_of_one_name_are_refused(tmp_path):
    trace = written(tmp_path / "run.npz", 4, 1)
    mine, other = hj.system("mine", cache="lru"), hj.system("mine", cache="lfu")
    with pytest.raises(UserError, match="two different systems are called 'mine'"):
        hj.replay(trace, machine="a6000-paper", systems=[mine, other])
    assert len(hj.replay(trace, machine="a6000-paper", systems=[mine, mine])) == 1
    for name in ("oracle", "belady", "hybrimoe"):
        with pytest.raises(UserError, match="is there already"):
            hj.system(name, cache="random")
