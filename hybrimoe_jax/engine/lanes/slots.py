"""The device side of the cache: one donated buffer per slot, written in place.

Each holds one expert (two buffers for a plain one).

Measured on XLA:CPU: experts kept as separate arrays and passed as arguments run 3-10 times faster than experts indexed
out of one stacked buffer, because nothing copies weights. Only the thread that owns the pool may call it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from hybrimoe_jax.decide.plan import Victim
from hybrimoe_jax.formats.packing import ExpertLayout, HostExpert, PackedExpert
from hybrimoe_jax.models.moe import DeviceExpert


def _overwrite(slot: DeviceExpert, new: DeviceExpert) -> DeviceExpert:
    return jax.tree.map(lambda old, part: jax.lax.dynamic_update_slice(old, part, (0,) * old.ndim), slot, new)


write_slot = jax.jit(_overwrite, donate_argnums=0)
"""(slot, expert) -> slot, in place: the returned buffers are the donated ones, so a fetch allocates nothing."""


class SlotPool:
    """Slots of every MoE layer, plus a few staging slots that no layer owns.

    Args:
      slots: how many slots each layer has.
      hidden, width: D and F; an expert is gate_up [2F, D] and down [D, F] of `dtype`,
      layout: or, where this is given, the bytes of a quantised expert.
      staging: slots through which experts are streamed that find no place (at least two, so that one fills while one
        is read).
      pooled: all layers share the sum of the slots; a victim is then (layer, expert).
    """

    def __init__(
        self,
        slots: list[int],
        hidden: int,
        width: int,
        dtype=jnp.float32,
        staging: int = 2,
        layout: ExpertLayout | None = None,
        pooled: bool = False,
    ):
        self._shapes, self._count = ((2 * width, hidden), (hidden, width)), max(2, staging)
        self._layers, self._slots = len(slots), [sum(slots)] if pooled else list(slots)
        self._pooled = pooled
        self.dtype, self.layout = dtype, layout
        self.clear()
        self.expert_bytes = sum(a.nbytes for a in jax.tree.leaves(self._staging[0]))

    def clear(self) -> None:
        """Starts anew with empty buffers."""
        self._buffers: list[list[DeviceExpert]] = []  # the old ones go before new ones are made
        self._staging: list[DeviceExpert] = []
        self._buffers = [[self._empty() for _ in range(n)] for n in self._slots]
        self._staging = [self._empty() for _ in range(self._count)]
        self._next_staging = 0
        self._where: list[dict[int, int]] = [{} for _ in range(self._layers)]
        self._free: list[list[int]] = [list(range(n))[::-1] for n in self._slots]

    def _empty(self) -> DeviceExpert:
        if self.layout is not None:
            return PackedExpert(jnp.zeros(self.layout.nbytes, jnp.uint8), self.layout)
        gate_up, down = (jnp.zeros(shape, self.dtype) for shape in self._shapes)
        return gate_up, down

    @property
    def nbytes(self) -> int:
        return self.expert_bytes * (len(self._staging) + sum(len(layer) for layer in self._buffers))

    def residents(self, layer: int) -> frozenset[int]:
        return frozenset(self._where[layer])

    def get(self, layer: int, expert: int) -> DeviceExpert:
        return self._of(self._buffers, layer)[self._where[layer][expert]]

    def _of(self, groups: list[list], layer: int) -> list:
        """The layer's own list, or the one that all layers share."""
        return groups[0 if self._pooled else layer]

    def some(self, count: int) -> list[DeviceExpert]:
        """Up to `count` different slots, staging ones included, whatever they hold (to time device experts on)."""
        return [slot for layer in [self._staging, *self._buffers] for slot in layer][:count]

    def write(self, layer: int, expert: int, new: DeviceExpert, victim: Victim | None) -> DeviceExpert:
        """Puts `new` into the victim's slot (a free one if None) and returns the slot's arrays."""
        where = self._where[layer]
        if expert in where:
            raise RuntimeError(f"expert {expert} of MoE layer {layer} is already resident")
        buffers = self._of(self._buffers, layer)
        if victim is None:
            index = self._of(self._free, layer).pop()
        else:
            owner, left = victim if isinstance(victim, tuple) else (layer, victim)
            index = self._where[owner].pop(left)
        buffers[index] = write_slot(buffers[index], new)
        where[expert] = index
        return buffers[index]

    def stream(self, new: DeviceExpert) -> DeviceExpert:
        """Puts `new` into the next staging slot; it lives until that slot comes round again."""
        index = self._next_staging
        self._next_staging = (index + 1) % len(self._staging)
        self._staging[index] = write_slot(self._staging[index], new)
        return self._staging[index]

    def verify(self, layer: int, expected) -> None:
        """Debug: every resident slot of the layer must equal `expected(expert)`.

        RuntimeError naming the first that does not.
        """
        for expert in self._where[layer]:
            want: HostExpert = expected(expert)
            for have, reference in zip(jax.tree.leaves(self.get(layer, expert)), jax.tree.leaves(want), strict=True):
                if not np.array_equal(np.array(have, copy=True), np.asarray(reference, dtype=have.dtype)):
                    raise RuntimeError(f"slot of MoE layer {layer} does not hold expert {expert}")
