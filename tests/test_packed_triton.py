"""The Pallas kernels of quantised experts mean what XLA's form of them means: emulated where there is no GPU,
compiled where there is one.

Lowering for CUDA needs no GPU with jax 0.10: there the tests see that Triton takes every format's kernels.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from grids import few

from hybrimoe_jax.engine import programs
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.packing import ExpertLayout, Format, PackedExpert, dequantise_expert, pack_expert
from hybrimoe_jax.models import packed_triton
from hybrimoe_jax.models.hybrid import HybridMoE
from hybrimoe_jax.models.moe import MoEBlock, expert_forward
from hybrimoe_jax.models.packed import packed_forward
from hybrimoe_jax.models.products import native_here

FORMATS = [
    f"{kind}-g{group}{scale}{activations}"
    for kind, group, scale, activations in itertools.product(
        ("int8", "int4", "int4z"), (32, 64, 128), ("", "-s32"), ("", "-a8")
    )
]
LOADS = (1, 2, 4, 8)
SHAPES = [(100, 41), (41, 100), (300, 8)]
"""(width, hidden): rows no multiple of 8, columns no multiple of a group or of 32, several groups and a short one."""
CASES = [(name, SHAPES[i % 3], LOADS[(i + i // 4) % 4]) for i, name in enumerate(FORMATS)]
"""Every format, with shapes and loads in turn: emulated kernels take seconds to compile."""
REST = [case for case in itertools.product(FORMATS, SHAPES, LOADS) if case not in CASES][::7]
"""Some of the others, marked slow: 7 has no factor in common with 3 shapes or 4 loads, so that all of both are
among them."""
TOLERANCE = 4e-6
"""Of the output's largest magnitude: float32 sums in two orders. Seen: 7e-7."""
KERNEL = "pallas-interpret" if tiny.on_cpu() else "pallas"
DEPRECATED = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
pytestmark = [
    DEPRECATED,
    pytest.mark.skipif(not packed_triton.available(), reason="this jax has no Triton backend for Pallas"),
]


@functools.cache
def expert(name: str, width: int, hidden: int, seed: int = 0) -> PackedExpert:
    rng = np.random.default_rng(seed)
    shapes = (hidden, width), (hidden, width), (width, hidden)
    return pack_expert(*(rng.standard_normal(s, np.float32) * s[1] ** -0.5 for s in shapes), Format.parse(name))


def inputs(load: int, width: int) -> np.ndarray:
    x = np.random.default_rng(load).standard_normal((load, width), np.float32)
    x[-1, : width // 2] *= 50
    return x


# Emulated kernels are long programs, which XLA:CPU takes twice as long to compile if it may optimise them.
OPTIONS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True} if tiny.on_cpu() else {}
reference = jax.jit(packed_forward)
kernel = jax.jit(functools.partial(expert_forward, kernel=KERNEL), compiler_options=OPTIONS)


def on_device(one: PackedExpert) -> PackedExpert:
    return PackedExpert(jnp.asarray(one.data), one.layout)


def check(one: PackedExpert, x: np.ndarray) -> None:
    """The kernel's outputs are the reference's; with `-a8` a value of silu(gate) * up may be rounded the other
    way, in few tokens."""
    device = on_device(one)
    want, have = np.asarray(reference(device, x)), np.asarray(kernel(device, x))
    assert have.shape == want.shape and have.dtype == np.float32
    error = np.abs(have - want).max(axis=1) / np.abs(want).max()
    if not one.layout.format.a8:
        assert error.max() <= TOLERANCE
        return
    assert np.median(error) <= TOLERANCE
    gate, up = np.split(x @ dequantise_expert(one).gate_up.T, 2, axis=1)
    step = np.abs(gate * up).max() / 127
    assert (error * np.abs(want).max()).max() <= 3 * step * np.abs(dequantise_expert(one).down).max()


FEW = ("int8-g32-a8", "int4-g64-s32", "int4z-g128")
"""Of the emulated kernels one of each kind runs by default."""


@pytest.mark.parametrize(
    ("name", "shape", "load"),
    few([case for case in CASES if case[0] in FEW], CASES),
)
def test_every_format_means_what_xla_makes_of_it(name, shape, load):
    check(expert(name, *shape), inputs(load, shape[0]))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shape", "load"), REST)
def test_other_shapes_and_loads(name, shape, load):
    check(expert(name, *shape), inputs(load, shape[0]))


@pytest.mark.parametrize(
    ("name", "width", "hidden", "load"),
    few(
        [("int4z-g128", 264, 9, 8)],
        [("int4-g64", 2100, 24, 1), ("int8-g32-s32", 1028, 16, 3), ("int4z-g128", 264, 9, 8), ("int8-g64", 64, 1, 5)],
    ),
)
def test_matrices_longer_than_what_a_program_reads_at_once(name, width, hidden, load):
    """And loads that are no power of two."""
    check(expert(name, width, hidden), inputs(load, width))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "width", "hidden"), [("int4z-g32", 100, 41), ("int8-g128-s32", 41, 20)])
def test_what_lies_between_the_parts_of_a_buffer_does_not_matter(name, width, hidden):
    """So that nothing past the end of a part is used: bytes that mean not a number there leave every output as it
    was."""
    one = expert(name, width, hidden)
    used = np.zeros(one.nbytes, bool)
    for matrix, mark in zip(one.matrices, PackedExpert(used, one.layout).matrices):
        layout = matrix.layout
        entries = layout.panels * layout.groups * 8
        mark.data[: layout.codes_nbytes] = True
        mark.data[layout.scales_at :][: entries * layout.format.scale_dtype.itemsize] = True
        mark.data[layout.zeros_at :][: entries if layout.format.zeros else 0] = True
    assert 0 < np.count_nonzero(~used) < one.nbytes
    poisoned = PackedExpert(jnp.asarray(np.where(used, one.data, 255).astype(np.uint8)), one.layout)
    x = inputs(2, width)
    have = np.asarray(kernel(poisoned, x))
    np.testing.assert_array_equal(have, np.asarray(kernel(on_device(one), x)))


def test_more_tokens_are_left_to_xla():
    one = expert("int4-g32", 64, 24)
    device = on_device(one)
    few, more = packed_triton.MOST_ROWS, packed_triton.MOST_ROWS + 1
    assert "pallas_call" in str(
        jax.make_jaxpr(functools.partial(expert_forward, kernel=KERNEL))(device, inputs(few, 64))
    )
    assert "pallas_call" not in str(
        jax.make_jaxpr(functools.partial(expert_forward, kernel=KERNEL))(device, inputs(more, 64))
    )


def lowered(layout: ExpertLayout, load: int) -> str:
    """The program for a GPU that need not be there."""
    slot = PackedExpert(jax.ShapeDtypeStruct((layout.nbytes,), jnp.uint8), layout)
    x = jax.ShapeDtypeStruct((load, layout.width), jnp.float32)
    traced = jax.jit(functools.partial(expert_forward, kernel="pallas")).trace(slot, x)
    try:
        return traced.lower(lowering_platforms=("cuda",)).as_text()
    except RuntimeError as error:  # jax 0.11 compiles Triton's code while it lowers
        if "No supported GPU" not in str(error):
            raise
        pytest.skip(f"jax {jax.__version__} lowers for CUDA only where there is a GPU: {error}")


@pytest.mark.parametrize(
    ("name", "load"),
    [pytest.param(name, LOADS[i % 4], marks=[pytest.mark.slow] * (name not in FEW)) for i, name in enumerate(FORMATS)],
)
def test_triton_takes_the_kernels_of_every_format(name, load):
    """Two kernels, silu(gate) * up and down, each given the slot's buffer itself: a slice of it would be a copy."""
    layout = ExpertLayout(Format.parse(name), 2048, 1408)
    text = lowered(layout, load)
    calls = [line for line in text.splitlines() if "custom_call" in line and "triton" in line]
    assert len(calls) == 2
    for call in calls:
        assert f"(tensor<{layout.nbytes}xui8>, tensor<{load}x" in call
        if "__gpu$xla.gpu.triton" in call:
            assert "MLIR" in call and "tt.divisibility" in call
    assert "xui8>) ->" not in text.replace(calls[0], "").replace(calls[1], "")


def test_a_block_computes_its_slots_with_the_kernel_that_it_is_given():
    block = MoEBlock(32, 4, 2, normalise=True, rngs=nnx.Rngs(0))
    slots = tuple(on_device(expert("int4-g32-s32", 32, 24, seed)) for seed in range(2))
    x, mix = inputs(3, 32), np.random.default_rng(0).random((2, 3), np.float32)
    want, have = (HybridMoE(block, kernel)(None, x, mix, slots, None) for kernel in ("xla", KERNEL))
    assert 0 < np.abs(np.asarray(have) - np.asarray(want)).max() <= TOLERANCE * np.abs(np.asarray(want)).max()


@pytest.mark.parametrize("format", few(["int8-g32-a8"], ["int4-g32", "int8-g32-a8"]))
def test_an_engine_says_the_same_with_it(format):
    prompts = tiny.prompts(tiny.weights("qwen2_moe")[0], (5, 20, 9), seed=3)
    runs = {}
    for kernel in ("xla", KERNEL):
        engine = tiny.engine(format=format, device_kernel=kernel, cache_ratio=0.5)
        runs[kernel] = engine.generate(prompts, max_new_tokens=12)
        engine.close()
    have, want = runs[KERNEL], runs["xla"]
    assert have.token_ids == want.token_ids
    assert have.stats.summary()["device_kernel"] == KERNEL and have.stats.summary()["device_experts"] > 20
    assert want.stats.summary()["device_kernel"] == ("native" if native_here() else "xla")


def test_the_warm_up_times_the_kernel_that_will_run(monkeypatch):
    timed = []

    def note(acc, x, experts, rows, weights, kernel="xla"):
        timed.append(kernel)
        return acc

    monkeypatch.setattr(programs, "add_device_experts", note)
    tiny.engine(format="int4-g64", device_kernel=KERNEL, profile=None).close()
    assert timed and set(timed) == {KERNEL}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_kernel": "pallas-interpret"}, "computes quantised experts, and these are f32; use xla"),
        ({"device_kernel": "pallas", "executor": "dense", "format": "int4-g32"}, "dense executor is the reference"),
        ({"device_kernel": "triton"}, "device_kernel 'triton' is unknown; choose one of xla, pallas"),
    ],
)
def test_what_it_cannot_compute_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        tiny.engine(**options)


@pytest.mark.skipif(not tiny.on_cpu(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused():
    with pytest.raises(UserError, match="device kernel 'pallas' needs a GPU, and jax finds none; use xla"):
        tiny.engine(format="int4-g32", device_kernel="pallas")


def test_a_jax_without_the_backend_is_told_apart(monkeypatch):
    monkeypatch.setattr(packed_triton, "triton", None)
    with pytest.raises(UserError, match=r"needs the Triton backend of Pallas, which jax [\d.]+ has not; use xla"):
        tiny.engine(format="int4-g32", device_kernel="pallas")
