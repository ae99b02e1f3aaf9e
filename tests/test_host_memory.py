"""Experts lie in memory that the device's client knows: registered once, given back, and never a reason to fail."""

from __future__ import annotations

import gc
import warnings

import jax
import numpy as np
import pytest
import tiny
from fake_device import FakeClient, Recorder

from hybrimoe_jax.checkpoint import expert_store
from hybrimoe_jax.checkpoint.expert_store import ExpertStore
from hybrimoe_jax.engine.config import EngineConfig
from hybrimoe_jax.engine.engine import Engine
from hybrimoe_jax.engine.lanes import host_memory
from hybrimoe_jax.formats import plain

MAPPED = {"host_memory": "mapped", "system": "on-demand", "cache_ratio": 0.5}


@pytest.fixture
def small_blocks(monkeypatch):
    for module in (plain, expert_store):
        monkeypatch.setattr(module, "BLOCK", 20_000)


def make(store, **options):
    config, dense, _ = tiny.weights("qwen2_moe")
    chosen = {"host_kernel": "reference", "profile": tiny.costs(config), "prefill_chunk": 16, **MAPPED, **options}
    return Engine(config, dense, store, EngineConfig(**chosen))


def tokens(engine) -> list[list[int]]:
    return engine.generate(tiny.prompts(engine.config, (9,)), max_new_tokens=6).token_ids


def test_every_block_is_registered_once_for_all_engines_and_given_back(monkeypatch, small_blocks):
    client = FakeClient()
    monkeypatch.setattr(host_memory, "client_of", lambda device: client)
    store = ExpertStore.from_arrays(tiny.weights("qwen2_moe")[2])
    first, second = make(store), make(store)  # experts are read lazily: blocks come while engines run
    assert tokens(first) == tokens(second) == tokens(tiny.engine(system="on-demand", cache_ratio=0.5))
    assert store.arena is not None and len(store.arena.blocks) > 3
    assert all(client.holds(matrix) for expert in range(8) for matrix in store.get(0, expert))
    assert client.mapped == [(block.ctypes.data, block.nbytes) for block in store.arena.blocks]
    first.close()
    assert not client.unmapped, "the second engine still copies from them"
    second.close()
    second.close()
    assert sorted(client.unmapped) == sorted(address for address, _ in client.mapped) and not client.ranges


def test_a_forgotten_engine_gives_its_memory_back_before_it_is_freed(monkeypatch):
    client = FakeClient()
    monkeypatch.setattr(host_memory, "client_of", lambda device: client)
    store = ExpertStore.from_arrays(tiny.weights("qwen2_moe")[2])
    memory = host_memory.MappedMemory(jax.devices()[0], store.arena)
    store.load_all()
    assert client.ranges
    del memory, store
    gc.collect()
    assert not client.ranges


def test_all_experts_of_a_layer_lie_in_one_block(small_blocks):
    store = ExpertStore.from_arrays(tiny.weights("qwen2_moe")[2])
    store.load_all()
    for layer, block in enumerate(store.arena.blocks):
        experts = [store.get(layer, expert) for expert in range(8)]
        assert all(np.shares_memory(matrix, block) for expert in experts for matrix in expert)
    assert len(store.arena.blocks) == 3


@pytest.mark.parametrize("kind", ["plain", "mapped", "pinned"])
@pytest.mark.parametrize("format", ["f32", "int4-g32"])
def test_an_expert_is_one_copy_from_the_memory_chosen(kind, format, monkeypatch):
    seen = Recorder(monkeypatch, FakeClient())
    options = {"format": format, "system": "adapmoe", "cache_ratio": 0.5}
    want = tokens(tiny.engine(**options))
    engine = tiny.engine(host_memory=kind, **options)
    seen.watch(engine)
    assert tokens(engine) == want
    engine.close()
    size = engine.store.expert_bytes
    sizes = (size,) if format != "f32" else (2 * size // 3, size // 3)
    where = {"pinned": "pinned_host"}.get(kind, kind)
    assert {copy.thread for copy in seen.copies} == {"MainThread", "link"}, "demand fetches and prefetches"
    assert {(copy.sizes, copy.memory) for copy in seen.copies if copy.thread == "MainThread"} == {
        (sizes, (where,) * len(sizes))
    }
    assert {copy.sizes for copy in seen.copies} == {sizes}


def test_pinned_experts_are_the_same_memory_on_both_sides():
    store = ExpertStore.from_arrays(tiny.weights("qwen2_moe")[2])
    read = store.get(0, 0)
    engine = make(store, host_memory="pinned")
    assert store.get(0, 0) is not read and store.arena is None
    memory = engine._parts.link.memory
    for expert in range(8):
        weights = store.get(0, expert)
        arrays = memory.source(weights)
        assert [array.unsafe_buffer_pointer() for array in arrays] == [matrix.ctypes.data for matrix in weights]
        assert not any(matrix.flags.writeable for matrix in weights)
    again = make(store, host_memory="pinned")
    assert again._parts.link.memory is memory
    assert tokens(engine) == tokens(again) == tokens(tiny.engine(system="on-demand", cache_ratio=0.5))


@pytest.mark.parametrize("refuse", [0, 2])
def test_a_device_that_refuses_gives_one_warning_and_the_same_answers(refuse, monkeypatch, small_blocks):
    client = FakeClient(refuse)
    monkeypatch.setattr(host_memory, "client_of", lambda device: client)
    store = ExpertStore.from_arrays(tiny.weights("qwen2_moe")[2])
    store.load_all()
    with pytest.warns(UserWarning, match=r"stays plain: mapped memory was refused \(RESOURCE_EXHAUSTED.*\)$") as seen:
        engine = make(store)
    assert len(seen) == 1 and not client.ranges and engine._parts.link.memory.name == "plain"
    assert tokens(engine) == tokens(tiny.engine(system="on-demand", cache_ratio=0.5))


def test_the_cpu_backend_keeps_plain_memory_and_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = tiny.engine()
    assert engine._parts.link.memory.name == "plain"
    with pytest.warns(UserWarning, match=r"mapped memory was refused \(UNIMPLEMENTED"):
        make(ExpertStore.from_arrays(tiny.weights("qwen2_moe")[2]))


@pytest.mark.parametrize(
    ("wanted", "found", "platform", "name"),
    [
        ("auto", None, "gpu", "mapped"),
        ("auto", "pinned", "gpu", "pinned"),
        ("auto", "plain", "gpu", "plain"),
        ("plain", "mapped", "gpu", "plain"),
        ("auto", None, "cpu", "plain"),
    ],
)
def test_what_a_calibration_found_wins_unless_one_asks(wanted, found, platform, name):
    assert host_memory.choose(wanted, found, platform) == name
