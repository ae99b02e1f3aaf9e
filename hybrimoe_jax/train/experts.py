"""The routed experts at training speed: tokens sorted by expert into blocks, one batched matmul over the blocks.

`DenseExperts` multiplies every token by every expert, E/k times the work that is needed. Here the N * k
(token, expert) pairs are sorted by expert, every expert's run of pairs is padded to a multiple of `block`
rows, and each block is multiplied by the one expert it belongs to. No pair is ever dropped, whatever the
router does: the number of blocks is bounded by N * k / block + E, so the shapes are static. The idea is that
of the block-sparse experts of MegaBlocks (arXiv 2211.15841), with a gather of the block's weights in place of
a sparse kernel, which XLA does not have on the CPU.

Shapes: N tokens, k experts per token, E experts, R = blocks * block rows, D model width, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from hybrimoe_jax.models.moe import Routing


class Blocks(NamedTuple):
    """Where every (token, expert) pair goes.

    `row` [N, k] of a pair, `token` [R] of a row (N marks padding), `expert` [blocks].
    """

    row: jax.Array
    token: jax.Array
    expert: jax.Array


def assign_blocks(ids: jax.Array, num_experts: int, block: int) -> Blocks:
    """`ids` [N, k] -> the rows of each pair, experts in order, every expert's run padded to whole blocks."""
    chex.assert_rank(ids, 2)
    tokens, top_k = ids.shape
    flat = ids.reshape(-1)
    count = -(-flat.size // block) + num_experts
    load = jnp.bincount(flat, length=num_experts)
    blocks = -(-load // block)
    block_end = jnp.cumsum(blocks)
    order = jnp.argsort(flat, stable=True)
    rank = jnp.zeros_like(flat).at[order].set(jnp.arange(flat.size, dtype=flat.dtype), unique_indices=True)
    within = rank - (jnp.cumsum(load) - load)[flat]
    row = ((block_end - blocks)[flat] * block + within).astype(jnp.int32)
    token = jnp.full((count * block,), tokens, jnp.int32).at[row].set(jnp.arange(flat.size, dtype=jnp.int32) // top_k)
    expert = jnp.searchsorted(block_end, jnp.arange(count), side="right")
    return Blocks(row.reshape(tokens, top_k), token, jnp.minimum(expert, num_experts - 1).astype(jnp.int32))


@jax.custom_vjp
def scatter_rows(x: jax.Array, row: jax.Array, token: jax.Array) -> jax.Array:
    """`x` [N, D] -> [R, D], zero in padding rows.

    The gradient is a gather: XLA:CPU runs a scatter one row at a time.
    """
    return jnp.concatenate([x, jnp.zeros((1, x.shape[1]), x.dtype)])[token]


def _scatter_forward(x, row, token):
    return scatter_rows(x, row, token), row


def _scatter_backward(row, grad):
    return jnp.sum(grad[row], axis=1), None, None


scatter_rows.defvjp(_scatter_forward, _scatter_backward)


@jax.custom_vjp
def gather_rows(y: jax.Array, row: jax.Array, token: jax.Array, slot: jax.Array) -> jax.Array:
    """`y` [R, D] -> [N, k, D]; `slot` [R] says which of its token's k pairs a row is, for the gradient's gather."""
    return y[row]


def _gather_forward(y, row, token, slot):
    return y[row], (token, slot)


def _gather_backward(saved, grad):
    token, slot = saved
    padded = jnp.concatenate([grad, jnp.zeros((1, *grad.shape[1:]), grad.dtype)])
    return padded[token, slot], None, None, None


gather_rows.defvjp(_gather_forward, _gather_backward)


class GroupedExperts:
    """The routed part for training and evaluation; it notes what was routed.

    Equal to `DenseExperts` up to rounding.

    Args:
      weights: by decoder layer (gate_up [E, 2F, D], down [E, D, F]).
      block: rows of one block; smaller wastes less padding, larger makes better matmuls.
      seen: what becomes of the rows that a product is given, such as the rounding of a quantised format's activations.

    Attributes:
      routings: layer -> the `Routing` of the last call, for the load-balancing loss and for statistics.
    """

    def __init__(
        self,
        weights: Mapping[int, tuple[jax.Array, jax.Array]],
        block: int = 64,
        seen: Callable[[jax.Array], jax.Array] = lambda rows: rows,
    ):
        self.weights = weights
        self.block = block
        self.seen = seen
        self.routings: dict[int, Routing] = {}

    def __call__(self, layer: int, x: jax.Array, routing: Routing) -> jax.Array:
        self.routings[layer] = routing
        gate_up, down = self.weights[layer]
        chex.assert_shape(gate_up, (None, 2 * down.shape[2], x.shape[1]))
        chex.assert_shape(down, (gate_up.shape[0], x.shape[1], None))
        row, token, expert = assign_blocks(routing.ids, gate_up.shape[0], self.block)
        rows = token.shape[0]
        slot = jnp.zeros((rows,), jnp.int32).at[row].set(jnp.arange(row.shape[1], dtype=jnp.int32)[None, :])
        packed = scatter_rows(self.seen(x), row, token).reshape(-1, self.block, x.shape[1])
        gate, up = jnp.split(jnp.einsum("brd,bfd->brf", packed, gate_up[expert]), 2, axis=-1)
        inner = self.seen((jax.nn.silu(gate) * up).reshape(rows, -1)).reshape(gate.shape)
        out = jnp.einsum("brf,bdf->brd", inner, down[expert]).reshape(rows, -1)
        pairs = gather_rows(out, row, token, slot)
        return jnp.einsum("nkd,nk->nd", pairs, routing.weights)
