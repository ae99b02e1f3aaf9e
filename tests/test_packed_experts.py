"""A quantised expert means the same on both sides: NumPy's reference, jitted programs, slots and the link, from the
same bytes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrimoe_jax.engine.lanes.clock import WallClock
from hybrimoe_jax.engine.lanes.slots import SeparateSlots
from hybrimoe_jax.engine.lanes.transfer import Link
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.packing import (
    Format,
    PackedExpert,
    PackedMatrix,
    dequantise,
    dequantise_expert,
    format_of,
    pack_expert,
    quantise_activations,
)
from hybrimoe_jax.formats.plain import ExpertWeights, aligned_copy
from hybrimoe_jax.host_kernels import get_kernel
from hybrimoe_jax.host_kernels.reference import ReferenceKernel, rounded_activations, silu
from hybrimoe_jax.models import packed
from hybrimoe_jax.models.moe import DenseExperts, Routing, expert_forward

PLAIN = ("int8-g32", "int8-g64-s32", "int4-g64", "int4-g128-s32", "int4z-g32", "int4z-g128")
ROUNDED = ("int8-g32-a8", "int4-g64-a8", "int4z-g128-s32-a8")
SHAPES = [(96, 72), (100, 41), (64, 1)]
"""(width, hidden): whole groups, short last groups and filled-up panels, one row."""
TOLERANCE = 4e-6
"""Of the output's largest magnitude: float32 sums of up to a few hundred products in two orders. Seen: 1e-6."""


@functools.cache
def expert(name: str, width: int, hidden: int, seed: int = 0) -> PackedExpert:
    rng = np.random.default_rng(seed)
    shapes = (hidden, width), (hidden, width), (width, hidden)
    return pack_expert(*(rng.standard_normal(s, np.float32) * s[1] ** -0.5 for s in shapes), Format.parse(name))


def inputs(load: int, width: int) -> np.ndarray:
    x = np.random.default_rng(load).standard_normal((load, width), np.float32)
    x[-1, : width // 2] *= 50
    x[0, -3:] = 0
    return x


def on_device(one: PackedExpert) -> PackedExpert:
    return PackedExpert(jnp.asarray(one.data), one.layout)


forward = jax.jit(expert_forward)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PLAIN)
def test_both_sides_read_the_same_numbers_bit_for_bit(name, shape):
    for matrix in expert(name, *shape).matrices:
        have = jax.jit(packed.dequantise)(PackedMatrix(jnp.asarray(matrix.data), matrix.layout))
        np.testing.assert_array_equal(np.asarray(have), dequantise(matrix))


@pytest.mark.parametrize("name", ROUNDED)
def test_both_sides_round_activations_alike_bit_for_bit(name):
    format = Format.parse(name)
    x = inputs(9, 200)
    x[3] = 0
    x[4] *= np.float32(2.0**-110)  # below what counts
    have = jax.jit(lambda x: packed.rounded_activations(x, format))(x)
    np.testing.assert_array_equal(np.asarray(have), rounded_activations(x, format))
    assert not np.asarray(have)[3:5].any() and np.abs(np.asarray(have) - x).max() <= np.abs(x).max() / 254 * 1.001


@pytest.mark.parametrize("load", [1, 7, 40])
@pytest.mark.parametrize("name", [PLAIN[0], PLAIN[2], PLAIN[5]])
def test_host_and_device_agree(name, load):
    for width, hidden in SHAPES[:2]:
        one, x = expert(name, width, hidden), inputs(load, width)
        weights = dequantise_expert(one)
        gate, up = np.split(x.astype(np.float64) @ weights.gate_up.T.astype(np.float64), 2, axis=1)
        exact = (gate / (1 + np.exp(-gate)) * up) @ weights.down.T.astype(np.float64)
        kernel = ReferenceKernel()
        for y in (kernel.expert(kernel.prepare(one), x), np.asarray(forward(on_device(one), x))):
            assert y.dtype == np.float32 and np.abs(y - exact).max() <= TOLERANCE * np.abs(exact).max()


@pytest.mark.parametrize("name", ROUNDED)
def test_with_rounded_activations_they_agree_but_for_a_step_at_a_boundary(name):
    """silu(gate) * up differs by float32 rounding, so a code of it may differ by one, and that is all that may
    differ."""
    one, x = expert(name, 96, 72), inputs(300, 96)
    format = one.layout.format
    kernel, device = ReferenceKernel(), on_device(one)
    want, have = kernel.expert(kernel.prepare(one), x), np.asarray(forward(device, x))

    gate, up, down = map(dequantise, one.matrices)
    seen = rounded_activations(x, format)
    on_host = silu(seen @ gate.T) * (seen @ up.T)
    inner = jax.jit(lambda e, x: jax.nn.silu(packed.matmul(x, e.matrices[0])) * packed.matmul(x, e.matrices[1]))
    codes, scales = quantise_activations(on_host, format.group)
    others, other_scales = quantise_activations(np.asarray(inner(device, seen)), format.group)
    steps = np.abs(codes.astype(int) - others)
    assert steps.max() <= 1 and np.count_nonzero(steps) <= steps.size // 1000
    np.testing.assert_allclose(scales, other_scales, rtol=1e-5)
    flips = steps * scales[:, np.arange(72) // format.group]
    bound = 20 * TOLERANCE * np.abs(want).max() + 2 * flips @ np.abs(down).T
    assert (np.abs(have - want) <= bound).all()


@pytest.mark.parametrize("name", [PLAIN[1], PLAIN[2], PLAIN[5], ROUNDED[2]])
def test_the_form_for_few_rows_on_a_gpu_gives_the_same(name, monkeypatch):
    one, x = expert(name, 100, 41), inputs(8, 100)
    want = np.asarray(forward(on_device(one), x))
    monkeypatch.setattr(packed, "_multiplied", packed._summed)
    have = np.asarray(jax.jit(packed.packed_forward)(on_device(one), x))
    assert np.abs(have - want).max() <= TOLERANCE * np.abs(want).max()


@pytest.mark.parametrize("name", ["int4-g32", "int8-g32-a8"])
def test_the_rule_does_not_depend_on_the_load(name):
    """A token's result is the same alone and among others, up to the order of sums."""
    one, x = expert(name, 96, 72), inputs(12, 96)
    kernel = ReferenceKernel()
    alone = np.concatenate([kernel.expert(one, row[None]) for row in x])
    tolerance = 1e-2 if name.endswith("a8") else TOLERANCE
    assert np.abs(alone - kernel.expert(one, x)).max() <= tolerance * np.abs(alone).max()


def test_the_oracle_takes_experts_from_a_packed_stack_one_at_a_time():
    ones = [expert("int4-g32", 64, 24, seed) for seed in range(5)]
    stack = PackedExpert(jnp.stack([jnp.asarray(one.data) for one in ones]), ones[0].layout)
    x = inputs(3, 64)
    routing = Routing(jnp.asarray([[0, 4], [1, 2], [4, 3]]), jnp.asarray(np.full((3, 2), 0.5, np.float32)), None)
    y = np.asarray(DenseExperts([stack])(0, jnp.asarray(x), routing))
    kernel = ReferenceKernel()
    for row, chosen in enumerate([[0, 4], [1, 2], [4, 3]]):
        want = sum(kernel.expert(ones[e], x[row : row + 1])[0] for e in chosen) / 2
        assert np.abs(y[row] - want).max() <= TOLERANCE * np.abs(want).max()
    layer = jax.jit(lambda stack, x, ids, mix: DenseExperts([stack])(0, x, Routing(ids, mix, None)))
    temporary = layer.lower(stack, x, *routing[:2]).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 2 * 3 * 64 * 24 * 4 + 64 * 1024, "more than an expert or two was turned into float32"


def test_one_program_serves_every_expert_of_a_layout():
    program = jax.jit(lambda one, x: expert_forward(one, x))
    x = inputs(2, 64)
    for seed in range(4):
        one = expert("int8-g32", 64, 24, seed)
        layout = pack_expert(
            *np.zeros((2, 24, 64), np.float32), np.zeros((64, 24), np.float32), one.layout.format
        ).layout
        program(PackedExpert(jnp.asarray(one.data), layout), x)
    assert program._cache_size() == 1


@pytest.fixture
def link():
    link = Link(jax.devices()[0], WallClock())
    yield link
    link.close()


def test_a_slot_is_one_buffer_and_keeps_its_memory(link):
    layout = expert("int4-g64", 96, 72).layout
    pool = SeparateSlots([2], 96, 72, staging=2, layout=layout)
    assert pool.expert_bytes == layout.nbytes and pool.nbytes == 4 * layout.nbytes
    ones = [expert("int4-g64", 96, 72, seed) for seed in range(6)]
    slot = pool.write(0, 0, link.put(ones[0]), None)
    assert [leaf.dtype for leaf in jax.tree.leaves(slot)] == [np.uint8]
    where = slot.data.unsafe_buffer_pointer()
    for number in range(1, 6):
        slot = pool.write(0, number, link.put(ones[number]), number - 1)
        assert slot.data.unsafe_buffer_pointer() == where
        np.testing.assert_array_equal(np.array(slot.data), ones[number].data)
    link.prefetch(0, 3, ones[3])
    staged = link.wait(0, 3).staged
    assert staged.layout == layout and np.array_equal(np.array(pool.stream(staged).data), ones[3].data)
    pool.verify(0, lambda number: ones[number])
    with pytest.raises(RuntimeError, match="does not hold expert 5"):
        pool.verify(0, lambda number: ones[0])


def test_formats_have_names():
    matrices = np.zeros((48, 8), np.float32), np.zeros((8, 24), np.float32)
    assert format_of(ExpertWeights(*matrices)) == "f32" and format_of(expert("int4-g64", 96, 72)) == "int4-g64"
    assert format_of(ExpertWeights(*(aligned_copy(m, "bfloat16") for m in matrices))) == "bf16"


def test_a_kernel_that_computes_no_quantised_experts_says_so():
    with pytest.raises(UserError, match=r"host kernel onednn .* these are int4-g64; use auto"):
        get_kernel("onednn", expert("int4-g64", 96, 72))


def test_a_buffer_of_another_size_is_refused():
    one = expert("int4-g64", 96, 72)
    with pytest.raises(UserError, match=r"int4-g64 data is uint8 \(\d+,\); uint8 \[\d+\] is needed"):
        ReferenceKernel().prepare(PackedExpert(one.data[:-64], one.layout))
