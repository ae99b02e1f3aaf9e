"""The native kernels called from jitted programs: the same answers as the jax.numpy references, and what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import each_once

from hybrimoe_jax.engine import programs
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.packing import Format, PackedExpert, PackedMatrix, pack, pack_expert, quantise
from hybrimoe_jax.host_kernels.native import ffi, library
from hybrimoe_jax.host_kernels.native.kernel import NativeKernel
from hybrimoe_jax.models import products
from hybrimoe_jax.models.layers import Linear, SwiGLU
from hybrimoe_jax.models.moe import add_experts_reference, native_for

needs_ffi = pytest.mark.skipif(not products.native_here(), reason="the package was installed without its FFI handlers")
FORMATS = ("f32", "bf16", "int8-g32", "int8-g64-s32-a8", "int4-g64", "int4z-g32", "int4-g128-a8")
RNG = np.random.default_rng


def close(got, want, a8: bool = False) -> None:
    """Float32 sums in another order; with int8 activations a value beside a rounding boundary may take the other
    step."""
    scale = float(np.abs(want).max())
    assert np.abs(np.asarray(got) - np.asarray(want)).max() <= (2e-2 if a8 else 5e-6) * scale


def matrix(rows: int, columns: int, format: str, seed: int = 0):
    weights = RNG(seed).standard_normal((rows, columns), np.float32) / np.float32(columns**0.5)
    if format in ("f32", "bf16"):
        return jnp.asarray(weights, jnp.float32 if format == "f32" else jnp.bfloat16)
    format = Format.parse(format)
    packed = pack(format, *quantise(weights, format))
    return PackedMatrix(jnp.asarray(packed.data), packed.layout)


def expert(width: int, hidden: int, format: str, seed: int):
    if format in ("f32", "bf16"):
        return matrix(2 * hidden, width, format, seed), matrix(width, hidden, format, seed + 1000)
    parts = (RNG(seed + i).standard_normal(shape, np.float32) for i, shape in enumerate([(hidden, width)] * 2))
    down = RNG(seed + 2).standard_normal((width, hidden), np.float32)
    packed = pack_expert(
        *(p / np.float32(width**0.5) for p in parts), down / np.float32(hidden**0.5), Format.parse(format)
    )
    return PackedExpert(jnp.asarray(packed.data), packed.layout)


def tokens(rows: int, width: int, seed: int = 1) -> jax.Array:
    return jnp.asarray(RNG(seed).standard_normal((rows, width), np.float32))


@needs_ffi
@pytest.mark.parametrize(("format", "rows"), each_once(FORMATS, [1, 2, 7, 64, 130]))
def test_products_with_a_matrix_of_any_format_and_odd_sizes(format, rows):
    weight, x = matrix(45, 77, format), tokens(rows, 77)
    close(jax.jit(ffi.matmul)(x, weight), products.product_reference(x, weight), format.endswith("a8"))
    close(ffi.matmul(x, weight), products.product_reference(x, weight), format.endswith("a8"))


@needs_ffi
def test_leading_axes_are_kept():
    x, weight = tokens(6, 33).reshape(2, 3, 33), matrix(9, 33, "int8-g32")
    got = jax.jit(ffi.matmul)(x, weight)
    assert got.shape == (2, 3, 9)
    close(got, products.product_reference(x, weight))


@needs_ffi
@pytest.mark.parametrize(("format", "shape"), each_once(FORMATS, [(1, 1), (1, 4), (2, 3), (7, 2), (64, 4), (130, 1)]))
def test_experts_add_up_and_rows_of_weight_zero_are_skipped(format, shape):
    (rows, count), width, hidden = shape, 77, 45
    slots = [expert(width, hidden, format, seed) for seed in range(count)]
    acc, x = tokens(rows, width, 2), tokens(rows, width)
    weights = RNG(3).standard_normal((count, rows)).astype(np.float32)
    weights[:, ::3] = 0
    weights[-1] = 0
    x_of_unused = x.at[0].set(jnp.nan)  # row 0 has weight zero everywhere: what it holds must not matter
    got = jax.jit(ffi.experts)(acc, x_of_unused, weights, *slots)
    close(got, add_experts_reference(acc, x, weights, *slots), format.endswith("a8"))
    assert np.array_equal(got[0], acc[0])


@needs_ffi
def test_what_is_donated_is_used_up_and_others_are_left_alone():
    slot, x, weights = expert(64, 32, "f32", 0), tokens(3, 64), np.ones((1, 3), np.float32)
    acc = tokens(3, 64, 2)
    kept, before = acc + 0, np.asarray(x).copy()
    want = add_experts_reference(kept, x, weights, slot)
    got = jax.jit(ffi.experts, donate_argnums=0)(acc, x, weights, slot)
    close(got, want)
    assert np.array_equal(x, before)
    again = jax.jit(lambda a: ffi.experts(ffi.experts(a, x, weights, slot), x, weights, slot) + a)(kept)
    close(again, 2 * want)


@needs_ffi
def test_a_result_does_not_depend_on_the_other_rows():
    weight, x = matrix(70, 129, "int4-g64"), tokens(130, 129)
    whole = np.asarray(ffi.matmul(x, weight))
    for row in (0, 64, 129):
        assert np.array_equal(ffi.matmul(x[row : row + 1], weight)[0], whole[row])


@needs_ffi
def test_what_cannot_be_computed_is_refused_clearly():
    x, weight = tokens(4, 12), matrix(5, 12, "f32")
    with pytest.raises(NotImplementedError, match="vmap"):
        jax.vmap(ffi.matmul, in_axes=(0, None))(x[:, None], weight)
    with pytest.raises(ValueError, match="differentiated"):
        jax.grad(lambda x: ffi.matmul(x, weight).sum())(x)
    with pytest.raises(ValueError, match="do not fit"):
        ffi.matmul(tokens(4, 13), weight)
    packed = matrix(5, 12, "int8-g32")
    short = PackedMatrix(packed.data[:-64], packed.layout)
    with pytest.raises(jax.errors.JaxRuntimeError, match="type or size"):
        ffi.matmul(x, short)
    slot = expert(12, 8, "f32", 0)
    with pytest.raises(jax.errors.JaxRuntimeError, match="mix"):
        ffi.experts(x, x, jnp.ones((2, 4)), slot)
    with pytest.raises(jax.errors.JaxRuntimeError, match="type or size"):
        ffi.experts(x, x, jnp.ones((2, 4)), slot, expert(12, 9, "f32", 0))


def custom_calls(function, *operands) -> int:
    return jax.jit(function).lower(*operands).as_text().count("@hybrimoe_matmul")


@needs_ffi
def test_one_seam_decides_what_multiplies():
    plain, packed, narrow = (matrix(32, 64, format) for format in ("f32", "int4-g32", "bf16"))

    def inside(x, weight):
        with products.on_native_kernels():
            return products.product(x, weight)

    cases = (
        (plain, 1, 0),
        (plain, 8, 1),
        (plain, 128, 1),
        (plain, 256, 0),
        (packed, 1, 1),
        (packed, 128, 1),
        (narrow, 1, 1),
        (narrow, 128, 1),
    )
    for weight, rows, native in cases:
        x = tokens(rows, 64)
        assert custom_calls(inside, x, weight) == native
        assert custom_calls(products.product, x, weight) == 0, "outside of the engine's programs it is jax.numpy"
        close(jax.jit(inside)(x, weight), products.product_reference(x, weight))
    assert not products.calls_native()


@needs_ffi
def test_matrices_of_one_kind_are_one_call():
    def inside(x, *weights):
        with products.on_native_kernels():
            return products.fused_linear(x, *weights)

    cases = (
        (("bf16", "bf16", "bf16"), 3, 32, 1),
        (("bf16", "int4-g32"), 3, 32, 2),
        (("f32", "f32"), 3, 32, 1),
        (("f32", "f32"), 1, 32, 0),  # small ones read from the cache: XLA's
        (("f32", "f32"), 1, products.LARGE // 128, 1),
        (("f32", "f32"), 256, products.LARGE // 128, 0),
    )
    for formats, count, outputs, calls in cases:
        x = tokens(count, 64)
        weights = [matrix(outputs + 8 * i, 64, format, i) for i, format in enumerate(formats)]
        assert custom_calls(inside, x, *weights) == calls, (formats, count, outputs)
        for got, weight in zip(jax.jit(inside)(x, *weights), weights, strict=True):
            close(got, products.product_reference(x, weight))


@needs_ffi
def test_modules_take_packed_weights():
    from flax import nnx

    module, x = SwiGLU(64, 48, rngs=nnx.Rngs(0)), tokens(5, 64)
    format = Format.parse("int8-g32")
    for part in (module.gate_proj, module.up_proj, module.down_proj):
        assert isinstance(part, Linear)
        packed = pack(format, *quantise(np.asarray(part.weight.get_value()), format))
        part.weight.set_value(PackedMatrix(jnp.asarray(packed.data), packed.layout))
    want = module(x)
    with products.on_native_kernels():
        close(module(x), want)


def test_without_the_library_everything_else_works(monkeypatch):
    cached = (ffi.available, library.library)
    monkeypatch.setenv(library.VARIABLE, "/nowhere/lib.so")
    for each in cached:
        each.cache_clear()
    try:
        assert not ffi.available() and not products.native_here()
        with products.on_native_kernels():
            assert products.product(jnp.ones((4, 8)), jnp.ones((3, 8)))[0, 0] == 8
        with pytest.raises(UserError, match="no native kernels for jitted programs"):
            ffi.matmul(jnp.ones((4, 8)), jnp.ones((3, 8)))
    finally:
        monkeypatch.undo()
        for each in cached:
            each.cache_clear()


@needs_ffi
@pytest.mark.parametrize("format", ["f32", "int4-g64"])
@pytest.mark.parametrize("rows", [3, 40])
def test_the_engine_gives_device_experts_to_them(format, rows):
    width, hidden = 256, 384
    slots = [expert(width, hidden, format, seed) for seed in range(6)]
    assert all(map(native_for, slots)) and not native_for(expert(32, 16, "f32", 0))
    acc, x = tokens(rows, width, 2), tokens(rows, width)
    chosen = {e: np.flatnonzero(RNG(e).random(rows) < 0.5) for e in range(6)}
    shares = {e: RNG(9 + e).random(len(at)).astype(np.float32) for e, at in chosen.items()}
    dense = np.zeros((6, rows), np.float32)
    for e, at in chosen.items():
        dense[e, at] = shares[e]
    made = programs.dense_rows._cache_size()
    got = programs.add_device_experts(acc, x, list(enumerate(slots)), chosen, shares)
    close(got, add_experts_reference(acc, x, dense, *slots))
    assert programs.add_device_experts(acc, x, [], {}, {}) is acc
    few = rows <= programs.DENSE_ROWS
    assert programs.dense_rows._cache_size() - made == (2 if few else 1), (
        "above a few rows one executable serves any number"
    )


@needs_ffi
@pytest.mark.parametrize(("format", "rows"), each_once(FORMATS, [1, 5, 64]))
def test_several_matrices_in_one_call_are_each_ones_product_bit_for_bit(format, rows):
    x, weights = tokens(rows, 77), [matrix(outputs, 77, format, outputs) for outputs in (45, 8, 131)]
    made = jax.jit(ffi.matmuls)(x, *weights)
    for got, weight in zip(made, weights, strict=True):
        np.testing.assert_array_equal(got, ffi.matmul(x, weight))
    with pytest.raises(ValueError, match="do not fit"):
        ffi.matmuls(x, weights[0], matrix(9, 33, format))


@needs_ffi
@pytest.mark.parametrize("format", ["f32", "bf16", "int4-g32-a8"])
def test_a_matrix_is_found_by_its_address_beside_one_that_is_handed_over(format):
    from hybrimoe_jax.host_kernels.native.routed import table

    x, weights = tokens(3, 77), [matrix(outputs, 77, format, outputs) for outputs in (45, 8, 131)]
    buffers = [weight.data if isinstance(weight, PackedMatrix) else weight for weight in weights]
    addresses = jnp.asarray(table([buffer.unsafe_buffer_pointer() for buffer in buffers]))

    def found(addresses, index):
        return ffi.AddressedMatrix(addresses, index, *ffi.kind(weights[index])[:1], *weights[index].shape)

    got = jax.jit(lambda x, table, handed: ffi.matmuls(x, found(table, 2), handed, found(table, 0)))(
        x, addresses, weights[1]
    )
    for made, weight in zip(got, (weights[2], weights[1], weights[0]), strict=True):
        np.testing.assert_array_equal(made, ffi.matmul(x, weight))
    with pytest.raises(jax.errors.JaxRuntimeError, match="type or size"):
        jax.block_until_ready(ffi.matmul(x, found(addresses[:2], 2)))


@needs_ffi
def test_helpers_that_an_xla_thread_has_started_keep_subnormal_scales(monkeypatch):
    """XLA's threads flush subnormal numbers to zero, and a thread inherits that. Halves below 2^-14 are widened through
    them where the processor is not asked to."""
    format, rng = Format.parse("int8-g32"), RNG(0)
    weights = rng.standard_normal((64, 320), np.float32) * np.float32(1e-3)
    packed, kernel = pack(format, *quantise(weights, format)), NativeKernel(isa="portable")
    x = rng.standard_normal((8000, 320), np.float32)
    library.library().experts_shutdown()
    monkeypatch.setattr(ffi, "threads", lambda: 4)
    jax.block_until_ready(jax.jit(ffi.matmul)(jnp.asarray(x), PackedMatrix(jnp.asarray(packed.data), packed.layout)))
    want = kernel.product(packed, x)
    for _ in range(20):
        np.testing.assert_array_equal(kernel.product(packed, x, threads=4), want)
