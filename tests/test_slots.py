"""Both slot pools: experts are written in place, nothing is copied but the expert, and misuse is an error, not a
wrong answer."""

from __future__ import annotations

import statistics
import time

import jax
import numpy as np
import pytest

from hybrimoe_jax.engine.lanes.clock import WallClock
from hybrimoe_jax.engine.lanes.slots import SeparateSlots
from hybrimoe_jax.engine.lanes.stacked import StackedSlots
from hybrimoe_jax.engine.lanes.transfer import Link
from hybrimoe_jax.formats.plain import ExpertWeights, aligned_copy

D, F = 32, 24
BYTES = 3 * D * F * 4


def expert(seed: int, hidden: int = D, width: int = F) -> ExpertWeights:
    rng = np.random.default_rng(seed)
    parts = rng.standard_normal((2 * width, hidden), np.float32), rng.standard_normal((hidden, width), np.float32)
    return ExpertWeights(*map(aligned_copy, parts))


@pytest.fixture
def link():
    link = Link(jax.devices()[0], WallClock())
    yield link
    link.close()


def stacked(*args, **kwargs) -> StackedSlots:
    return StackedSlots(*args, num_experts=64, **kwargs)


@pytest.fixture(params=(SeparateSlots, stacked), ids=("separate", "stacked"))
def make(request):
    return request.param


def memory(pool, place) -> tuple[int, ...]:
    """The addresses of a slot's parts."""
    if isinstance(pool, StackedSlots):
        return tuple(part.unsafe_buffer_pointer() + int(place) * part[0].nbytes for part in pool.pool)
    return tuple(part.unsafe_buffer_pointer() for part in place)


def holds(pool, place, weights: ExpertWeights) -> bool:
    return all(np.array_equal(np.array(have), want) for have, want in zip(pool.arrays(place), weights, strict=True))


def test_a_slot_keeps_its_memory_however_often_it_is_written(link, make):
    pool = make([2], D, F)
    where = memory(pool, pool.write(0, 0, link.put(expert(0)), None))
    other = memory(pool, pool.write(0, 1, link.put(expert(1)), None))
    assert not set(where) & set(other)
    for number in range(2, 40):
        slot = pool.write(0, number, link.put(expert(number)), number - 2)
        assert memory(pool, slot) == (other if number % 2 else where)
        assert holds(pool, slot, expert(number)) and pool.residents(0) == {number - 1, number}
    assert holds(pool, pool.get(0, 38), expert(38)), "the other slot was touched"


def test_pooled_slots_pass_from_layer_to_layer(link, make):
    pool = make([1, 0, 1], D, F, pooled=True)
    assert pool.nbytes == (2 + 2) * BYTES
    first = memory(pool, pool.write(1, 4, link.put(expert(4)), None))
    pool.write(1, 5, link.put(expert(5)), None)
    assert pool.residents(1) == {4, 5} and not pool.residents(0)
    other = pool.write(2, 4, link.put(expert(6)), (1, 4))
    assert memory(pool, other) == first, "another layer's expert of the same number"
    assert pool.residents(1) == {5} and pool.residents(2) == {4}
    assert holds(pool, pool.get(2, 4), expert(6)) and holds(pool, pool.get(1, 5), expert(5))
    pool.clear()
    assert not any(pool.residents(layer) for layer in range(3))


def test_the_buffer_given_up_cannot_be_used_any_more(link, make):
    pool = make([1], D, F)
    before = pool.buffers(pool.write(0, 0, link.put(expert(0)), None))
    pool.write(0, 1, link.put(expert(1)), 0)
    assert all(part.is_deleted() for part in before)


def test_a_table_on_the_device_says_who_is_where(link):
    pool = stacked([1, 2], D, F)
    assert np.all(np.array(pool.table) == -1)
    pool.write(0, 5, link.put(expert(5)), None)
    pool.write(1, 7, link.put(expert(7)), None)
    pool.stream(link.put(expert(9)))
    pool.write(0, 6, link.put(expert(6)), 5)
    pool.write(1, 5, link.put(expert(5)), None)
    table = np.array(pool.table)
    for layer, residents in enumerate(({6}, {5, 7})):
        assert set(np.flatnonzero(table[layer] >= 0)) == residents == pool.residents(layer)
        for number in residents:
            assert table[layer, number] == pool.get(layer, number)


def test_staging_slots_come_round_in_turn_and_leave_the_others_alone(link, make):
    pool = make([1], D, F, staging=2)
    kept = pool.write(0, 7, link.put(expert(7)), None)
    first, second = pool.stream(link.put(expert(0))), pool.stream(link.put(expert(1)))
    readable = holds(pool, first, expert(0)), holds(pool, second, expert(1))
    assert all(readable), "one must be readable while the other is filled"
    where = memory(pool, first), memory(pool, second)
    for number in range(2, 8):
        assert memory(pool, pool.stream(link.put(expert(number)))) == where[number % 2]
    assert holds(pool, kept, expert(7)) and pool.residents(0) == {7}


def test_a_pool_without_slots_still_streams(link, make):
    pool = make([0, 0], D, F)
    assert holds(pool, pool.stream(link.put(expert(3))), expert(3))
    assert pool.residents(0) == frozenset()
    assert pool.nbytes == 2 * pool.expert_bytes == 2 * BYTES


def test_a_reader_of_the_old_expert_sees_the_old_expert(link, make):
    """The write waits for readers dispatched before it: a slow computation on the slot is not torn by the next
    expert."""
    pool = make([1], D, F)
    slot = pool.write(0, 0, link.put(expert(0)), None)

    @jax.jit
    def slow_sum(gate_up):
        return jax.lax.fori_loop(0, 300, lambda i, total: total + jax.numpy.sum(gate_up * (i + 1.0)), 0.0)

    expected = float(slow_sum(jax.numpy.asarray(expert(0).gate_up)))
    reading = slow_sum(pool.arrays(slot)[0])
    for number in range(1, 5):
        pool.write(0, number, link.put(expert(number)), number - 1)
    assert float(reading) == expected


@pytest.mark.alone
def test_writing_costs_the_same_in_a_large_pool(make):
    """An expert of 3 MB into 2 slots and into 64: copying the pool would take 32 times as long."""
    link = Link(jax.devices()[0], WallClock())
    weights = expert(0, 512, 512)
    medians = []
    for slots in (2, 64):
        pool = make([slots], 512, 512)
        pool.write(0, 0, link.put(weights), None)
        times = []
        for number in range(1, 16):
            start = time.perf_counter()
            jax.block_until_ready(pool.buffers(pool.write(0, number, link.put(weights), number - 1)))
            times.append(time.perf_counter() - start)
        medians.append(statistics.median(times))
    link.close()
    assert medians[1] < 5 * medians[0]


def test_a_fetch_is_a_real_copy(link, make):
    """On the CPU backend an aligned `device_put` aliases its source: neither a slot nor a staged prefetch may."""
    pool = make([2], D, F)
    demanded, prefetched, streamed = expert(0), expert(1), expert(2)
    slot = pool.write(0, 0, link.put(demanded), None)
    link.prefetch(0, 1, prefetched)
    staged = link.wait(0, 1).staged
    stream = pool.stream(link.put(streamed))
    jax.block_until_ready((pool.buffers(slot), staged, pool.buffers(stream)))
    for weights in (demanded, prefetched, streamed):
        for part in weights:
            part[...] = np.nan
    assert holds(pool, slot, expert(0)) and holds(pool, stream, expert(2))
    assert holds(pool, pool.write(0, 1, staged, None), expert(1))


def test_prefetches_land_in_order_and_once(link):
    for number in range(3):
        link.prefetch(0, number, expert(number))
    assert link.busy and link.wait(0, 1).expert == 1
    deadline = time.monotonic() + 30
    landed = []
    while link.busy and time.monotonic() < deadline:
        landed += [(t.expert, t.landed >= t.issued) for t in link.landed()]
    assert landed == [(0, True), (2, True)]


def test_a_prefetch_that_failed_is_raised_where_it_is_taken(link):
    class Broken:
        nbytes = 0

        def __iter__(self):
            raise OSError("the expert's file is gone")

    link.prefetch(0, 0, Broken())
    with pytest.raises(OSError, match="gone"):
        link.wait(0, 0)
    link.prefetch(0, 1, expert(1))
    assert all(map(np.array_equal, link.wait(0, 1).staged, expert(1))), "the link must survive an error"


def test_misuse_is_an_error(link, make):
    pool = make([1], D, F)
    pool.write(0, 0, link.put(expert(0)), None)
    with pytest.raises(RuntimeError, match="expert 0 of MoE layer 0 is already resident"):
        pool.write(0, 0, link.put(expert(0)), None)
    with pytest.raises((KeyError, RuntimeError)):
        pool.get(0, 5)
    with pytest.raises((KeyError, RuntimeError)):
        pool.write(0, 1, link.put(expert(1)), 5)
    with pytest.raises((IndexError, RuntimeError)):
        pool.write(0, 1, link.put(expert(1)), None)
    assert pool.residents(0) == {0} and holds(pool, pool.get(0, 0), expert(0))


def test_verify_names_the_slot_that_is_wrong(link, make):
    pool = make([2, 2], D, F)
    for layer in range(2):
        for number in range(2):
            pool.write(layer, number, link.put(expert(10 * layer + number)), None)
    pool.verify(1, lambda number: expert(10 + number))
    with pytest.raises(RuntimeError, match="MoE layer 1 does not hold expert 1"):
        pool.verify(1, lambda number: expert(10))
