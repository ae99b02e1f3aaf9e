"""The GPU's kernels for quantised experts, their own source run on a CPU, against NumPy's reference; what they read;
and that the PTX in the package is this source's."""

from __future__ import annotations

import functools
import hashlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from cuda_emulation import KERNELS, Emulation, build, needs_compiler
from grids import few

from hybrimoe_jax.engine import checks, programs
from hybrimoe_jax.engine.checks import device_kernel
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.layout import GROUPS
from hybrimoe_jax.formats.packing import Format, PackedExpert, pack_expert
from hybrimoe_jax.host_kernels.reference import ReferenceKernel
from hybrimoe_jax.models import packed_cuda
from hybrimoe_jax.models.moe import add_experts, expert_forward
from hybrimoe_jax.models.pooled import one_expert, routed_experts

FORMATS = [
    f"{kind}-g{group}{scale}" for kind in ("int8", "int4", "int4z") for group in GROUPS for scale in ("", "-s32")
]
ROUNDED = ["int8-g32-a8", "int4-g64-a8", "int4z-g128-s32-a8"]
TOLERANCE = 4e-6
"""Of the output's largest magnitude: float32 sums in two orders."""
SLOTS = {
    1: [[3, -1, 0]],
    3: [[3, 1], [-1, -1], [1, 2]],
    8: [[0, 3], [3, 0], [1, 1], [-1, 2], [2, -1], [0, 2], [3, 2], [-1, -1]],
}
"""By rows: experts wanted by several, by one and by none, one twice by the same row, and some that are not here."""


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    return build(tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def emulated(libraries, monkeypatch) -> Emulation:
    emulation = Emulation(libraries)
    monkeypatch.setattr(packed_cuda, "_call", emulation)
    return emulation


def pool_of(name: str, width: int, hidden: int, count: int = 5) -> tuple[PackedExpert, list[PackedExpert]]:
    """A stacked pool and its experts; the last is garbage that reads as NaN."""
    rng = np.random.default_rng(len(name) + width)
    shapes = (hidden, width), (hidden, width), (width, hidden)
    format = Format.parse(name)
    ones = [
        pack_expert(*(rng.standard_normal(s, np.float32) * s[1] ** -0.5 for s in shapes), format) for _ in range(count)
    ]
    ones[-1].data[:] = 255
    return PackedExpert(np.stack([one.data for one in ones]), ones[0].layout), ones


def compare(name: str, shape: tuple[int, int], rows: int, tolerance: float = TOLERANCE) -> None:
    pool, ones = pool_of(name, *shape)
    rng = np.random.default_rng(rows)
    acc, x = rng.standard_normal((2, rows, shape[0]), np.float32)
    x[-1, : shape[0] // 2] *= 50
    slots = np.array(SLOTS[rows], np.int32)
    weights = rng.standard_normal(slots.shape, np.float32)
    kernel = ReferenceKernel()
    want = acc.astype(np.float64)
    for row, place in zip(*np.nonzero(slots >= 0)):
        want[row] += weights[row, place] * kernel.expert(ones[slots[row, place]], x[row : row + 1])[0]
    have = packed_cuda.routed(*map(jnp.asarray, (acc, x, slots, weights)), pool)
    assert have.dtype == np.float32 and np.abs(have - want).max() <= tolerance * np.abs(want).max()


@needs_compiler
@pytest.mark.parametrize("name", few(FORMATS[::4], FORMATS))
def test_the_kernels_compute_what_numpy_does_in_every_format(name, emulated):
    compare(name, (96, 72), 1)
    compare(name, (96, 72), 3)


@needs_compiler
@pytest.mark.parametrize("shape", [(100, 41), (40, 1), (264, 9)])
def test_sizes_that_fill_no_whole_panel_group_or_line(shape, emulated):
    for name in ("int8-g64", "int4z-g32-s32"):
        compare(name, shape, 3)


@needs_compiler
@pytest.mark.parametrize("name", ["int8-g32", "int4-g128", "int4z-g64"])
def test_eight_rows_share_experts(name, emulated):
    compare(name, (96, 72), 8)


@needs_compiler
@pytest.mark.parametrize("name", few(ROUNDED[1:2], ROUNDED))
def test_rounded_activations_differ_by_a_step_at_a_boundary_at_most(name, emulated):
    compare(name, (100, 72), 1, tolerance=2e-2)
    compare(name, (100, 72), 3, tolerance=2e-2)


@needs_compiler
@pytest.mark.parametrize("rows", SLOTS)
@pytest.mark.parametrize("name", ["int8-g64", "int4-g64"])
def test_codes_are_read_once_in_loads_of_16_bytes_and_only_of_experts_that_are_here(name, rows, emulated):
    width, hidden = 96, 72
    compare(name, (width, hidden), rows)
    layout = pool_of(name, width, hidden, 1)[0].layout
    here = sorted(set(np.ravel(SLOTS[rows])) - {-1})
    untouched = sorted(set(range(5)) - set(here))
    assert not emulated.times_read[untouched].any()
    for at, matrix in (
        (0, layout.inward),
        (layout.inward.nbytes, layout.inward),
        (2 * layout.inward.nbytes, layout.outward),
    ):
        assert (emulated.times_read[here, at : at + matrix.codes_nbytes] == 1).all()
    codes = sum(matrix.codes_nbytes for matrix in (layout.inward, layout.inward, layout.outward))
    assert emulated.loads[16] * 16 == len(here) * codes


@needs_compiler
def test_where_no_expert_is_here_the_sum_is_left_as_it_was(emulated):
    pool, _ = pool_of("int4-g64", 64, 32)
    acc = jnp.arange(128, dtype=jnp.float32).reshape(2, 64)
    slots = jnp.full((2, 3), -1)
    have = packed_cuda.routed(acc, acc, slots, jnp.ones((2, 3)), pool)
    np.testing.assert_array_equal(have, acc)
    assert not emulated.times_read.any()


@needs_compiler
def test_one_expert_in_a_buffer_of_its_own_skips_rows_of_weight_zero(emulated):
    _, ones = pool_of("int4-g64", 64, 32)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 64), np.float32))
    mix = jnp.array([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0]])
    have = add_experts(jnp.zeros_like(x), x, mix, ones[0], ones[1], kernel="cuda")
    want = np.asarray(mix[0])[:, None] * ReferenceKernel().expert(ones[0], np.asarray(x))
    assert np.abs(have - want).max() <= TOLERANCE * np.abs(want).max()
    assert not np.asarray(have)[1].any()
    assert emulated.loads[16] * 16 >= 64 * 32 * 3 // 2
    alone = expert_forward(ones[0], x, "cuda")
    assert np.abs(alone[0] - want[0]).max() <= TOLERANCE * np.abs(want).max()


@needs_compiler
def test_out_of_a_stack_both_forms_give_the_same(emulated):
    pool, _ = pool_of("int4z-g32", 64, 32, 4)
    pool = PackedExpert(jnp.asarray(np.roll(pool.data, 1, axis=0)), pool.layout)  # garbage where nobody looks but XLA
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 64), np.float32))
    slots, weights = jnp.array([[1, -1], [3, 1], [-1, 2]]), jnp.ones((3, 2)) / 3
    for form in (routed_experts, lambda *args: one_expert(*args[:4], 3, *args[4:])):
        want = np.asarray(jax.jit(form)(x, x, slots, weights, pool))
        have = np.asarray(form(x, x, slots, weights, pool, "cuda"))
        assert np.abs(have - want).max() <= TOLERANCE * np.abs(want).max()
    assert [name for _, name in emulated.launched] == ["silu_gate_up", "add_down"] * 2


@pytest.mark.slow
@needs_compiler
def test_an_engine_says_the_same_with_it(emulated, monkeypatch):
    """Inside jit the emulation is called back; the engine is told that there is a GPU that takes the kernels."""

    def call(kernels, name, grid, threads, out, *operands):
        run = functools.partial(emulated, kernels, name, grid, threads, out)
        return jax.pure_callback(lambda *arrays: np.asarray(run(*map(np.asarray, arrays))), out, *operands)

    prompts = tiny.prompts(tiny.weights("qwen2_moe")[0], (9,), seed=3)
    runs = {}
    for kernel in ("xla", "cuda"):
        with monkeypatch.context() as patched:
            patched.setattr(packed_cuda, "_call", call)
            patched.setattr(packed_cuda, "refusal", lambda: None)
            engine = tiny.engine(format="int4-g32", device_kernel=kernel, cache_ratio=0.5, executor="callback")
            runs[kernel] = engine.generate(prompts, max_new_tokens=4)
            engine.close()
    assert runs["cuda"].token_ids == runs["xla"].token_ids
    assert runs["cuda"].stats.summary()["device_kernel"] == "cuda" and emulated.launched


def test_auto_is_xla_without_a_gpu_and_with_one_that_refuses(monkeypatch):
    assert device_kernel("auto", "int4-g64") == "xla"
    monkeypatch.setattr(checks, "default_device", lambda: types.SimpleNamespace(platform="gpu"))
    monkeypatch.setattr(packed_cuda, "refusal", lambda: None)
    assert device_kernel("auto", "int4-g64") == "cuda" and device_kernel("auto", "bf16") == "xla"
    monkeypatch.setattr(packed_cuda, "refusal", lambda: "JaxRuntimeError: no such instruction")
    with pytest.warns(UserWarning, match="no such instruction. XLA computes quantised experts"):
        assert device_kernel("auto", "int4-g64") == "xla"
    with pytest.raises(
        UserError, match=r"device kernel cuda cannot run: JaxRuntimeError: no such instruction; use xla"
    ):
        device_kernel("cuda", "int4-g64")


def test_the_warm_up_times_the_kernel_that_will_run(monkeypatch):
    timed = []

    def note(acc, x, experts, rows, weights, kernel="xla", *_):
        timed.append(kernel)
        return acc

    monkeypatch.setattr(programs, "add_device_experts", note)
    monkeypatch.setattr(packed_cuda, "refusal", lambda: None)
    tiny.engine(format="int4-g64", device_kernel="cuda", profile=None).close()
    assert timed and set(timed) == {"cuda"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_kernel": "cuda"}, "computes quantised experts, and these are f32; use xla"),
        ({"device_kernel": "cuda", "executor": "dense", "format": "int4-g32"}, "dense executor is the reference"),
        ({"device_kernel": "triton"}, "device_kernel 'triton' is unknown; choose one of auto, xla, cuda"),
    ],
)
def test_what_it_cannot_compute_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        tiny.engine(**options)


@pytest.mark.skipif(not tiny.on_cpu(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused():
    with pytest.raises(UserError, match="device kernel cuda cannot run: it needs a GPU, and jax finds none; use xla"):
        tiny.engine(format="int4-g32", device_kernel="cuda")


@needs_compiler
def test_the_kernels_and_what_calls_them_agree_on_sizes(libraries):
    for library in libraries.values():
        assert library.most_pairs() == packed_cuda.MOST_PAIRS
        assert library.threads_of(0) == packed_cuda.GATE_UP_THREADS
        assert library.threads_of(1) == packed_cuda.DOWN_THREADS
    assert packed_cuda.fits(8, 8) and not packed_cuda.fits(9, 1) and not packed_cuda.fits(8, 17)


@pytest.mark.parametrize("name", ["int4-1", "int4-8", "int8-1", "int8-8"])
def test_the_ptx_is_of_this_source(name):
    text = packed_cuda.ptx(name)
    source = hashlib.sha256((KERNELS / "experts.cu").read_bytes()).hexdigest()
    assert f"sha256 {source}" in text.partition("\n")[0], "run scripts/make_ptx.py"
    assert re.findall(r"\.visible \.entry (\w+)", text) == ["silu_gate_up", "add_down"]
    assert ".local" not in text and "ld.global.nc.v4" in text
    assert ".version 8.0" in text and ".target sm_75" in text


def test_on_a_gpu_it_is_two_launches():
    """Lowered for CUDA without compiling: what the optimised program launches is in tests/gpu_aot."""
    pool, _ = pool_of("int4-g64", 64, 32, 2)
    x, slots = np.zeros((2, 64), np.float32), np.zeros((2, 2), np.int32)
    text = (
        jax.jit(packed_cuda.routed)
        .trace(x, x, slots, np.ones((2, 2), np.float32), pool)
        .lower(lowering_platforms=("cuda",))
        .as_text()
    )
    assert text.count(packed_cuda.TARGET) == 2
