"""Whatever fails once in a step, wherever and however: one error, nothing hangs, and the next two answers are exact."""

from __future__ import annotations

import ctypes
import sys
import threading

import pytest
import tiny
from grids import each_once

from hybrimoe_jax.decide.planner import Planner
from hybrimoe_jax.decide.residency.residency import Residency
from hybrimoe_jax.engine.lanes import host, slots
from hybrimoe_jax.engine.lanes.transfer import Link
from hybrimoe_jax.engine.recording import EngineTimeline
from hybrimoe_jax.engine.steps import callback
from hybrimoe_jax.errors import DeviceError

SLOW_CPU, FAST_CPU = 1000, 1.0
"""So slow that its work goes to a worker thread; of the device's speed."""
PLACES = {
    "an expert is read": (None, "_read", 5, {"lazy": True}),
    "an expert is copied to the device": (Link, "put", 9, {}),
    "an expert is copied ahead": (Link, "_copy", 1, {}),
    "a slot is written": (slots, "write_slot", 9, {}),
    "a layer is planned": (Planner, "plan", 8, {}),
    "a prefetch gets a slot": (Residency, "admit_landed", 1, {}),
    "a prefetch is planned": (Planner, "prefetch", 1, {}),
    "the host computes": (host, "run_experts", 6, {"system": "ktransformers", "cpu": SLOW_CPU}),
    "the host is called back": (callback, "run_experts", 2, {"system": "ktransformers", "executor": "callback"}),
}


def build(**options):
    profile = tiny.costs(tiny.weights("qwen2_moe")[0], cpu=options.pop("cpu", FAST_CPU))
    return tiny.engine(**{"system": "adapmoe", "cache_ratio": 0.5, "debug": True, "profile": profile, **options})


def answer(engine) -> list[list[int]]:
    return engine.generate(tiny.prompts(engine.config, (21, 9)), max_new_tokens=8).token_ids


@pytest.fixture(scope="module")
def wanted():
    engine = tiny.engine(executor="dense")
    yield answer(engine)
    engine.close()


@pytest.mark.parametrize(("place", "raised"), each_once(PLACES, (RuntimeError, MemoryError, KeyboardInterrupt)))
def test_what_fails_once_ends_one_run(place, raised, wanted, monkeypatch):
    owner, name, call, options = PLACES[place]
    engine = build(**options)
    with monkeypatch.context() as patch:
        fail_once(patch, engine.store if owner is None else owner, name, call, raised)
        with pytest.raises(raised, match="it failed once"):
            for _ in range(50):  # the prefetches that there are depend on measured times
                answer(engine)
    assert answer(engine) == answer(engine) == wanted
    counts = engine.planner.counters
    assert counts.prefetch_issued == counts.prefetch_useful + counts.prefetch_late + counts.prefetch_wasted
    engine.close()


def fail_once(patch, target, name: str, call: int, raised: type[BaseException]) -> None:
    """The `call`-th call of `target.name` raises."""
    original, count = getattr(target, name), 0

    def once(*args, **kwargs):
        nonlocal count
        count += 1
        if count == call:
            raise raised("it failed once")
        return original(*args, **kwargs)

    patch.setattr(target, name, once)


@pytest.fixture
def kill():
    """Raises SystemExit in the threads of a name, where they next run Python: with the next task in their hands.

    Until they do, this thread is not traced: Python 3.11 would enter its next traced function for ever.
    """
    trace = sys.gettrace()

    def threads_of(name: str) -> None:
        sys.settrace(None)
        for thread in threading.enumerate():
            if thread.name.startswith(name):
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))

    yield threads_of
    sys.settrace(trace)


@pytest.mark.parametrize(
    ("thread", "options"),
    [
        ("link", {"system": "adapmoe"}),
        ("link", {"system": "freetoken"}),
        ("host-experts", {"system": "ktransformers", "cpu": SLOW_CPU}),
    ],
)
def test_a_thread_that_dies_ends_one_run(thread, options, wanted, kill):
    engine = build(**options)
    assert answer(engine) == wanted
    kill(thread)
    with pytest.raises(DeviceError, match=f"the thread {thread}.* has died .SystemExit"):
        answer(engine)
    assert answer(engine) == answer(engine) == wanted
    engine.close()


def test_a_timeline_whose_watcher_died_ends(wanted, kill):
    engine = build()
    timeline = EngineTimeline(engine)
    kill("timeline")
    engine.record(timeline=timeline)
    assert answer(engine) == wanted
    timeline.so_far()
    timeline.finish()
    engine.close()


def test_a_host_kernel_that_hangs_ends_one_run(wanted, monkeypatch):
    engine = build(system="ktransformers", cpu=SLOW_CPU)
    assert answer(engine) == wanted
    released, run_experts, calls = threading.Event(), host.run_experts, []

    def hanging(*args):
        calls.append(args)
        if len(calls) == 3:
            released.wait()
        return run_experts(*args)

    costs, wake_s = engine.costs, engine._parts.host.expected[0]
    assert wake_s > 0 and costs is engine._parts.host.expected[1]
    with monkeypatch.context() as patch:
        patch.setattr(host, "run_experts", hanging)
        patch.setattr(engine._parts.host, "expected", (1e-6, tiny.costs(engine.config, cpu=0.01)))
        with pytest.raises(DeviceError, match=r"host experts of MoE layer 2 have not been computed in .* may hang"):
            answer(engine)
    assert answer(engine) == wanted, "while the first thread still hangs"
    released.set()
    assert answer(engine) == wanted, "and after it came back"
    engine.close()


def test_a_prefetch_that_nobody_moves_ends_one_run(wanted, monkeypatch):
    engine = build()
    link = engine._parts.link
    with monkeypatch.context() as patch:
        patch.setattr(link, "patience_s", 0.4)
        patch.setattr(link._worker, "put", lambda transfer: None)
        with pytest.raises(DeviceError, match=r"has not reached the device in 0\.4 s"):
            for _ in range(100):
                answer(engine)
    assert answer(engine) == answer(engine) == wanted
    engine.close()
