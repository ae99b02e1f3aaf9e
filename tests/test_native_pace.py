"""Programs that last as long as they are told, in a process whose XLA pool has two threads; and what they are told."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tiny

from hybrimoe_jax.engine.lanes.clock import PacedClock, VirtualClock, WallClock
from hybrimoe_jax.engine.lanes.pacing import NoPacing, Pacing, block_seconds, sleep_until
from hybrimoe_jax.host_kernels.native import pace
from hybrimoe_jax.machine.profile import PROFILES, load_profile
from hybrimoe_jax.machine.shapes import get_shape
from hybrimoe_jax.machine.virtual import VirtualMachine

PACED = pytest.mark.skipif(not pace.available(), reason="the package was installed without its FFI handlers")


def test_a_sleep_is_never_too_short_and_leaves_the_interpreter_to_others():
    counted, going = [0], True

    def count():
        while going:
            counted[0] += 1

    other = threading.Thread(target=count)
    other.start()
    try:
        for seconds in (0.03, 0.03, 1e-5, -1.0):
            before, until = counted[0], time.perf_counter() + seconds
            late = sleep_until(until)
            assert 0 <= late <= time.perf_counter() - until
            assert seconds < 0.01 or counted[0] > before
    finally:
        going = False
        other.join()


@PACED
@pytest.mark.alone
def test_programs_last_as_long_as_they_are_told_and_the_host_works_beside():
    script = str(Path(__file__).with_name("paced_handlers.py"))
    done = subprocess.run([sys.executable, script, "2"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    assert got["same"] and got["unpaced"]
    assert got["dispatch"] < 0.020 < 0.039 < got["one"] < 0.060
    assert got["rest"] < 0.035, "it lasts from when it was dispatched, 30 ms before"
    assert 0.199 < got["five"] < 0.230, "programs queue, and neither gaps nor sleeps add up"
    assert got["beside"] < 0.060, "the host is free while a program sleeps"
    assert 0.399 < got["worked"] < 0.4 + max(0.03, 0.5 * got["work"]), "a program's own work counts"
    assert 0.044 < got["block"] < 0.065, "shared, and the experts that run"
    assert got["overshoot"]["count"] >= 8 and got["after_reset"] == 0
    assert 0 <= got["overshoot"]["sum_s"] < 0.02 and got["overshoot"]["overrun"] <= 1


def test_what_programs_are_told():
    costs = tiny.costs(tiny.weights("qwen2_moe")[0]).slowed(1000)
    pacing = Pacing(costs)
    told = [pacing.front(3, 9, True), pacing.front(3, 9, False), pacing.experts([4, 1]), pacing.step(3)]
    wanted = [costs.layer(3, 9) + costs.look, costs.layer(3, 9), costs.device(1) + costs.device(4), costs.step(3)]
    assert [float(array[pace.ABOUT]) for array in told] == pytest.approx(wanted)
    times = [array[: pace.ABOUT].view(np.float64)[0] for array in told]
    assert times == sorted(times) and 0 <= time.perf_counter() - times[0] < 60, "when each was asked for"
    table = pacing.block(3, rows=4)
    assert table.shape == pacing.block(4).shape == (pace.ABOUT + 5,)
    assert table[pace.ABOUT :].tolist() == pytest.approx(
        [costs.shared(3), *(costs.device(min(n, 3)) for n in (1, 2, 3, 4))]
    )
    import jax.numpy as jnp

    loads = jnp.array([0, 2, 0, 1])
    seconds = costs.shared(3) + costs.device(2) + costs.device(1)
    assert float(block_seconds(table, loads)) == pytest.approx(seconds)
    assert block_seconds(None, loads) is None


def test_only_a_paced_clock_paces():
    costs = tiny.costs(tiny.weights("qwen2_moe")[0])
    for clock in (WallClock(), VirtualClock(VirtualMachine(costs))):
        unpaced = clock.pacing
        assert type(unpaced) is NoPacing
        told = unpaced.front(1, 1, True), unpaced.block(1), unpaced.experts([1]), unpaced.step(1)
        assert told == (None,) * 4
    clock = PacedClock(Pacing(costs))
    assert (
        clock.name == "paced" and clock.planning_time() <= clock.now() and float(clock.pacing.step(1)[pace.ABOUT]) == 0
    )


@pytest.mark.parametrize("name", PROFILES)
def test_a_slowed_machine_takes_so_many_times_as_long_for_everything(name):
    costs = load_profile(name).costs(get_shape("deepseek-v2-lite"), "int4-g64")
    slow = costs.slowed(20)
    assert slow.describe()["slowdown"] == 20 and slow.source.endswith(", 20 times slower")
    for method, *arguments in (
        ("cpu", 3, True),
        ("cpu", 300),
        ("device", 1),
        ("device", 500),
        ("shared", 7),
        ("transfer",),
        ("transfer", True),
        ("layer", 2, 900),
        ("step", 30),
    ):
        assert getattr(slow, method)(*arguments) == pytest.approx(20 * getattr(costs, method)(*arguments)), method
    assert slow.look == pytest.approx(20 * costs.look)


def test_a_slowed_warm_up_too():
    costs = tiny.costs(tiny.weights("qwen2_moe")[0])
    slow = costs.slowed(8)
    assert slow.transfer(True) == pytest.approx(8 * costs.transfer(True)) and slow.source.endswith("8 times slower")
    assert slow.cpu(2, True) == pytest.approx(8 * costs.cpu(2, True))
    assert costs.slowed(1) == costs
