"""The GPU scripts work where there is no GPU: every part reports, a part that fails stops no other, and the exit
code says so."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "gpu_facts.py"


@pytest.fixture
def gpu_facts(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module("gpu_facts")


@pytest.mark.slow
def test_every_part_measures_something_on_the_cpu_backend():
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    *table, last = done.stdout.splitlines()
    record = json.loads(last)
    assert record["platform"] == "cpu" and record["small"] and record["failed"] == {}
    assert set(record["facts"]) == {
        "read-back",
        "transfer",
        "callback",
        "slots",
        "dispatch",
        "threads",
        "packed",
        "cuda",
        "precision",
    }
    for part, facts in record["facts"].items():
        assert part in table
        for name, value in facts.items():
            assert value >= 0 if "overlap" in name else value > 0, (part, name)
    cuda = record["facts"]["cuda"]
    assert max(value for name, value in cuda.items() if "difference" in name) < 10
    assert {name.split(", ")[2].split(":")[0] for name in cuda if "(us)" in name} == {"xla", "cuda"}
    assert record["facts"]["slots"]["written in place (1 yes, 0 no)"] == 1
    orders = {name.split(", ", 1)[1].split(":")[0] for name in record["facts"]["transfer"] if "overlap" in name}
    assert orders == {"put, compute", "compute, put"}


def test_a_failing_part_is_named_and_the_next_one_still_runs(gpu_facts, monkeypatch, capsys):
    def broken(sizes, repeats):
        raise ValueError("no such memory")

    monkeypatch.setitem(gpu_facts.PARTS, "slots", broken)
    monkeypatch.setattr(sys, "argv", ["gpu_facts.py", "--small", "--part", "slots", "--part", "dispatch"])
    assert gpu_facts.main() == 1
    out = capsys.readouterr().out
    record = json.loads(out.splitlines()[-1])
    assert record["failed"] == {"slots": "ValueError: no such memory"}
    assert list(record["facts"]) == ["dispatch"]
    assert "slots: FAILED" in out


def test_host_arrays_are_aligned_or_not_as_asked(gpu_facts):
    for aligned in (True, False):
        array = gpu_facts.gpu_link.host_array(0.25, aligned)
        assert (array.ctypes.data % 64 == 0) == aligned
        assert array.nbytes == pytest.approx(0.25e6, rel=0.02)
