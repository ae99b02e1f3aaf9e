"""The order in which experts cross the link: a demand fetch waits for one prefetch at most, the one that moves."""

from __future__ import annotations

import time

import jax
import numpy as np
import pytest
import tiny
from fake_device import Fault, Recorder

from hybrimoe_jax.checkpoint.expert_store import ExpertStore
from hybrimoe_jax.engine.lanes.clock import PacedClock, WallClock
from hybrimoe_jax.engine.lanes.paced_link import PacedLink
from hybrimoe_jax.engine.lanes.pacing import Pacing
from hybrimoe_jax.engine.lanes.transfer import Link
from hybrimoe_jax.errors import DeviceError


class Model:
    """What a recorder and a fault want of an engine."""

    def __init__(self):
        self.store = ExpertStore.from_arrays(tiny.weights("qwen2_moe")[2])


def wait_until(condition) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


def test_a_demand_fetch_passes_prefetches_that_wait(monkeypatch):
    model, link = Model(), Link(jax.devices()[0], WallClock())
    fault = Fault(monkeypatch, model, "link", "hangs")  # the first prefetch takes its time
    seen = Recorder(monkeypatch)
    seen.watch(model)
    for expert in range(4):
        link.prefetch(0, expert, model.store.get(0, expert))
    wait_until(lambda: fault.met)
    demanded = link.arrived(link.fetch(1, 5, model.store.get(1, 5)))
    assert [copy.thread for copy in seen.copies] == ["link", "MainThread"]
    assert all(map(np.array_equal, demanded, model.store.get(1, 5)))
    fault.release()
    link.drain()
    assert [copy.thread for copy in seen.copies] == ["link", "MainThread", "link", "link", "link"]
    link.close()


@pytest.mark.parametrize("system", ["adapmoe", "hybrimoe"])
def test_no_demand_fetch_of_a_run_has_more_than_one_prefetch_ahead(system, monkeypatch):
    engine = tiny.engine(
        system=system, cache_ratio=0.5, lookahead=2, profile=tiny.costs(tiny.weights("qwen2_moe")[0], cpu=20)
    )
    seen = Recorder(monkeypatch)
    seen.watch(engine)
    engine.generate(tiny.prompts(engine.config, (21,)), max_new_tokens=24)
    engine.close()
    ahead = {thread: [copy.ahead for copy in seen.copies if copy.thread == thread] for thread in ("link", "MainThread")}
    assert max(ahead["link"]) == 0, "a prefetch begins once the one before has landed"
    assert max(ahead["MainThread"]) <= 1 and len(ahead["MainThread"]) > 4


@pytest.mark.parametrize(("slots", "write"), [("separate", "write_slot"), ("stacked", "write_stacked")])
def test_copies_are_started_before_the_compute_that_would_be_queued_in_front_of_them(slots, write, monkeypatch):
    engine = tiny.engine("mixtral", system="on-demand", cache_ratio=0.5, slots=slots)
    seen = Recorder(monkeypatch)
    seen.watch(engine)
    engine.generate(tiny.prompts(engine.config, (21,)), max_new_tokens=8)
    engine.close()
    names = [event.name for event in seen.events]
    layers = " ".join(names).split("front")[1:]
    several = 0
    for layer in map(str.split, layers):
        copies, written = layer.count("expert"), 0
        several += copies > 1
        for at, name in enumerate(layer):
            started = layer[:at].count("expert")
            if name == write:
                assert started >= min(copies, written + 2), "the link has nothing to do while this one is computed"
                written += 1
            elif name in ("dense_rows", "gathered_rows", "add_chosen", "add_gathered"):
                assert started >= min(copies, 2)
        assert written >= copies
    assert several > 4


@pytest.fixture
def paced():
    costs = tiny.costs(tiny.weights("qwen2_moe")[0], transfer=200)
    link = PacedLink(jax.devices()[0], PacedClock(Pacing(costs)))
    yield link, costs.transfer()
    link.close()


def test_a_paced_link_keeps_its_pace_after_a_copy_that_failed(paced, monkeypatch):
    link, seconds = paced
    model = Model()
    fault = Fault(monkeypatch, model, "link", "raises")
    failed = link.fetch(0, 0, model.store.get(0, 0))
    with pytest.raises(RuntimeError, match="the copy failed"):
        link.arrived(failed)
    fault.mend()
    transfer = link.fetch(0, 1, model.store.get(0, 1))
    assert all(map(np.array_equal, link.arrived(transfer), model.store.get(0, 1)))
    assert transfer.seconds > 0.9 * seconds and transfer.issued <= transfer.began


def test_a_paced_link_gives_up_a_copy_that_hangs(paced, monkeypatch):
    link, seconds = paced
    model = Model()
    link.patience_s = 0.3
    fault = Fault(monkeypatch, model, "link", "hangs")
    stuck = link.fetch(0, 0, model.store.get(0, 0))
    with pytest.raises(DeviceError, match="expert 0 of MoE layer 0 has not reached the device"):
        link.arrived(stuck)
    link.patience_s = 30.0
    for release in (False, True):
        if release:
            fault.release()
        transfer = link.fetch(0, 1, model.store.get(0, 1))
        assert all(map(np.array_equal, link.arrived(transfer), model.store.get(0, 1)))
        assert transfer.seconds > 0.9 * seconds
