"""The mixture-of-experts block and its one seam: the block routes, an *experts* object computes the routed part.

Shapes: N tokens (batch and time flattened), E experts, k experts per token, D model width, F expert width.
An experts object is any `RoutedPart`; `DenseExperts` is the reference for all others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from hybrimoe_jax.host_kernels.native import ffi
from hybrimoe_jax.models import packed_cuda
from hybrimoe_jax.models.layers import Linear
from hybrimoe_jax.models.packed import PackedExpert, packed_forward
from hybrimoe_jax.models.precision import einsum
from hybrimoe_jax.models.products import calls_native


class Routing(NamedTuple):
    """A router's decision: `ids` [N, k] int32, `weights` [N, k] that multiply the outputs, softmax `scores` [N, E]."""

    ids: jax.Array
    weights: jax.Array
    scores: jax.Array


RoutedPart = Callable[[int, jax.Array, Routing], jax.Array]
"""`experts(layer, x, routing)`: the sum of the chosen experts' outputs for x [N, D], weighted, [N, D]."""


class MoEBlock(nnx.Module):
    """Router, optional shared experts, and the rule that turns scores into ids and weights.

    The router is called `gate`, as in the checkpoints. `shared_expert` (Qwen2: with a sigmoid `shared_expert_gate` [1,
    D]) or `shared_experts` (DeepSeek) follow them too.
    """

    def __init__(self, width: int, num_experts: int, top_k: int, *, normalise: bool, rngs: nnx.Rngs | None):
        self.gate = Linear(width, num_experts, rngs=rngs)
        self.num_experts, self.top_k, self.normalise = num_experts, top_k, normalise

    def scores(self, x: jax.Array) -> jax.Array:
        """Router probabilities of every expert, x [N, D] -> float32 [N, E]."""
        chex.assert_rank(x, 2)
        return jax.nn.softmax(self.gate(x), axis=-1)

    def select(self, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        """scores [N, E] -> ids [N, k] and the weights [N, k] that multiply the experts' outputs."""
        chex.assert_shape(scores, (None, self.num_experts))
        weights, ids = jax.lax.top_k(scores, self.top_k)
        if self.normalise:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return ids, weights

    def route(self, x: jax.Array) -> Routing:
        scores = self.scores(x)
        ids, weights = self.select(scores)
        return Routing(ids.astype(jnp.int32), weights, scores)

    def shared(self, x: jax.Array) -> jax.Array | None:
        """The part every token takes, [N, D]; None where the family has none."""
        return None

    def __call__(self, layer: int, x: jax.Array, experts: RoutedPart) -> jax.Array:
        chex.assert_rank(x, 2)
        y = experts(layer, x, self.route(x))
        shared = self.shared(x)
        return y if shared is None else y + shared


DeviceExpert = tuple[jax.Array, jax.Array] | PackedExpert
"""A routed expert as programs take it: gate_up [2F, D] (gate rows first) and down [D, F], or quantised bytes."""


def expert_forward(expert: DeviceExpert, x: jax.Array, kernel: str = "xla") -> jax.Array:
    """One expert, plain or quantised: x [N, D] -> [N, D].

    `kernel`: "xla", or "cuda" for quantised ones and few tokens on a GPU (`models.packed_cuda`).
    """
    chex.assert_rank(x, 2)
    if isinstance(expert, PackedExpert):
        if kernel == "cuda" and packed_cuda.fits(x.shape[0]):
            return packed_cuda.add_expert(jnp.zeros_like(x), x, jnp.ones_like(x[:, 0]), expert)
        return packed_forward(expert, x)
    gate_up, down = expert
    chex.assert_shape(gate_up, (2 * down.shape[1], x.shape[1]))
    chex.assert_axis_dimension(down, 0, x.shape[1])
    gate, up = jnp.split(einsum("nd,fd->nf", x, gate_up), 2, axis=-1)
    return einsum("nf,df->nd", jax.nn.silu(gate) * up, down)


SMALL_BYTES = 1 << 20
"""Plain experts below this stay with XLA, which computes beside the dispatching thread; a native call runs in it.

Prompts of a model that fetches each expert took 1.05 to 1.16 times the time with experts of 147 KB, 0.6 to 0.9 with
6 MB. Bfloat16 ones go to the native kernels, since XLA would widen them at every call.
"""


def native_for(expert: DeviceExpert) -> bool:
    """Whether such experts are for the native kernels where these can be called."""
    if isinstance(expert, PackedExpert) or expert[0].dtype == jnp.bfloat16:
        return True
    return sum(matrix.size * matrix.dtype.itemsize for matrix in expert) >= SMALL_BYTES


def add_experts(
    acc: jax.Array, x: jax.Array, weights: jax.Array, *experts: DeviceExpert, kernel: str = "xla"
) -> jax.Array:
    """acc [N, D] plus the given experts of x [N, D], expert i weighted by weights[i] ([n, N]).

    Inside `on_native_kernels` it is one call of the native kernels, which skips rows of weight zero, unless experts are
    small or `kernel` is another one.
    """
    chex.assert_equal_shape((acc, x))
    chex.assert_shape(weights, (len(experts), x.shape[0]))
    if kernel == "xla" and calls_native() and native_for(experts[0]):
        return ffi.experts(acc, x, weights, *experts)
    return add_experts_reference(acc, x, weights, *experts, kernel=kernel)


def add_experts_reference(
    acc: jax.Array, x: jax.Array, weights: jax.Array, *experts: DeviceExpert, kernel: str = "xla"
) -> jax.Array:
    for column, expert in zip(weights, experts, strict=True):
        if kernel == "cuda" and isinstance(expert, PackedExpert) and packed_cuda.fits(x.shape[0]):
            acc = packed_cuda.add_expert(acc, x, column, expert)
            continue
        acc = acc + column[:, None] * expert_forward(expert, x, kernel)
    return acc


def combine_weights(routing: Routing, num_experts: int) -> jax.Array:
    """Dense routing matrix [N, E]: an expert's weight for each token, zero where it was not chosen."""
    chex.assert_equal_shape((routing.ids, routing.weights))
    one_hot = jax.nn.one_hot(routing.ids, num_experts, dtype=routing.weights.dtype)
    return einsum("nk,nke->ne", routing.weights, one_hot)


class DenseExperts:
    """The oracle: every expert is computed for every token and weighted by zero where it was not chosen.

    Args:
      weights: by decoder layer its experts behind one another: (gate_up [E, 2F, D], down [E, D, F]), or a
        PackedExpert with data [E, nbytes]. They are taken one at a time, so that only one is ever dequantised.
    """

    def __init__(self, weights: Sequence[DeviceExpert | None] | Mapping[int, DeviceExpert]):
        self.weights = weights

    def __call__(self, layer: int, x: jax.Array, routing: Routing) -> jax.Array:
        experts = self.weights[layer]
        mix = combine_weights(routing, jax.tree.leaves(experts)[0].shape[0])

        def add(y, one):
            expert, column = one
            return y + column[:, None] * expert_forward(expert, x), None

        y, _ = jax.lax.scan(add, jnp.zeros_like(x), (experts, mix.T))
        return y
