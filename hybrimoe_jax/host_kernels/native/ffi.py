"""The native kernels inside jitted programs on the CPU backend, as XLA FFI calls: no Python and no copy in between.

Shapes: N rows, D model width, F expert width, m experts; a matrix is [R, K], as all weights here.

What they compute is said in jax.numpy by `models.products.product_reference` and `models.moe.add_experts_reference`,
which run on any backend and which they are tested against. Calls can be jitted, but neither differentiated nor vmapped
(jax says so).

XLA's buffers are read where they lie. A call uses up to `threads()` threads, the one that XLA runs it on and the
kernels' helpers; XLA's own pool is idle meanwhile, for the programs here are chains in which each operation waits for
the one before.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.packing import PackedExpert, PackedMatrix
from hybrimoe_jax.host_kernels.native import library
from hybrimoe_jax.host_kernels.native.library import PLAIN, format_code

EXPERTS, MATMUL = "hybrimoe_experts", "hybrimoe_matmul"
GROUPED, LATENT = "hybrimoe_grouped_attention", "hybrimoe_latent_attention"
HANDLERS = {
    EXPERTS: "ffi_experts",
    MATMUL: "ffi_products",
    GROUPED: "ffi_grouped_attention",
    LATENT: "ffi_latent_attention",
}


@functools.cache
def register(name: str, symbol: str) -> None:
    """Makes the library's handler `symbol` known to XLA's CPU backend as `name`."""
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library.library(), symbol)), platform="cpu")


@functools.cache
def available() -> bool:
    """Whether the library can be called from jitted programs.

    It is there, was built with XLA's headers from these sources (it has every handler), and this jax takes them.
    """
    if not library.available():
        return False
    try:
        for name, symbol in HANDLERS.items():
            register(name, symbol)
    except (UserError, AttributeError, RuntimeError):  # no library, one without handlers, or built for another XLA
        return False
    return True


def threads() -> int:
    """Threads of a call: as many as XLA's pool was given (`engine.lanes.threads.split_threads`)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = os.environ.get("NPROC", "")
    return int(given) or cores if given.isdecimal() else cores


@dataclasses.dataclass(frozen=True)
class AddressedMatrix:
    """A matrix [rows, columns] that a program is not handed but finds.

    It lies at the address in row `index` of `table`, uint32 [n, 2] (lower half first). Whoever made the table keeps it
    alive until every call has ended. `code`: its format's number.
    """

    table: Any
    index: int
    code: int
    rows: int
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    @property
    def size(self) -> int:
        return self.rows * self.columns


def _call(name: str, results, *operands, **attributes: int | np.ndarray):
    if not available():
        raise UserError(
            f"{name}: this installation has no native kernels for jitted programs (no C++ compiler, or an older jaxlib)"
        )
    numbers = {**attributes, "isa": library.library().experts_best_isa(), "threads": threads()}
    fixed = {key: number if isinstance(number, np.ndarray) else np.int64(number) for key, number in numbers.items()}
    return jax.ffi.ffi_call(name, results)(*operands, **fixed)


def matmul(x: jax.Array, matrix: jax.Array | PackedMatrix | AddressedMatrix) -> jax.Array:
    """x [..., K] float32 times the transpose of a matrix [R, K], float32, bfloat16 or packed -> float32 [..., R]."""
    return matmuls(x, matrix)[0]


def kind(matrix: jax.Array | PackedMatrix | AddressedMatrix) -> tuple[int, int]:
    """The number of a matrix's format, and K: matrices alike in both go into one call."""
    if isinstance(matrix, AddressedMatrix):
        return matrix.code, matrix.columns
    if isinstance(matrix, PackedMatrix):
        return format_code(matrix.layout.format), matrix.layout.columns
    return PLAIN[matrix.dtype.name], matrix.shape[1]


def matmuls(x: jax.Array, *matrices: jax.Array | PackedMatrix | AddressedMatrix) -> list[jax.Array]:
    """x times the transpose of each of several matrices of one kind, in one call. Addresses share one table."""
    code, columns = kind(matrices[0])
    if x.shape[-1] != columns or any([kind(matrix) != (code, columns) for matrix in matrices]):
        raise ValueError(
            f"x is {x.shape}, the matrices are {[kind(m) for m in matrices]} (format, columns): they do not fit"
        )
    rows = x.reshape(-1, columns)
    results, arrays, tables, places = [], [], [], []
    for matrix in matrices:
        addressed = isinstance(matrix, AddressedMatrix)
        places.append(matrix.index if addressed else -1)
        if addressed:
            tables.append(matrix.table)
        else:
            arrays.append(matrix.data if isinstance(matrix, PackedMatrix) else matrix)
        results.append(jax.ShapeDtypeStruct((rows.shape[0], matrix.shape[0]), jnp.float32))
    if any(other is not tables[0] for other in tables):
        raise ValueError("matrices of one call are looked up in one table")
    made = _call(MATMUL, results, rows, *tables[:1], *arrays, format=code, places=np.array(places, np.int64))
    return [y.reshape(*x.shape[:-1], -1) for y in made]


def experts(
    acc: jax.Array, x: jax.Array, weights: jax.Array, *slots: tuple[jax.Array, jax.Array] | PackedExpert
) -> jax.Array:
    """acc [N, D] plus m experts of x [N, D], expert i weighted by weights[i] ([m, N]); zero skips the row.

    `slots`: the experts, all of one kind: gate_up [2F, D] (gate rows first) and down [D, F], or a PackedExpert.
    """
    first = slots[0]
    if isinstance(first, PackedExpert):
        hidden, code = first.hidden, format_code(first.layout.format)
    else:
        hidden, code = first[1].shape[1], PLAIN[first[1].dtype.name]
    arrays = [array for slot in slots for array in ((slot.data,) if isinstance(slot, PackedExpert) else slot)]
    result = jax.ShapeDtypeStruct(acc.shape, jnp.float32)
    return _call(EXPERTS, result, acc, x, weights, *arrays, format=code, hidden=hidden)
