"""A budget is what jax's allocator is told before jax starts; afterwards the device says what is there."""

from __future__ import annotations

import ctypes
import os
from types import SimpleNamespace

import jax
import pytest
import tiny

from hybrimoe_jax.checkpoint.reader import Checkpoint, open_checkpoint
from hybrimoe_jax.engine import checks, device_memory
from hybrimoe_jax.engine.config import EngineConfig
from hybrimoe_jax.engine.device_model import DeviceModel
from hybrimoe_jax.engine.lanes import threads
from hybrimoe_jax.engine.load import bundled_model, read_model
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.models.products import native_here

GIB = 2**30


class Driver:
    """CUDA's driver of a card, as far as it is asked; counts contexts that were not given back."""

    def __init__(self, total: int, free: int, fails: str = ""):
        self.total, self.free, self.fails, self.contexts = total, free, fails, 0

    def __getattr__(self, name):
        does = getattr(type(self), "_" + name, lambda *args: None)
        return lambda *args: int(name == self.fails) or does(self, *args) or 0

    def _cuDevicePrimaryCtxRetain(self, context, device):
        self.contexts += 1

    def _cuDevicePrimaryCtxRelease_v2(self, device):
        self.contexts -= 1

    def _cuMemGetInfo_v2(self, free, total):
        free._obj.value, total._obj.value = self.free, self.total


@pytest.fixture
def before_jax(monkeypatch):
    """A process that has not started jax, on a machine with a card of 24 GiB, 20 of them free."""
    for name in (device_memory.FRACTION, device_memory.OLD_FRACTION, device_memory.PREALLOCATE, "JAX_PLATFORMS"):
        monkeypatch.setenv(name, "")  # noted, so that it is put back
        os.environ.pop(name)
    driver = Driver(24 * GIB, 20 * GIB)
    monkeypatch.setattr(device_memory, "jax_started", lambda: False)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    return driver


def fraction() -> float | None:
    text = os.environ.get(device_memory.FRACTION)
    return None if text is None else float(text)


@pytest.mark.parametrize(("budget", "share"), [("6GiB", 6 / 24), (24 * GIB, 1.0), ("auto", 0.9 * 20 / 24)])
def test_a_budget_limits_the_allocator_before_jax_starts(before_jax, budget, share):
    device_memory.limit_allocator(EngineConfig(vram_budget=budget))
    assert fraction() == pytest.approx(share, rel=1e-6) and device_memory.PREALLOCATE not in os.environ
    assert before_jax.contexts == 0


@pytest.mark.parametrize("options", [{}, {"cache_ratio": 0.5}, {"executor": "dense"}])
def test_without_a_budget_the_allocator_grows_as_it_must(before_jax, options):
    device_memory.limit_allocator(EngineConfig(**options))
    assert fraction() is None and os.environ[device_memory.PREALLOCATE] == "false"


@pytest.mark.parametrize("name", [device_memory.FRACTION, device_memory.OLD_FRACTION])
def test_what_the_environment_says_stays(before_jax, monkeypatch, name):
    monkeypatch.setenv(name, "0.3")
    device_memory.limit_allocator(EngineConfig(vram_budget="6GiB"))
    assert {key: os.environ.get(key) for key in (device_memory.FRACTION, device_memory.OLD_FRACTION)}.pop(name) == "0.3"
    assert [key for key in (device_memory.FRACTION, device_memory.OLD_FRACTION) if key in os.environ] == [name]


def test_more_than_the_card_has_is_refused(before_jax):
    with pytest.raises(UserError, match=r"30.00 GiB is more than the device has: 24.00 GiB"):
        device_memory.limit_allocator(EngineConfig(vram_budget="30GiB"))


@pytest.mark.parametrize("fails", ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuMemGetInfo_v2"])
def test_a_driver_that_fails_changes_nothing(before_jax, fails):
    before_jax.fails = fails
    device_memory.limit_allocator(EngineConfig(vram_budget="6GiB"))
    assert fraction() is None and before_jax.contexts == 0


def test_a_process_that_wants_the_cpu_asks_no_driver(before_jax, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    device_memory.limit_allocator(EngineConfig(vram_budget="30GiB"))
    assert fraction() is None


def device(limit=None, used=0, peak=None):
    stats = None if limit is None else {"bytes_limit": limit, "bytes_in_use": used, "peak_bytes_in_use": peak}
    return SimpleNamespace(platform="cpu" if limit is None else "gpu", memory_stats=lambda: stats)


def test_auto_takes_what_is_free():
    assert device_memory.budget_on(device(20 * GIB, 3 * GIB), EngineConfig(vram_budget="auto")) == 17 * GIB


def test_a_limit_that_is_the_budget_says_nothing():
    assert device_memory.budget_on(device(6 * GIB - 5000), EngineConfig(vram_budget="6GiB")) == 6 * GIB - 5000
    assert device_memory.budget_on(device(), EngineConfig(vram_budget="6GiB")) == 6 * GIB
    assert device_memory.budget_on(device(6 * GIB), EngineConfig()) is None


@pytest.mark.parametrize(
    ("limit", "said"), [(18, "18.00 GiB, more than the budget"), (4, "4.00 GiB, and the budget is")]
)
def test_another_limit_is_warned_of_once(limit, said):
    with pytest.warns(UserWarning, match=said) as warned:
        assert device_memory.budget_on(device(limit * GIB), EngineConfig(vram_budget="6GiB")) == min(6, limit) * GIB
    assert len(warned) == 1 and "before any other use of jax" in str(warned[0].message)


def test_auto_is_refused_where_the_device_is_the_cpu(monkeypatch):
    """Before weights are read."""
    monkeypatch.setattr(Checkpoint, "dense", None)
    with pytest.raises(UserError, match=r'"auto" takes what is free on a GPU.*give a size'):
        read_model(None, EngineConfig(vram_budget="auto"))


@pytest.mark.parametrize("options", [{}, {"max_context": 512, "max_batch": 3}])
def test_what_dense_weights_and_cache_exceed_is_refused_before_weights_are_read(monkeypatch, options):
    checkpoint = open_checkpoint(bundled_model())
    model = DeviceModel(checkpoint.config, checkpoint.dense(), jax.devices()[0], native=native_here())
    fixed = model.nbytes + model.cache_bytes(options.get("max_batch", 1), options.get("max_context", 1024))
    checks.check_budget(EngineConfig(vram_budget=fixed, **options), checkpoint)
    monkeypatch.setattr(Checkpoint, "dense", None)
    with pytest.raises(UserError) as refused:
        read_model(checkpoint, EngineConfig(vram_budget=fixed - 1, **options))
    assert "at least" in str(refused.value) and "workspace" not in str(refused.value)


def test_the_manifest_tells_what_dense_weights_take_on_a_gpu():
    checkpoint = open_checkpoint(bundled_model())
    held = checkpoint.dense()
    assert checks.dense_bytes(checkpoint, "gpu") == {name: array.nbytes for name, array in held.items()}


def test_beside_a_gpu_the_host_experts_get_all_cores():
    budget = threads.ThreadBudget(total=16, device=16, host=8, fixed=True)
    assert threads.beside(budget, "cpu") == budget
    assert threads.beside(budget, "gpu") == threads.ThreadBudget(total=16, device=0, host=16, fixed=True)


def test_the_peak_is_the_devices_own(monkeypatch):
    engine = tiny.engine(cache_ratio=0.5)
    stated = engine.generate([[1, 2, 3]], max_new_tokens=2).stats.peak_device_bytes
    assert stated > 0
    monkeypatch.setattr(engine._parts, "device", device(20 * GIB, peak=123_456))
    assert engine.generate([[1, 2, 3]], max_new_tokens=2).stats.peak_device_bytes == 123_456
    engine.close()
