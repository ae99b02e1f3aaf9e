"""Where the device's memory runs out slots are given up once, one line says so, and answers stay exact."""

from __future__ import annotations

import jax
import pytest
import tiny

from hybrimoe_jax.engine import exhaustion, programs
from hybrimoe_jax.engine.lanes import slots, stacked
from hybrimoe_jax.engine.lanes.slots import SlotPool
from hybrimoe_jax.engine.lanes.transfer import Link
from hybrimoe_jax.errors import DeviceError

FAMILY = "qwen2_moe"
SAID = r"memory ran out \(Out of memory while trying to allocate 4711 bytes.\): [46] of 15 expert slots are given up"
"""A quarter, which is 4; the three layers have one number of slots each, and give up two."""


def full(*args, **kwargs):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4711 bytes.\nBFC: ...")


def after(calls: int, function, times: int = 1):
    """`function`, but the calls number `calls` and the few after it find no memory."""
    count = 0

    def call(*args, **kwargs):
        nonlocal count
        count += 1
        return (full if calls <= count < calls + times else function)(*args, **kwargs)

    return call


def build(**options):
    return tiny.engine(FAMILY, **{"system": "hybrimoe", "cache_ratio": 0.7, **options})


@pytest.fixture(scope="module")
def wanted():
    engine = build(executor="dense", system="hybrimoe", cache_ratio=None)
    prompts = tiny.prompts(engine.config, (20, 9), seed=5)
    return prompts, engine.generate(prompts, max_new_tokens=12).token_ids


@pytest.mark.parametrize(
    ("owner", "name", "calls", "options"),
    [
        (slots, "write_slot", 30, {"system": "on-demand"}),  # a demand fetch
        (programs, "dense_rows", 9, {"system": "on-demand", "lookahead": 0}),  # a program, in the middle of a step
        (programs, "last_logits", 4, {}),  # the last one
        (Link, "put", 30, {"system": "on-demand"}),
        (stacked, "write_stacked", 30, {"slots": "stacked", "system": "on-demand"}),
        (stacked, "block_program", 7, {"slots": "stacked"}),
        (slots, "write_slot", 40, {"system": "on-demand", "executor": "callback"}),
        (slots, "write_slot", 40, {"system": "on-demand", "cache_scope": "pooled"}),
        (slots, "write_slot", 30, {"system": "on-demand", "debug": True}),
    ],
)
def test_a_step_is_done_again_with_fewer_slots(wanted, monkeypatch, owner, name, calls, options):
    prompts, tokens = wanted
    engine = build(**options)
    monkeypatch.setattr(owner, name, after(calls, getattr(owner, name)))
    with pytest.warns(UserWarning, match=SAID) as warned:
        run = engine.generate(prompts, max_new_tokens=12)
    assert run.token_ids == tokens and len(warned) == 1
    given_up = 4 if "cache_scope" in options else 6
    assert run.stats.slots_given_up == given_up == 15 - sum(run.stats.slots)
    assert engine.planner.slots == run.stats.slots and run.stats.prefetch.issued >= run.stats.prefetch.useful >= 0
    again = engine.generate(prompts, max_new_tokens=12)
    assert again.token_ids == tokens and again.stats.slots_given_up == given_up
    engine.close()


def test_a_prefetch_that_finds_no_memory_does_the_same(wanted, monkeypatch):
    prompts, tokens = wanted
    engine = build(system="adapmoe")
    monkeypatch.setattr(Link, "_copy", after(5, Link._copy))
    with pytest.warns(UserWarning, match=SAID):
        assert engine.generate(prompts, max_new_tokens=12).token_ids == tokens
    engine.close()


@pytest.mark.parametrize("name", ["_empty_slots", "write"])
def test_an_engine_is_built_with_fewer_slots(wanted, monkeypatch, name):
    prompts, tokens = wanted
    owner = slots.SeparateSlots if name == "_empty_slots" else SlotPool
    monkeypatch.setattr(owner, name, after(1, getattr(owner, name)))
    with pytest.warns(UserWarning, match=SAID):
        engine = build()
    run = engine.generate(prompts, max_new_tokens=12)
    assert run.token_ids == tokens and run.stats.slots_given_up == 6 and sum(run.stats.slots) == 9
    engine.close()


@pytest.mark.parametrize("executor", ["overlapped", "dense"])
def test_weights_that_do_not_fit_are_one_clear_error(monkeypatch, executor):
    monkeypatch.setattr(jax, "device_put", full)
    with pytest.raises(DeviceError, match=r"ran out \(Out of memory .*4711 bytes.\) before there were slots: "):
        build(executor=executor, cache_ratio=None)


def test_what_a_run_needs_beside_its_steps_counts_too(wanted, monkeypatch):
    prompts, tokens = wanted
    engine = build()
    monkeypatch.setattr(engine._parts.model, "init_cache", after(1, engine._parts.model.init_cache))
    with pytest.warns(UserWarning, match=SAID):
        assert engine.generate(prompts, max_new_tokens=12).token_ids == tokens
    engine.close()


def test_a_second_time_is_one_clear_error_and_the_next_run_is_exact(wanted, monkeypatch):
    prompts, tokens = wanted
    engine = build(system="on-demand")
    with monkeypatch.context() as patched:
        patched.setattr(slots, "write_slot", after(30, slots.write_slot, times=2))
        with pytest.warns(UserWarning, match=SAID), pytest.raises(DeviceError, match="lower cache_ratio") as failed:
            engine.generate(prompts, max_new_tokens=12)
        assert "\n" not in str(failed.value)
    with monkeypatch.context() as patched:  # in a later step: nothing is given up any more
        patched.setattr(slots, "write_slot", after(30, slots.write_slot))
        with pytest.raises(DeviceError, match="no more slots are given up"):
            engine.generate(prompts, max_new_tokens=12)
    assert engine.generate(prompts, max_new_tokens=12).token_ids == tokens
    engine.close()


def test_without_slots_there_is_nothing_to_give_up(monkeypatch):
    engine = build(system="cpu-only", cache_ratio=0.0)
    monkeypatch.setattr(programs, "last_logits", full)
    with pytest.raises(DeviceError, match="4711"):
        engine.generate([[1, 2, 3]], max_new_tokens=2)
    engine.close()


def test_a_cache_that_went_with_the_step_is_said(monkeypatch):
    engine = build()
    caches = engine._parts.model.init_cache(1, 256)
    jax.tree.leaves(caches)[0].delete()
    with pytest.raises(DeviceError, match="its cache is lost"):
        engine._give_up("4711 bytes", caches)
    engine.close()


@pytest.mark.parametrize("error", [RuntimeError("RESOURCE_EXHAUSTED"), jax.errors.JaxRuntimeError("INTERNAL: no")])
def test_other_errors_stay_what_they_are(error):
    def work():
        raise error

    with pytest.raises(type(error)) as raised:
        exhaustion.with_fewer_slots(work, lambda why: pytest.fail("gave up slots"))
    assert raised.value is error


@pytest.mark.parametrize(("total", "kept"), [(1, 0), (2, 1), (15, 11), (400, 300)])
def test_a_quarter_is_given_up(total, kept):
    assert exhaustion.fewer(total) == kept
