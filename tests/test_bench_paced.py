"""`bench paced`: what it compares, and that it runs."""

from __future__ import annotations

import json
import subprocess
import sys

import golden
import pytest

from hybrimoe_jax.bench import paced
from hybrimoe_jax.bench.__main__ import main
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.host_kernels.native import pace


def row(virtual: float, ratio: float) -> dict:
    made = {"ttft_ms": virtual, "tbt_ms": virtual, "overshoot": {"cpu": {"count": 2, "sum_s": 1e-4}}}
    made |= {"layer_ms": 9.0, "counts": {}}
    wall = {**made, "ttft_ms": virtual, "tbt_ms": virtual * ratio}
    return paced._row([wall, wall], [made, {**made, "layer_ms": 1.0}])


def test_how_far_the_wall_is_from_the_virtual_clock():
    rows = {"ktransformers": row(10.0, 1.1), "hybrimoe": row(8.0, 1.02), "on-demand": row(20.0, 1.0)}
    paced._compare(rows)
    assert rows["hybrimoe"]["tbt_ratio"] == pytest.approx(1.02) and rows["hybrimoe"]["ttft_ratio"] == 1
    assert rows["hybrimoe"]["speed"] == pytest.approx(11 / 8.16) and rows["hybrimoe"]["virtual_speed"] == 1.25
    assert rows["hybrimoe"]["overshoot_us"] == {"cpu": pytest.approx(50)} and rows["hybrimoe"]["own_layer_ms"] == 5
    bar = paced.bars(rows)["tbt"]
    assert bar["most_off"] == pytest.approx(0.1) and bar["spread"] == pytest.approx(0.1) and not bar["swapped"]
    rows["on-demand"] = row(20.0, 0.4)  # faster by the wall, far slower by the virtual clock
    bar = paced.bars(rows)["tbt"]
    assert ("ktransformers", "on-demand") in bar["swapped"] and not bar["met"]
    text = paced.table({"profile": "p", "slowdown": 8.0, "systems": rows, "bars": paced.bars(rows)})
    assert "paced: p, 8 times slower than it" in text and "ktransformers and on-demand" in text


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--machines", "a6000-paper:0"], "slowdown must be a number from 1e-6 to 1e6"),
        (["--machines", "a6000-paper:1e-310"], "slowdown must be a number from 1e-6 to 1e6"),
        (["--machines", "nowhere"], "nowhere"),
        (["--systems", "nope"], "nope"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--new", "2"], "--new must be at least 3"),
    ],
)
def test_bad_input_is_refused(flags, said):
    with pytest.raises(UserError, match=said):
        main(["paced", *flags])


@pytest.mark.slow
@pytest.mark.skipif(not pace.available(), reason="the package was installed without its FFI handlers")
def test_the_command_prints_a_table_and_a_line():
    flags = ["--machines", "a6000-engineered:2", "--systems", "ktransformers,on-demand", "--rounds", "1", "--new", "3"]
    command = [sys.executable, "-m", "hybrimoe_jax.bench", "paced", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    golden.check(record)
    assert record["device"] == "paced" and record["clock"] == "wall"
    found = record["machines"]["a6000-engineered:2"]
    assert set(found["systems"]) == {"ktransformers", "on-demand"} and found["slowdown"] == 2
    for seen in found["systems"].values():
        assert seen["tbt_ms"] > 0 and seen["counts"] == seen["virtual_counts"]
    assert "paced: a6000-engineered, 2 times slower than it" in done.stdout
