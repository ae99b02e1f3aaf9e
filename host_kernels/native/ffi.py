"""The native kernels inside jitted programs on the CPU backend, as XLA FFI calls: no Python and no copy in between.

Shapes: N rows, D model width, F expert width, m experts; a matrix is [R, K], as all weights here.

Beside each function stands its `_reference` in jax.numpy, which says what it computes, runs on any backend, and is what it is
tested against. The calls themselves can be jitted and donated to, but neither differentiated nor vmapped (jax says so).

XLA's buffers are read where they lie. A call uses up to `threads()` threads, the one that XLA runs it on and the kernels'
helpers; XLA's own pool is idle meanwhile, for the programs here are chains in which each operation waits for the one before.
"""

from __future__ import annotations

import functools
import os

import jax
import jax.numpy as jnp

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.host_kernels.native import library

EXPERTS, MATMUL = "hybrimoe_experts", "hybrimoe_matmul"
HANDLERS = {EXPERTS: "ffi_experts", MATMUL: "ffi_matmul"}
PRECISION = jax.lax.Precision.HIGHEST


@functools.cache
def register(name: str, symbol: str) -> None:
    """Makes the library's handler `symbol` known to XLA's CPU backend as `name`."""
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library.library(), symbol)), platform="cpu")


@functools.cache
def available() -> bool:
    """Whether the library is there, was built with XLA's headers, and this jax takes its handlers."""
    if not library.available():
        return False
    try:
        for name, symbol in HANDLERS.items():
            register(name, symbol)
    except (UserError, AttributeError, RuntimeError):  # no library, one without handlers, or built for another XLA
        return False
    return True


def threads() -> int:
    """Threads of a call: as many as XLA's pool was given (`runtime.threads.divide`)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(os.environ.get("NPROC") or cores)


@functools.cache
def _isa() -> int:
    return next(iter(library.isas().values()))


def _call(name: str, results, *operands):
    if not available():
        raise UserError(
            f"{name}: no native kernels for jitted programs here (see hybrimoe_jax.host_kernels.native.ffi.available)"
        )
    call = jax.ffi.ffi_call(name, results)
    return call(*operands, isa=_isa(), threads=threads())


def matmul(x: jax.Array, *weights: jax.Array) -> tuple[jax.Array, ...]:
    """x [..., K] float32 times each of the float32 matrices [R, K], transposed -> a tuple of [..., R]. One call for all of them."""
    rows = x.reshape(-1, x.shape[-1])
    results = [jax.ShapeDtypeStruct((rows.shape[0], w.shape[0]), jnp.float32) for w in weights]
    made = _call(MATMUL, results, rows, *weights)
    return tuple(y.reshape(*x.shape[:-1], -1) for y in made)


def matmul_reference(x: jax.Array, *weights: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(jnp.einsum("...i,oi->...o", x, w, precision=PRECISION) for w in weights)


def experts(acc: jax.Array, x: jax.Array, weights: jax.Array, *slots: jax.Array) -> jax.Array:
    """acc [N, D] plus m experts of x [N, D], expert i weighted by weights[i] ([m, N]); where that is zero the row is skipped.

    `slots`: gate_up [2F, D] (gate rows first) and down [D, F] of each expert, all float32.
    """
    return _call(EXPERTS, jax.ShapeDtypeStruct(acc.shape, jnp.float32), acc, x, weights, *slots)


def experts_reference(acc: jax.Array, x: jax.Array, weights: jax.Array, *slots: jax.Array) -> jax.Array:
    for mix, gate_up, down in zip(weights, slots[::2], slots[1::2], strict=True):
        gate, up = jnp.split(matmul_reference(x, gate_up)[0], 2, axis=-1)
        acc = acc + mix[:, None] * matmul_reference(jax.nn.silu(gate) * up, down)[0]
    return acc
