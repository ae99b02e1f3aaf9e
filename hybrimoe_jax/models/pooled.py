"""The routed experts of a MoE layer out of one stack of slots, chosen and weighted on the device.

Shapes: N tokens, k experts per token, D model width, F expert width, S slots. A pool is gate_up [S, 2F, D] and down
[S, D, F], or a PackedExpert whose data is [S, nbytes].
"""

from __future__ import annotations

from typing import TypeGuard

import chex
import jax
import jax.numpy as jnp

from hybrimoe_jax.formats.packing import PackedExpert
from hybrimoe_jax.models import packed_cuda
from hybrimoe_jax.models.moe import DeviceExpert, expert_forward

NOWHERE = -1
"""The slot of an expert that is in none."""


def one_of(pool: DeviceExpert, slot: jax.Array) -> DeviceExpert:
    """The expert in one slot."""
    return jax.tree.map(lambda part: jax.lax.dynamic_index_in_dim(part, slot, keepdims=False), pool)


def on_cuda(pool: DeviceExpert, kernel: str, tokens: int, top_k: int) -> TypeGuard[PackedExpert]:
    """Whether the CUDA kernels are asked for, and are for so much."""
    return kernel == "cuda" and isinstance(pool, PackedExpert) and packed_cuda.fits(tokens, top_k)


def one_expert(
    acc: jax.Array,
    x: jax.Array,
    slots: jax.Array,
    weights: jax.Array,
    slot: jax.Array,
    pool: DeviceExpert,
    kernel: str = "xla",
) -> jax.Array:
    """`routed_experts` of one `slot` alone, for the tokens that chose it."""
    if on_cuda(pool, kernel, *slots.shape):
        return packed_cuda.routed(acc, x, jnp.where(slots == slot, slots, NOWHERE), weights, pool)
    weight = jnp.sum(jnp.where(slots == slot, weights, 0), axis=1)
    return acc + weight[:, None] * expert_forward(one_of(pool, slot), x, kernel)


def routed_experts(
    acc: jax.Array, x: jax.Array, slots: jax.Array, weights: jax.Array, pool: DeviceExpert, kernel: str = "xla"
) -> jax.Array:
    """acc [N, D] plus, for each token, its experts that are in slots: [N, D].

    Args: x [N, D]; slots [N, k] int32, `NOWHERE` for an expert that is in none; weights [N, k]. `kernel`: "xla", or
    "cuda" for quantised ones (`packed_cuda`), which reads nothing for what is nowhere.

    XLA's form reads a slot there that its token reads anyway, and it counts for nothing. Meant for few tokens: the
    weights of N k experts are read, one as often as it is chosen.
    """
    chex.assert_equal_shape((acc, x))
    chex.assert_equal_shape((slots, weights))
    tokens, top_k = slots.shape
    if on_cuda(pool, kernel, tokens, top_k):
        return packed_cuda.routed(acc, x, slots, weights, pool)
    here = slots > NOWHERE
    safe = jnp.where(here, slots, jnp.maximum(0, jnp.max(slots, axis=1, keepdims=True)))
    chosen = jax.tree.map(lambda part: part[safe.reshape(-1)], pool)
    each = jnp.repeat(x, top_k, axis=0)[:, None]
    y = jax.vmap(expert_forward)(chosen, each)
    y = jnp.where(here[..., None], weights[..., None] * y.reshape(tokens, top_k, -1), 0)
    return acc + jnp.sum(y, axis=1)
