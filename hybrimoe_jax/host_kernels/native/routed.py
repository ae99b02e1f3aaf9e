"""A layer's routed experts in a jitted CPU program: ids and weights in, their weighted sum out, without Python.

Shapes: N tokens, D model width, E experts of the layer, k experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hybrimoe_jax.host_kernels.native.ffi import register

NAME = "hybrimoe_routed"


def table(addresses: Sequence[int]) -> np.ndarray:
    """Addresses as a program is handed them, uint32 [n, 2].

    `routed` looks up in them the records of experts (`HostKernel.native_handle`), `ffi.matmuls` matrices; what they
    came from must outlive every call.
    """
    return np.array(addresses, "<u8").view("<u4").reshape(-1, 2)


def routed(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    table: jax.Array,
    threads: jax.Array,
    isa: int,
    first: int = 0,
    count: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """x [N, D] float32, ids [N, k] int32, weights [N, k] float32, threads int32 [] -> sums [N, D], seconds [1].

    A sum is over a token's experts, each times its weight.

    The layer's experts are `count` of the table's from `first` on; all of them where that is not said.

    The error of an id outside the table is XLA's. CPU backend only.
    """
    register(NAME, "experts_ffi_routed")
    results = (jax.ShapeDtypeStruct(x.shape, jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32))
    numbers = {"isa": isa, "first": first, "experts": len(table) if count is None else count}
    call = jax.ffi.ffi_call(NAME, results)
    sums, seconds = call(x, ids, weights, table, threads, **{k: np.int64(v) for k, v in numbers.items()})
    return sums, seconds
