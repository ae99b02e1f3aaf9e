"""The device side of the cache: slots that experts are written into in place, and what computes the experts in them.

`SlotPool` knows which slot holds whom; how slots lie in memory is its two kinds' business. `SeparateSlots`, here: one
donated buffer a slot (two for a plain expert), passed to programs as arguments. Measured on XLA:CPU: experts kept so
run 3-10 times faster than experts indexed out of one stacked buffer, because nothing copies weights. `stacked`: all
slots in one buffer, found on the device through a table, as a GPU wants it.

Only the thread that owns the pool may call it.
"""

from __future__ import annotations

import abc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrimoe_jax.decide.plan import Victim
from hybrimoe_jax.engine import programs
from hybrimoe_jax.engine.lanes.pacing import NO_PACING, NoPacing
from hybrimoe_jax.formats.packing import ExpertLayout, HostExpert, PackedExpert
from hybrimoe_jax.models.moe import DeviceExpert

Place = Any
"""Where an expert lies, to be handed back to `add`: its arrays, or its slot's number. Valid until that is written."""
Experts = list[tuple[int, Place]]


class SlotPool(abc.ABC):
    """Slots of every MoE layer, plus a few staging slots that no layer owns.

    Args:
      slots: how many slots each layer has.
      hidden, width: D and F; an expert is gate_up [2F, D] and down [D, F] of `dtype`,
      layout: or, where this is given, the bytes of a quantised expert.
      staging: slots through which experts are streamed that find no place (at least two, so that one fills while one
        is read).
      pooled: all layers share the sum of the slots; a victim is then (layer, expert).
      kernel: what computes them, an `EngineConfig.device_kernel`.

    Attributes: `pooled`, as given.
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
        kernel: str = "xla",
    ):
        self._shapes, self._count = ((2 * width, hidden), (hidden, width)), max(2, staging)
        self._layers, self._slots = len(slots), [sum(slots)] if pooled else list(slots)
        self.pooled = pooled
        self.dtype, self.layout, self.kernel = dtype, layout, kernel
        self.expert_bytes = layout.nbytes if layout is not None else 3 * hidden * width * np.dtype(dtype).itemsize
        self.clear()

    def resize(self, slots: list[int]) -> None:
        """Other slots for each layer; what they hold is lost with the next `clear`, which must follow."""
        self._slots = [sum(slots)] if self.pooled else list(slots)

    def clear(self) -> None:
        """Starts anew with empty slots."""
        self._empty_slots()
        self._next_staging = 0
        self._where: list[dict[int, int]] = [{} for _ in range(self._layers)]
        starts = np.cumsum([0, *self._slots]).tolist()
        self._free: list[list[int]] = [list(range(at, at + n))[::-1] for at, n in zip(starts, self._slots)]

    @property
    def nbytes(self) -> int:
        return self.expert_bytes * (self._count + sum(self._slots))

    def residents(self, layer: int) -> frozenset[int]:
        return frozenset(self._where[layer])

    def free(self, layer: int) -> int:
        """How many slots the layer may fill before somebody must go."""
        return len(self._free[0 if self.pooled else layer])

    def get(self, layer: int, expert: int) -> Place:
        return self._place(self._where[layer][expert])

    def write(self, layer: int, expert: int, new: DeviceExpert, victim: Victim | None) -> Place:
        """Puts `new` into the victim's slot (a free one if None)."""
        where = self._where[layer]
        if expert in where:
            raise RuntimeError(f"expert {expert} of MoE layer {layer} is already resident")
        gone = None
        if victim is None:
            index = self._free[0 if self.pooled else layer].pop()
        else:
            gone = victim if isinstance(victim, tuple) else (layer, victim)
            index = self._where[gone[0]].pop(gone[1])
        self._overwrite(index, new, (layer, expert), gone)
        where[expert] = index
        return self._place(index)

    def stream(self, new: DeviceExpert) -> Place:
        """Puts `new` into the next staging slot; it lives until that slot comes round again."""
        index = sum(self._slots) + self._next_staging
        self._next_staging = (self._next_staging + 1) % self._count
        self._overwrite(index, new, None, None)
        return self._place(index)

    def some(self, count: int) -> list[Place]:
        """Up to `count` different slots, staging ones included, whatever they hold (to time device experts on)."""
        total = sum(self._slots)
        return [self._place(i) for i in [*range(total, total + self._count), *range(total)][:count]]

    def verify(self, layer: int, expected) -> None:
        """Debug: every resident slot of the layer must equal `expected(expert)`.

        RuntimeError naming the first that does not.
        """
        for expert in self._where[layer]:
            want: HostExpert = expected(expert)
            have = jax.tree.leaves(self.arrays(self.get(layer, expert)))
            for array, reference in zip(have, jax.tree.leaves(want), strict=True):
                if not np.array_equal(np.array(array, copy=True), np.asarray(reference, dtype=array.dtype)):
                    raise RuntimeError(f"slot of MoE layer {layer} does not hold expert {expert}")

    @abc.abstractmethod
    def arrays(self, place: Place) -> DeviceExpert:
        """The expert that lies there."""

    @abc.abstractmethod
    def buffers(self, place: Place) -> list[jax.Array]:
        """What is ready once that slot is written."""

    @abc.abstractmethod
    def add(
        self, acc: jax.Array, routed: programs.Routed, experts: Experts, rows, weights, pacing: NoPacing = NO_PACING
    ) -> jax.Array:
        """`acc` [N, D] plus experts of the routed x [N, D], asynchronously.

        Args: experts: (id, place). rows, weights: per id, the rows [load] routed to it and their weights [load], numpy.
        """

    @abc.abstractmethod
    def _empty_slots(self) -> None: ...

    @abc.abstractmethod
    def _place(self, index: int) -> Place: ...

    @abc.abstractmethod
    def _overwrite(
        self, index: int, new: DeviceExpert, enters: tuple[int, int] | None, leaves: tuple[int, int] | None
    ) -> None:
        """Writes slot `index`; (layer, expert) of who is resident in it from now on, and of who was."""


def empty_expert(shapes, dtype, layout: ExpertLayout | None, *stack: int) -> DeviceExpert:
    """Zeros for one expert, or for as many as `stack` says behind one another."""
    if layout is not None:
        return PackedExpert(jnp.zeros((*stack, layout.nbytes), jnp.uint8), layout)
    gate_up, down = (jnp.zeros((*stack, *shape), dtype) for shape in shapes)
    return gate_up, down


def _overwrite(slot: DeviceExpert, new: DeviceExpert) -> DeviceExpert:
    return jax.tree.map(
        lambda old, part: jax.lax.dynamic_update_slice(old, part.astype(old.dtype), (0,) * old.ndim), slot, new
    )


write_slot = jax.jit(_overwrite, donate_argnums=0)
"""(slot, expert) -> slot, in place: the returned buffers are the donated ones, so a fetch allocates nothing."""


class SeparateSlots(SlotPool):
    """A buffer a slot; a place is the slot's arrays."""

    def arrays(self, place):
        return place

    def buffers(self, place):
        return jax.tree.leaves(place)

    def add(self, acc, routed, experts, rows, weights, pacing=NO_PACING):
        return programs.add_device_experts(acc, routed.x, experts, rows, weights, self.kernel, pacing)

    def _empty_slots(self) -> None:
        self._buffers: list[DeviceExpert] = []  # the old ones go before new ones are made
        total = sum(self._slots) + self._count
        self._buffers = [empty_expert(self._shapes, self.dtype, self.layout) for _ in range(total)]

    def _place(self, index):
        return self._buffers[index]

    def _overwrite(self, index, new, enters, leaves) -> None:
        self._buffers[index] = write_slot(self._buffers[index], new)
