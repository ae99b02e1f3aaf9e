"""All slots in one buffer, and a table on the device that says which of them holds whom.

So a program finds the residents that a router has chosen by itself, before the host has read the routing, and one
executable serves any number of them. Compiled for an H100, a token's residents are two kernels of ours (docs/gpu.md);
on XLA's CPU backend separate slots are several times faster (docs/design.md).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from hybrimoe_jax.engine import programs
from hybrimoe_jax.engine.inputs import bucket
from hybrimoe_jax.engine.lanes.pacing import NO_PACING, block_seconds
from hybrimoe_jax.engine.lanes.slots import SlotPool, empty_expert
from hybrimoe_jax.engine.programs import Routed
from hybrimoe_jax.host_kernels.native.pace import begin, end
from hybrimoe_jax.models.moe import DeviceExpert, expert_forward
from hybrimoe_jax.models.parameters import merge
from hybrimoe_jax.models.pooled import NOWHERE, one_expert, one_of, routed_experts


class StackedSlots(SlotPool):
    """One buffer for all slots; a place is a slot's number, on the device. See `SlotPool`.

    Attributes: `pool`, `table`: the buffer, and int32 [MoE layers, E], the slot of each expert, `NOWHERE` for those in
    none. Both are donated when a slot is written.
    """

    def __init__(self, *args, num_experts: int, **kwargs):
        self._num_experts = num_experts
        super().__init__(*args, **kwargs)
        most = max(sum(self._slots) + self._count, num_experts, self._layers) + 1
        # Numbers that programs are handed wait on the device: a new one would be a transfer at every call.
        self._numbers = jax.device_put([np.int32(number) for number in range(most)])
        self._nobody = jax.device_put(np.int32(NOWHERE))

    def block(self, layer, routed: Routed, left_out: list[int], pace=None) -> jax.Array:
        """A MoE layer's shared experts, and those of each token that are in slots, in one program: [N, D].

        Args: layer: a `DeviceLayer`. left_out: residents that somebody else computes. pace: `pacing.block`.
        """
        count = bucket(len(left_out), routed.ids.shape[1]) if left_out else 0
        others = tuple(self._numbers[expert] for expert in left_out) + (self._nobody,) * (count - len(left_out))
        run = block_program(layer.graphdef, layer.programs.shared is not None, self.kernel)
        return run(layer.params, routed, self.table, self._numbers[layer.moe_layer], others, self.pool, pace)

    def arrays(self, place):
        return one_of(self.pool, place)

    def buffers(self, place):
        return jax.tree.leaves(self.pool)

    def add(self, acc, routed, experts, rows, weights, pacing=NO_PACING):
        few, kernel = len(routed.x) <= programs.DENSE_ROWS, self.kernel
        for expert, place in experts:
            pace = pacing.experts((len(rows[expert]),))
            if few:
                acc = add_chosen(acc, routed, self._numbers[expert], place, self.pool, kernel=kernel, pace=pace)
            else:
                chosen = programs.padded_rows(rows[expert], weights[expert], len(routed.x))
                acc = add_gathered(acc, routed.x, *chosen, place, self.pool, kernel=kernel, pace=pace)
        return acc

    def _empty_slots(self) -> None:
        vars(self).pop("pool", None)  # the old ones go before new ones are made
        self.pool: DeviceExpert = empty_expert(self._shapes, self.dtype, self.layout, sum(self._slots) + self._count)
        self.table = jnp.full((self._layers, self._num_experts), NOWHERE, jnp.int32)

    def _place(self, index):
        return self._numbers[index]

    def _overwrite(self, index, new, enters, leaves) -> None:
        nobody = self._layers, 0  # outside the table: writes nothing
        at = [self._numbers[number] for pair in (enters or nobody, leaves or nobody) for number in pair]
        self.pool, self.table = write_stacked(self.pool, self.table, self._numbers[index], new, *at)


def finder(pool: SlotPool, rows: int) -> StackedSlots | None:
    """The pool, where its programs can tell which experts of so many rows are in slots: it has a `block` for them."""
    return pool if isinstance(pool, StackedSlots) and rows <= programs.DENSE_ROWS else None


def _write(pool, table, slot, new: DeviceExpert, layer, expert, old_layer, old_expert):
    zero = jnp.int32(0)
    pool = jax.tree.map(
        lambda all_, part: jax.lax.dynamic_update_slice(
            all_, part[None].astype(all_.dtype), (slot, *[zero] * part.ndim)
        ),
        pool,
        new,
    )
    table = table.at[old_layer, old_expert].set(NOWHERE, mode="drop")
    return pool, table.at[layer, expert].set(slot, mode="drop")


write_stacked = jax.jit(_write, donate_argnums=(0, 1))
"""(pool, table, slot, expert, who enters, who leaves) -> pool, table, in place."""


@functools.cache
def block_program(graphdef, has_shared: bool, kernel: str):
    """(params, routed, table, layer, left_out, pool, pace) -> [N, D] for every layer with this static part."""

    def block(params, routed: Routed, table, layer, left_out, pool, pace=None):
        with jax.named_scope("block"):
            x, slots = begin(routed.x, pace), table[layer][routed.ids]
            for expert in left_out:
                slots = jnp.where(routed.ids == expert, NOWHERE, slots)
            acc = merge(graphdef, params).ffn.shared(x) if has_shared else jnp.zeros_like(x)
            acc = routed_experts(acc, x, slots, routed.weights, pool, kernel)
            loads = jnp.zeros(table.shape[1], jnp.int32).at[routed.ids].add(slots > NOWHERE)
            return end(acc, pace, block_seconds(pace, loads))

    return programs.program(block)


def _add_chosen(acc, routed: Routed, expert, slot, pool, kernel: str, pace=None):
    """`acc` [N, D] plus one expert, weighted by what the routing gives it."""
    slots = jnp.where(routed.ids == expert, slot, NOWHERE)
    return end(one_expert(acc, begin(routed.x, pace), slots, routed.weights, slot, pool, kernel), pace)


def _add_gathered(acc, x, rows, weights, slot, pool, kernel: str, pace=None):
    """`acc` [N, D] plus one expert for the rows [C] routed to it (padding: row 0 with weight 0)."""
    x = begin(x, pace)
    return end(acc.at[rows].add(weights[:, None] * expert_forward(one_of(pool, slot), x[rows], kernel)), pace)


add_chosen = programs.program(_add_chosen, static_argnames="kernel")
add_gathered = programs.program(_add_gathered, static_argnames="kernel")
