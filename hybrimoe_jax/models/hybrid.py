"""The MoE block as one jitted Flax module whose missing experts run on the host through `jax.pure_callback`.

It is the simple reference for the overlapped executor: a callback blocks its whole program, so nothing overlaps here.
The function called back touches no jax (calling jax inside deadlocks) and keeps no statistics (a pure callback may be
dropped or repeated). It is one stable function for all layers and engines, with `engine` and `layer` as operands, so
that layers share an executable.

Shapes: N tokens, D model width, k experts per token, n slots given.
"""

from __future__ import annotations

import weakref
from typing import Protocol

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hybrimoe_jax.models.moe import DeviceExpert, MoEBlock, expert_forward


class Host(Protocol):
    """Computes host experts, in NumPy only: x [N, D] -> [N, D]; `ids` [N, k] is -1 where an expert is not its own."""

    def __call__(self, layer: int, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray: ...


_HOSTS: weakref.WeakValueDictionary[int, Host] = weakref.WeakValueDictionary()


def register_host(host: Host) -> int:
    """Makes `host` callable from jitted code and returns its handle. The registry holds it weakly."""
    handle = max(_HOSTS, default=0) + 1
    _HOSTS[handle] = host
    return handle


def _call_host(handle, layer, x, ids, weights):
    x, ids, weights = np.asarray(x), np.asarray(ids), np.asarray(weights)
    return _HOSTS[int(handle)](int(layer), x, ids, weights)


class HybridMoE(nnx.Module):
    """A MoE block's output from device slots and host experts together. `kernel` as of `expert_forward`."""

    def __init__(self, block: MoEBlock, kernel: str = "xla"):
        self.block, self.kernel = block, kernel

    def __call__(
        self,
        acc: jax.Array | None,
        x: jax.Array,
        slot_weights: jax.Array,
        slots: tuple[DeviceExpert, ...],
        host: tuple[jax.Array, jax.Array, jax.Array, jax.Array] | None,
    ) -> jax.Array:
        """x [N, D] -> routed and shared output [N, D].

        Args:
          acc: [N, D] from an earlier call on the same x (which then already holds the shared experts), or None.
          slot_weights: [n, N], an expert's routing weight for each row, zero where it was not chosen.
          slots: the n experts.
          host: (engine handle, layer, ids [N, k], weights [N, k]), or None where the host has nothing to do.
        """
        chex.assert_rank(x, 2)
        chex.assert_shape(slot_weights, (len(slots), x.shape[0]))
        y = acc
        if y is None:
            shared = self.block.shared(x)
            y = jnp.zeros_like(x) if shared is None else shared
        for expert, column in zip(slots, slot_weights, strict=True):
            y = y + column[:, None] * expert_forward(expert, x, self.kernel)
        if host is not None:
            handle, layer, ids, weights = host
            result = jax.ShapeDtypeStruct(x.shape, jnp.float32)
            y = y + jax.pure_callback(_call_host, result, handle, layer, x, ids, weights, vmap_method="sequential")
        return y
