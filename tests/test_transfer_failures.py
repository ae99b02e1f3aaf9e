"""A transfer that fails or hangs ends its step with one error; the next step answers as if nothing had been."""

from __future__ import annotations

import threading
import time

import jax
import jax.numpy as jnp
import pytest
import tiny
from fake_device import Fault
from grids import few

from hybrimoe_jax.engine.lanes import slots as separate
from hybrimoe_jax.engine.lanes import stacked
from hybrimoe_jax.engine.lanes.transfer import PATIENCE
from hybrimoe_jax.errors import DeviceError

WRITES = {"separate": "write_slot", "stacked": "write_stacked"}
# what crosses the link, the phase in which it does, the system, the thread that copies
ROUTES = [
    ("prefetch", "prefill", "adapmoe", "link"),
    ("prefetch", "decode", "adapmoe", "link"),
    ("streamed layer", "prefill", "freetoken", "link"),
    ("demand", "prefill", "on-demand", "MainThread"),
    ("demand", "decode", "on-demand", "MainThread"),
]


def run(engine, tokens: int = 8) -> list[int]:
    """A greedy run."""
    (prompt,), made = tiny.prompts(engine.config, (21,)), []
    for emitted in engine.steps([prompt], max_new_tokens=tokens):
        made += [token for _, token in emitted.tokens]
    return made


@pytest.fixture
def broken(request, monkeypatch):
    """-> (engine, what it answers, a function that runs it while a copy fails `how` and gives the error)."""
    kind, phase, system, thread = request.param
    engine = tiny.engine(system=system, cache_ratio=0.5, debug=True)
    want = run(engine)
    before = 2 if kind == "streamed layer" else 0  # the first two experts of the first layer are not asked for
    if phase == "decode":
        counted = Fault(monkeypatch, engine, thread, "counted", call=0)
        run(engine, 1)
        counted.mend()
        before = counted.copies

    def fail(how: str) -> tuple[BaseException, Fault]:
        fault = Fault(monkeypatch, engine, thread, how, before + 1)
        with pytest.raises((RuntimeError, DeviceError)) as raised:
            run(engine, 200)
        assert fault.met
        fault.mend()
        return raised.value, fault

    yield engine, want, fail
    engine.close()


@pytest.mark.parametrize("broken", ROUTES, ids=lambda route: f"{route[0]}, {route[1]}", indirect=True)
def test_a_copy_that_fails_ends_one_step(broken):
    engine, want, fail = broken
    error, _ = fail("raises")
    assert str(error) == "INTERNAL: the copy failed"
    assert run(engine) == run(engine) == want


@pytest.mark.parametrize(
    "broken",
    [route for route in ROUTES if route[3] == "link"],
    ids=lambda route: f"{route[0]}, {route[1]}",
    indirect=True,
)
def test_a_copy_that_hangs_ends_one_step(broken):
    engine, want, fail = broken
    link = engine._parts.link
    wake_s, costs = engine._parts.host.expected
    assert link.patience_s == PATIENCE * (wake_s + costs.transfer(True))
    link.patience_s = 0.4
    began = time.monotonic()
    error, fault = fail("hangs")
    assert isinstance(error, DeviceError) and "has not reached the device in 0.4 s" in str(error)
    assert time.monotonic() - began < 20
    link.patience_s = 60.0
    assert run(engine) == want, "while the first thread still hangs"
    fault.release()
    assert run(engine) == want, "and after it came back"


def slow_copy(seconds: float):
    """A program that gives back its argument after about so long."""

    @jax.jit
    def slowly(arrays, rounds):
        one = jnp.ones((64, 64)) / 64
        waited = jax.lax.fori_loop(0, rounds, lambda _, x: x @ one, one)[0, 0]
        return jax.tree.map(lambda array: jnp.where(jnp.isnan(waited), 0, array).astype(array.dtype), arrays)

    jax.block_until_ready(slowly(jnp.ones(4), 1))
    start = time.monotonic()
    jax.block_until_ready(slowly(jnp.ones(4), 10_000))
    rounds = int(10_000 * seconds / (time.monotonic() - start))
    return lambda arrays: slowly(arrays, rounds)


@pytest.mark.parametrize("slots", few(["separate"], ["separate", "stacked"]))
def test_a_demand_fetch_that_hangs_on_the_device_ends_one_step(slots, monkeypatch):
    engine = tiny.engine(system="on-demand", cache_ratio=0.5, slots=slots)
    want, link = run(engine), engine._parts.link
    put, slowly, calls = link.put, slow_copy(3.0), 0

    def slow_put(weights):
        nonlocal calls
        calls += 1
        return slowly(put(weights)) if calls == 3 else put(weights)

    monkeypatch.setattr(link, "put", slow_put)
    monkeypatch.setattr(link, "_copies", False)  # as on a device whose copies may hang
    link.patience_s = 0.3
    with pytest.raises(DeviceError, match=r"a demand fetch has not reached the device in 0\.3 s"):
        run(engine)
    monkeypatch.setattr(link, "put", put)
    link.patience_s = 60.0
    assert run(engine) == want
    engine.close()


@pytest.mark.parametrize(("slots", "owner"), [("separate", separate), ("stacked", stacked)])
@pytest.mark.parametrize("system", ["on-demand", "adapmoe"])
def test_a_slot_that_cannot_be_written_ends_one_step(system, slots, owner, monkeypatch):
    engine, name = tiny.engine(system=system, slots=slots, cache_ratio=0.5, debug=True), WRITES[slots]
    want, write, left = run(engine), getattr(owner, name), 9

    def broken_write(*args):
        nonlocal left
        left -= 1
        if left == 0:
            raise RuntimeError("INTERNAL: the write failed")
        return write(*args)

    monkeypatch.setattr(owner, name, broken_write)
    with pytest.raises(RuntimeError, match="the write failed"):
        run(engine)
    assert run(engine) == want
    engine.close()


def test_an_engine_closes_while_a_copy_hangs(monkeypatch):
    before = threading.active_count()
    engine = tiny.engine(system="adapmoe", cache_ratio=0.5)
    run(engine, 2)
    link = engine._parts.link
    link.patience_s = 0.2
    fault = Fault(monkeypatch, engine, "link", "hangs")
    link.prefetch(0, 0, engine.store.get(0, 0))
    engine.close()
    fault.release()
    until = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() <= before
