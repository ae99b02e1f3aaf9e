"""Products with weight matrices and with experts, and the one place that decides what computes them.

The reference is jax.numpy, on any backend. Inside the engine's programs on the CPU backend (`on_native_kernels`) the
native kernels are called through XLA's foreign-function interface where they were measured to be faster. Training and
the dense executor, which the engine is compared with, never leave the reference.

Measured (2 cores, AVX-512, both on both cores; XLA's time over the kernels'), matrices of 1024 x 1024 and 192 x 192:

    rows        1     2     4     8     16    32    64    128   512
    1024       1.0   1.7   1.7   1.9   1.7   1.4   1.1   1.0   0.8
    192        0.8   1.6   1.5   1.4         1.0         1.0   0.9

So a plain matrix goes to the kernels from 2 rows on, to 128. (2 cores, AVX2, prompts of 64 and 128 tokens of a 466 M
model in float32: 1.07 and 1.02 times as fast as with XLA's products from 33 rows on. Without AVX2 and AVX-512 not
measured.)

At one row the table's weights were in the cache. Read from memory, those of a 466 M model in float32, a token took 11.7
ms with XLA's products and 8.8 with the kernels (another run: 11.9 and 11.1), so large matrices go to them too.

Packed matrices always go to the kernels: XLA would have to unpack them at every call. So do bfloat16 ones, which it
would widen at every call. (2 cores, AVX2, from memory, against XLA's float32 product of the same numbers: 1.4 to 1.8
times as fast at one row, 1.1 to 1.6 at 32, 0.8 to 0.97 at 128 and 512.) An expert is three products and its rows need
no gathering: 1.0 to 1.5 times as fast at one row, 1.1 to 2 above.

Shapes: N rows, [R, K] a matrix of R outputs and K inputs, D model width, m experts.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import chex
import jax
import jax.numpy as jnp

from hybrimoe_jax.formats.packing import PackedMatrix
from hybrimoe_jax.host_kernels.native import ffi
from hybrimoe_jax.models import packed
from hybrimoe_jax.models.precision import einsum
from hybrimoe_jax.models.target import backend

PLAIN_ROWS = range(2, 129)
LARGE = 1 << 19

Weight = jax.Array | PackedMatrix | ffi.AddressedMatrix

_native = contextvars.ContextVar("native kernels in what is being traced", default=False)


def native_here() -> bool:
    """Whether the programs that are traced can call the native kernels."""
    return backend() == "cpu" and ffi.available()


@contextlib.contextmanager
def on_native_kernels() -> Iterator[None]:
    """What is traced inside may call the native kernels: for programs that are neither differentiated nor vmapped."""
    token = _native.set(native_here())
    try:
        yield
    finally:
        _native.reset(token)


def calls_native() -> bool:
    """Whether what is being traced may call them."""
    return _native.get()


def product(x: jax.Array, weight: Weight) -> jax.Array:
    """x [..., K] times the transpose of a matrix [R, K] -> float32 [..., R]."""
    chex.assert_axis_dimension(x, -1, weight.shape[1])
    if isinstance(weight, ffi.AddressedMatrix):  # made for programs of the kernels only
        return ffi.matmul(x, weight)
    if calls_native() and (always_native(weight) or worthwhile(x.size // x.shape[-1], weight.size)):
        return ffi.matmul(x, weight)
    return product_reference(x, weight)


def fused_linear(x: jax.Array, *weights: Weight) -> list[jax.Array]:
    """`product` of x [..., K] with each; matrices of one kind are one call of the kernels, which costs microseconds.

    Measured (466 M model, float32, a decode step, both forms in turns in one process): query, key and value in one
    call, gate and up in another take 0.95 to 0.97 of the time.
    """
    if calls_native() and len({ffi.kind(weight) for weight in weights}) == 1:
        rows, size = x.size // x.shape[-1], sum(weight.size for weight in weights)
        if any(map(always_native, weights)) or worthwhile(rows, size):
            return ffi.matmuls(x, *weights)
    return [product(x, weight) for weight in weights]


def always_native(weight: Weight) -> bool:
    """Whether XLA would have to unpack or widen the matrix at every call, or is not handed it at all."""
    return isinstance(weight, (PackedMatrix, ffi.AddressedMatrix)) or weight.dtype == jnp.bfloat16


def worthwhile(rows: int, size: int) -> bool:
    """Whether the kernels are the faster ones for a float32 matrix of `size` weights."""
    return rows in PLAIN_ROWS or (rows == 1 and size >= LARGE)


def product_reference(x: jax.Array, weight: jax.Array | PackedMatrix) -> jax.Array:
    if isinstance(weight, PackedMatrix):
        rows = packed.rounded_activations(x.reshape(-1, x.shape[-1]), weight.layout.format)
        return packed.matmul(rows, weight).reshape(*x.shape[:-1], -1)
    return einsum("...i,oi->...o", x, weight)
