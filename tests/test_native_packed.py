"""The native kernel on packed weights: every format against float64 from the definition, by every instruction set, over
fuzzed shapes; the extremes that narrower sums would saturate at; the same bits in any company; matrix products."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from grids import examples, few
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import tokens_of
from native_cases import HERE, every_isa, needs_native, routing, runs

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.packing import (
    ExpertLayout,
    Format,
    MatrixLayout,
    PackedExpert,
    PackedMatrix,
    dequantise,
    pack,
    quantise_activations,
)
from hybrimoe_jax.formats.plain import BF16, to_f32
from hybrimoe_jax.host_kernels import run_experts
from hybrimoe_jax.host_kernels.native import library
from hybrimoe_jax.host_kernels.native.kernel import NativeKernel

EVERY = [
    f"{kind}-g{group}{scale}{a8}"
    for kind in ("int8", "int4", "int4z")
    for group in (32, 64, 128)
    for scale in ("", "-s32")
    for a8 in ("", "-a8")
]
MIXED = ["int8-g32", "int4z-g64", "int8-g64-a8", "int4-g32-a8", "int4z-g128-a8", "int4-g128"]
TOLERANCE = 5e-6


def random_matrix(rng, format: Format, rows: int, columns: int, data: np.ndarray | None = None) -> PackedMatrix:
    """Codes of the whole range, half of them at its ends; scales such that products stay near 1."""
    groups = -(-columns // format.group)
    low, high = (0, 15) if format.bits == 4 else (-127, 127)
    codes = rng.integers(low, high + 1, (rows, columns))
    ends = rng.integers(0, 2, codes.shape) * (high - low) + low
    codes = np.where(rng.random(codes.shape) < 0.5, codes, ends).astype(np.uint8 if format.bits == 4 else np.int8)
    scales = (rng.standard_normal((rows, groups)) / high / columns**0.5).astype(np.float32)
    zeros = rng.integers(0, 256, (rows, groups)).astype(np.uint8) if format.zeros else None
    return pack(format, codes, scales, zeros, data)


def random_expert(rng, format: Format, width: int, hidden: int) -> PackedExpert:
    layout = ExpertLayout(format, width, hidden)
    sizes = ((hidden, width), (hidden, width), (width, hidden))
    return PackedExpert(np.concatenate([random_matrix(rng, format, *size).data for size in sizes]), layout)


def rounded(format: Format, x: np.ndarray) -> np.ndarray:
    """x as the format's products see it, in float64."""
    if not format.a8:
        return x.astype(np.float64)
    codes, scales = quantise_activations(x.astype(np.float32), format.group)
    return codes * np.repeat(scales, format.group, axis=1)[:, : x.shape[1]].astype(np.float64)


def exact(expert: PackedExpert, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The expert in float64, and how far from it a result may be, per token.

    With quantised activations what lies between the two products is rounded to codes: a value within float error of the
    middle of two may go to either, which moves the token's output by that step times a column of `down`. Two flips of
    the largest kind are allowed.
    """
    format = expert.layout.format
    gate_up, down = expert.matrices[:2], dequantise(expert.matrices[2]).astype(np.float64)
    gate, up = (rounded(format, x) @ dequantise(m).astype(np.float64).T for m in gate_up)
    act = gate * np.exp(-np.logaddexp(0, -gate)) * up
    want = rounded(format, act) @ down.T
    # Sums of numbers of both signs are as exact as their terms are large, not as the sums are.
    terms = np.abs(rounded(format, act)) @ np.abs(down).T
    slack = np.full((len(x), 1), TOLERANCE * max(1.0, np.abs(want).max(initial=0), terms.max(initial=0) / 4))
    # So are gate and up: zero points far from the codes make their terms many times as large as they are. An eighth of
    # a rounding of each: errors of both signs mostly cancel.
    in_gate, in_up = (np.abs(rounded(format, x)) @ np.abs(dequantise(m).astype(np.float64)).T for m in gate_up)
    act_off = np.abs(up) * in_gate + np.abs(gate) * in_up  # |silu'| <= 1.1, |silu(gate)| <= |gate|
    slack = slack + 2**-27 * (act_off @ np.abs(down).T).max(axis=1, keepdims=True)
    if format.a8:
        slack = slack + 2 * np.abs(act).max(axis=1, keepdims=True) / 127 * np.abs(down).max()
    return want, slack


@every_isa
@pytest.mark.parametrize("name", few(EVERY[::5], EVERY))
def test_every_format_gives_the_float64_answer(isa, name):
    rng = np.random.default_rng(0)
    kernel, format = NativeKernel(isa=isa), Format.parse(name)
    for width, hidden in ((1, 1), (40, 24), (136, 200), (320, 129)):
        expert = random_expert(rng, format, width, hidden)
        handle = kernel.prepare(expert)
        for load in (1, 2, 3, 7, 13, 40, 100):
            x = tokens_of(load, width, load)
            want, slack = exact(expert, x)
            assert (np.abs(kernel.expert(handle, x) - want) <= slack).all(), (width, hidden, load)


@every_isa
@examples(40)
@given(**runs(width=300, hidden=200, count=4), names=st.lists(st.sampled_from(EVERY), min_size=1, max_size=2))
def test_runs_of_experts_of_any_formats_and_shapes(isa, seed, width, hidden, total, count, threads, names):
    rng = np.random.default_rng(seed)
    experts = [random_expert(rng, Format.parse(names[i % len(names)]), width, hidden) for i in range(count)]
    rows, mix = routing(rng, total, count)
    x, kernel = tokens_of(total, width, seed), NativeKernel(isa=isa)
    got = run_experts(kernel, [kernel.prepare(e) for e in experts], x, rows, mix, np.zeros_like(x), threads)
    want, slack = np.zeros(x.shape), np.full((total, 1), TOLERANCE)
    for expert, chosen, share in zip(experts, rows, mix, strict=True):
        if len(chosen):
            alone, off = exact(expert, x[chosen])
            want[chosen] += share[:, None] * alone
            slack[chosen] += np.abs(share[:, None]) * off
    assert (np.abs(got - want) <= slack).all()


@every_isa
@examples(40)
@given(
    seed=st.integers(0, 999),
    rows=st.integers(1, 200),
    columns=st.integers(1, 300),
    total=st.integers(1, 110),
    threads=st.integers(1, 3),
    name=st.sampled_from([*EVERY, "f32", "bf16"]),
)
def test_matrix_products(isa, seed, rows, columns, total, threads, name):
    rng = np.random.default_rng(seed)
    x, kernel = tokens_of(total, columns, seed), NativeKernel(isa=isa)
    if name in ("f32", "bf16"):
        matrix = rng.standard_normal((rows, columns), np.float32).astype(BF16 if name == "bf16" else np.float32)
        want = x.astype(np.float64) @ to_f32(matrix).astype(np.float64).T
    else:
        matrix = random_matrix(rng, Format.parse(name), rows, columns)
        want = rounded(matrix.layout.format, x) @ dequantise(matrix).astype(np.float64).T
    got = kernel.product(matrix, x, threads=threads)
    assert np.abs(got - want).max() <= TOLERANCE * max(1, np.abs(want).max())


@every_isa
@pytest.mark.parametrize("total", [1, 3, 5, 13, 30, 60, 129])
@pytest.mark.parametrize("name", ["f32", "bf16"])
def test_plain_products_deeper_than_a_block(isa, name, total):
    """Few tokens, chunks of every size and panels, over several blocks of the depth and odd rows, against float64."""
    rng = np.random.default_rng(total)
    for rows, columns in ((67, 1411), (34, 2050), (5, 1300)):
        x, kernel = tokens_of(total, columns, total), NativeKernel(isa=isa)
        matrix = rng.standard_normal((rows, columns), np.float32).astype(BF16 if name == "bf16" else np.float32)
        want = x.astype(np.float64) @ to_f32(matrix).astype(np.float64).T
        got = kernel.product(matrix, x, threads=2)
        assert np.abs(got - want).max() <= TOLERANCE * np.abs(want).max()


@every_isa
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", ["int8-g128-a8", "int4-g128-a8", "int4z-g128-a8", "int8-g32-a8"])
def test_nothing_saturates_at_the_extremes(isa, name, sign):
    """Every code and every activation at its end, so that each group's sum is the largest there is."""
    format, kernel = Format.parse(name), NativeKernel(isa=isa)
    for code in (0, 15) if format.bits == 4 else (-127, 127):
        codes = np.full((16, 256), code, np.uint8 if format.bits == 4 else np.int8)
        groups = 256 // format.group
        zeros = np.full((16, groups), 255 if code == 0 else 0, np.uint8) if format.zeros else None
        matrix = pack(format, codes, np.ones((16, groups), np.float32), zeros)
        x = np.full((20, 256), sign * 127, np.float32)
        x[1] *= np.where(np.arange(256) % 2, 1, -1)
        x[2:18] = 127 * np.sign(tokens_of(16, 256))
        want = x.astype(np.float64) @ dequantise(matrix).astype(np.float64).T
        for tokens in (1, 5, 20):  # streams of one and of several; three streams or a block
            np.testing.assert_array_equal(kernel.product(matrix, x[:tokens]), want[:tokens])


@every_isa
def test_activations_are_quantised_by_the_rule(isa):
    """A matrix that picks single inputs shows the codes: ties, groups of zeros and of nearly nothing, a short last
    group."""
    format, columns = Format.parse("int8-g64-s32-a8"), 100
    picks = pack(format, np.eye(columns, dtype=np.int8), np.ones((columns, 2), np.float32))
    x = tokens_of(64, columns, 5) * np.geomspace(1e-35, 1e30, 64, dtype=np.float32)[:, None]
    x[0] = 0
    x[1] = 2.0**-101
    x[2, :64] = np.linspace(-127, 127, 64, dtype=np.float32).round() + 0.5
    x[2, 0] = 127
    x[3, 64:] = 0
    codes, scales = quantise_activations(x, format.group)
    want = codes.astype(np.float32) * np.repeat(scales, 64, axis=1)[:, :columns]
    np.testing.assert_array_equal(NativeKernel(isa=isa).product(picks, x), want)


@every_isa
def test_small_scales_count_in_a_thread_of_xla_too(isa):
    """There denormal floats are taken for zero, and helpers that such a thread begins inherit that."""
    rng, kernel = np.random.default_rng(0), NativeKernel(isa=isa)
    matrix, x = random_matrix(rng, Format.parse("int8-g32"), 67, 191), tokens_of(5, 191)
    want = kernel.product(matrix, x, threads=1)
    shape = jax.ShapeDtypeStruct(want.shape, want.dtype)
    there = jax.jit(lambda x: jax.pure_callback(lambda x: kernel.product(matrix, np.asarray(x), threads=1), shape, x))
    assert np.array_equal(there(x), want)


@every_isa
@pytest.mark.parametrize("name", few(MIXED[::2], MIXED))
def test_a_token_gets_the_same_bits_alone_and_in_company_and_on_any_number_of_threads(isa, name):
    rng, kernel = np.random.default_rng(3), NativeKernel(isa=isa)
    experts = [random_expert(rng, Format.parse(name), 1100, 200) for _ in range(3)]
    x = tokens_of(130, 1100)
    rows = [np.arange(130), np.arange(130)[::-1].copy(), np.array([4])]
    mix = [np.linspace(-1, 1, len(r), dtype=np.float32) for r in rows]
    handles = [kernel.prepare(e) for e in experts]
    together = [run_experts(kernel, handles, x, rows, mix, np.zeros_like(x), threads) for threads in (1, 2, 3, 7)]
    for other in together[1:]:
        assert np.array_equal(together[0], other)
    for tokens in ([0], [4], [17, 4], [3, 8, 4, 9, 11], list(range(20)), list(range(60))):
        own = [np.flatnonzero(np.isin(r, tokens)) for r in rows]
        place = {token: i for i, token in enumerate(tokens)}
        few = run_experts(
            kernel,
            handles,
            x[tokens],
            [np.array([place[token] for token in r[at]], np.int64) for r, at in zip(rows, own)],
            [share[at] for share, at in zip(mix, own)],
            np.zeros((len(tokens), 1100), np.float32),
        )
        assert np.array_equal(few, together[0][tokens])


@needs_native
def test_instruction_sets_agree_on_quantised_activations_to_float_rounding():
    """Integer sums are exact everywhere: a product differs by nothing at all."""
    matrix, x = random_matrix(np.random.default_rng(1), Format.parse("int8-g32-a8"), 64, 320), tokens_of(9, 320)
    results = [NativeKernel(isa=isa).product(matrix, x) for isa in HERE]
    for result in results:
        np.testing.assert_allclose(result, results[0], rtol=2e-6, atol=1e-6)


@needs_native
def test_the_library_lays_matrices_out_as_python_does():
    for name in EVERY:
        format = Format.parse(name)
        for rows, columns in ((1, 1), (8, 32), (13, 200), (64, 129)):
            size = library.library().matrix_bytes(library.format_code(format), rows, columns)
            assert size == MatrixLayout(format, rows, columns).nbytes
    for wrong in (-1, 2, 15, 52):
        assert library.library().matrix_bytes(wrong, 8, 32) == -1


@needs_native
def test_an_expert_of_the_wrong_size_is_refused():
    expert = random_expert(np.random.default_rng(0), Format.parse("int4-g32"), 64, 32)
    kernel = NativeKernel()
    for data in (expert.data[:-1], expert.data.view(np.int8)):
        with pytest.raises(UserError, match="bytes are needed"):
            kernel.prepare(PackedExpert(data, expert.layout))
    with pytest.raises(UserError, match="float32 or bfloat16"):
        kernel.product(np.zeros((3, 4)), np.zeros((1, 4), np.float32))
    with pytest.raises(ValueError, match=r"\[N, 64\] is needed"):
        kernel.product(expert.matrices[0], np.zeros((1, 63), np.float32))


@needs_native
def test_weights_are_used_where_they_lie():
    """Also at an odd address, as within a checkpoint's mapped file."""
    expert = random_expert(np.random.default_rng(2), Format.parse("int4-g32-a8"), 96, 64)
    room = np.empty(expert.nbytes + 3, np.uint8)
    moved = PackedExpert(room[3:], expert.layout)
    moved.data[:] = expert.data
    kernel, x = NativeKernel(), tokens_of(4, 96)
    handle = kernel.prepare(moved)
    assert handle.weights.data.ctypes.data == moved.data.ctypes.data
    np.testing.assert_array_equal(kernel.expert(handle, x), kernel.expert(kernel.prepare(expert), x))
