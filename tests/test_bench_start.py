"""`bench start`: what one process tells, and what is made of several."""

from __future__ import annotations

import json
import subprocess
import time

import golden
import jax
import pytest

from hybrimoe_jax.bench import start as bench
from hybrimoe_jax.bench import start_process
from hybrimoe_jax.bench.__main__ import main
from hybrimoe_jax.errors import UserError


def test_a_process_tells_its_parts(checkpoint, capsys):
    jax.clear_caches()  # of the tests before this one
    begun = time.time()
    start_process.main(begun, str(checkpoint), "off")
    took, times = time.time() - begun, json.loads(capsys.readouterr().out)
    assert set(times) == set(bench.PARTS) - {"ending"}
    assert min(times.values()) >= 0 and 0.8 * took < sum(times.values()) < 1.2 * took
    assert times["compiling"] > 0 < times["measuring"]


def test_the_last_line_is_the_record(monkeypatch, capsys):
    caches = []

    def process(model: str, cache: str) -> dict[str, float]:
        caches.append(cache)
        return dict.fromkeys((*bench.PARTS, "total"), 6.0 if cache == "off" else 6.0 / len(set(caches)))

    monkeypatch.setattr(bench, "start_process", process)
    assert main(["start", "--rounds", "2"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    record = json.loads(last)
    golden.check(record)
    assert record["times_faster"]["next"] > 1 and len(record["runs"]["next"]) == 2
    assert caches[0] == "off" and caches[1] == caches[2] != caches[4] == caches[5], "an empty folder in each round"
    assert any(line.startswith("compiling") for line in lines)


def test_what_a_process_says_is_not_lost(monkeypatch):
    done = subprocess.CompletedProcess([], 2, "", "warning: slow\nerror: x: no such file\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: done)
    with pytest.raises(UserError, match="x: no such file"):
        bench.start_process("x", "off")
