"""An engine that nobody closed, and nobody holds any more, leaves nothing behind: no threads, no experts in memory."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref

import pytest
import tiny
from grids import each_once, few

WAYS = {
    "overlapped": {"system": "hybrimoe"},
    "prefetching": {"system": "adapmoe"},
    "the host's kernels": {"system": "ktransformers", "host_kernel": "auto"},
    "dense": {"executor": "dense"},
    "stacked": {"system": "hybrimoe", "slots": "stacked"},
    "callback": {"system": "ktransformers", "executor": "callback"},
    "virtual": {"system": "hybrimoe", "clock": "virtual"},
}


def threads() -> list[str]:
    return sorted(thread.name for thread in threading.enumerate())


def wait_for(wanted: list[str]) -> None:
    """The collector asks threads to end, and does not wait for them."""
    until = time.monotonic() + 20
    while threads() != wanted and time.monotonic() < until:
        time.sleep(0.01)
    assert threads() == wanted


def used(engine, leave: str) -> list[weakref.ref]:
    """What must go with the engine, which has answered and was left in the middle of something."""
    prompts = tiny.prompts(engine.config, (21, 9))
    engine.generate(prompts, max_new_tokens=3)
    if leave == "a stream":
        next(engine.steps(prompts, max_new_tokens=3))
    if leave == "a recording":
        with engine.recording(timeline=True):
            engine.generate(prompts, max_new_tokens=2)
    return [weakref.ref(engine), weakref.ref(engine.store)]


@pytest.mark.parametrize(("way", "leave"), each_once(WAYS, ("nothing", "a stream", "a recording")))
def test_a_dropped_engine_leaves_nothing(way, leave):
    if way == "dense" and leave == "a recording":
        pytest.skip("the dense executor has no layers to record")
    gc.collect()
    before = threads()
    options = {"cache_ratio": 0.0 if way == "callback" else 0.5, **WAYS[way]}
    held = used(tiny.engine(**options), leave)
    gc.collect()
    assert [one() for one in held] == [None, None]
    wait_for(before)


@pytest.mark.parametrize("mode", few(["lru"], ["static", "lru", "hybrid"]))
def test_a_dropped_torch_engine_leaves_nothing(mode):
    pytest.importorskip("torch", reason="the PyTorch baseline needs torch")
    from torch_models import offload

    gc.collect()
    before = threads()
    engine = offload("qwen2_moe", mode=mode, cache_ratio=0.5)
    engine.generate(tiny.prompts(engine.config, (21, 9)), max_new_tokens=3)
    held = weakref.ref(engine)
    del engine
    gc.collect()
    assert held() is None
    wait_for(before)


LEFT = """
import sys
import hybrimoe_jax
left = getattr(hybrimoe_jax, sys.argv[1])(cache_ratio=0.25).steps("To be", max_new_tokens=9)
next(left)
"""


@pytest.mark.parametrize("make", few(["load"], ["load", "TorchOffload"]))
def test_a_stream_that_is_left_until_the_program_ends_says_nothing(make):
    if make == "TorchOffload":
        pytest.importorskip("torch", reason="the PyTorch baseline needs torch")
    done = subprocess.run([sys.executable, "-c", LEFT, make], capture_output=True, text=True, timeout=120)
    said = [line for line in done.stderr.splitlines() if "PyTorch baseline: " not in line]
    assert (done.returncode, done.stdout, said) == (0, "", [])
