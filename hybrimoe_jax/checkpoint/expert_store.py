"""The host's copy of the routed experts.

`ExpertStore` is where every expert comes from: host kernels compute from its arrays and transfers read them. Experts
are read on first use (one read each) or all at once; once read they stay. Arrays are C-contiguous, 64-byte aligned and
read-only, since kernels and transfers hold them while others read. They lie in few large blocks of memory, one a layer
where all experts are read at once, so that a device's client can be told of them (`engine.lanes.host_memory`).

Shapes: E experts, D model width, F expert width; an expert is gate_up [2F, D] (gate rows first) and down [D, F], or the
bytes of a quantised one (`formats.layout`), which are held as they are stored.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain

import numpy as np
from numpy.typing import DTypeLike

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.packing import ExpertLayout, Format, HostExpert, PackedExpert, pack_expert
from hybrimoe_jax.formats.plain import BLOCK, F32, Arena, ExpertWeights, aligned_bytes, aligned_copy, to_f32

READERS = 2


class ExpertStore:
    """The routed experts of one model in host memory, by MoE layer (0 .. L-1) and expert (0 .. E-1).

    Args:
      read: gives an expert's matrices [3, F*D] (gate, up, down) or an ExpertWeights;
        with `layout`, its bytes or a PackedExpert.
      shape: (L, E, F, D).
      dtype: what the arrays handed out hold; the source's own type, or float32; uint8 with `layout`.
      keep: False hands out a fresh read each time (for a walk over a model larger than memory).
      layout: of quantised experts; None for plain ones.

    Attributes: `arena`, where they lie; None where they are not kept, or lie where `place` puts them.
    """

    def __init__(
        self,
        read: Callable[[int, int], np.ndarray | HostExpert],
        shape: tuple[int, int, int, int],
        dtype: DTypeLike,
        keep: bool = True,
        layout: ExpertLayout | None = None,
    ):
        self.num_layers, self.num_experts, self.hidden, self.width = shape
        self.dtype, self._read, self._keep, self.layout = np.dtype(dtype), read, keep, layout
        self._cells: list[list[HostExpert | None]] = [[None] * self.num_experts for _ in range(self.num_layers)]
        self._locks = [threading.Lock() for _ in range(16)]
        self.arena = Arena() if keep else None
        self._place: Callable[[HostExpert], HostExpert] | None = None

    @classmethod
    def from_arrays(
        cls, layers: Sequence[tuple[np.ndarray, np.ndarray]], dtype: DTypeLike | None = None, format: str | None = None
    ) -> ExpertStore:
        """A store over arrays in memory: per MoE layer gate_up [E, 2F, D] and down [E, D, F].

        They are copied, or rounded to a quantised `format`, on first use.
        """
        layers = [(np.asarray(g), np.asarray(d)) for g, d in layers]
        if not layers:
            raise UserError("ExpertStore: no MoE layers were given")
        count, width, hidden = layers[0][1].shape
        stored = layers[0][1].dtype
        for i, (gate_up, down) in enumerate(layers):
            fits = gate_up.shape == (count, 2 * hidden, width) and down.shape == (count, width, hidden)
            if not fits or gate_up.dtype != stored or down.dtype != stored:
                raise UserError(
                    f"ExpertStore: layer {i} has gate_up {gate_up.shape} {gate_up.dtype} and down {down.shape} "
                    f"{down.dtype}; "
                    f"{(count, 2 * hidden, width)} and {(count, width, hidden)} of {stored} are needed"
                )

        def read(moe_layer: int, expert: int) -> ExpertWeights:
            gate_up, down = layers[moe_layer]
            return ExpertWeights(gate_up[expert], down[expert])

        shape = (len(layers), count, hidden, width)
        if format is None:
            return cls(read, shape, held_dtype(stored, dtype))
        layout = ExpertLayout(Format.parse(format), width, hidden)

        def rounded(moe_layer: int, expert: int) -> PackedExpert:
            gate_up, down = map(to_f32, read(moe_layer, expert))
            return pack_expert(gate_up[:hidden], gate_up[hidden:], down, layout.format)

        return cls(rounded, shape, np.uint8, layout=layout)

    @property
    def format(self) -> str:
        """The weight format that is handed out: `f32`, `bf16`, or a quantised one's name."""
        return str(self.layout.format) if self.layout else "f32" if self.dtype == F32 else "bf16"

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert as handed out."""
        if self.layout is not None:
            return self.layout.nbytes
        return 3 * self.hidden * self.width * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all experts as handed out, whether read yet or not."""
        return self.num_layers * self.num_experts * self.expert_bytes

    @property
    def loaded(self) -> int:
        """How many experts have been read."""
        return sum(cell is not None for layer in self._cells for cell in layer)

    def get(self, moe_layer: int, expert: int) -> HostExpert:
        """One expert's weights, read now if they were not; safe from any thread, read once.

        Raises UserError where the checkpoint's files are damaged, IndexError for a
        MoE layer or expert that does not exist.
        """
        if not (0 <= moe_layer < self.num_layers and 0 <= expert < self.num_experts):
            raise IndexError(
                f"expert {expert} of MoE layer {moe_layer}: the model has {self.num_layers} x {self.num_experts}"
            )
        cell = self._cells[moe_layer][expert]
        if cell is not None:
            return cell
        if not self._keep:
            return self._load(moe_layer, expert)
        with self._locks[(moe_layer * self.num_experts + expert) % len(self._locks)]:
            cell = self._cells[moe_layer][expert]
            if cell is None:
                cell = self._cells[moe_layer][expert] = self._load(moe_layer, expert)
            return cell

    def place(self, where: Callable[[HostExpert], HostExpert]) -> None:
        """From now on every expert, read already or later, is what `where` makes of it: the same arrays elsewhere.

        Call it before anything holds the arrays, or both places stay. Nothing has changed where `where` raises.
        ValueError where experts are not kept.
        """
        if not self._keep:
            raise ValueError("experts that are not kept lie nowhere")
        moved = [[cell if cell is None else where(cell) for cell in layer] for layer in self._cells]
        self._cells, self.arena, self._place = moved, None, where

    @property
    def placed_by(self) -> object | None:
        """The object that has `place`d the experts, if one has."""
        return getattr(self._place, "__self__", None)

    def _load(self, moe_layer: int, expert: int) -> HostExpert:
        weights = self._read_aligned(moe_layer, expert)
        return weights if self._place is None else self._place(weights)

    def _read_aligned(self, moe_layer: int, expert: int) -> HostExpert:
        source = self._read(moe_layer, expert)
        if isinstance(source, PackedExpert):
            source = source.data
        if not isinstance(source, ExpertWeights):
            if self.layout is not None:
                data = aligned_copy(source, arena=self.arena)
                data.flags.writeable = False
                return PackedExpert(data, self.layout)
            gate_up = source[:2].reshape(2 * self.hidden, self.width)
            source = ExpertWeights(gate_up, source[2].reshape(self.width, self.hidden))
        weights = ExpertWeights(*(aligned_copy(matrix, self.dtype, self.arena) for matrix in source))
        for matrix in weights:
            matrix.flags.writeable = False
        return weights

    def load_all(self, progress: Callable[[Iterable, int, str], Iterable] | None = None) -> None:
        """Reads every expert that was not read yet; `progress(items, total, label)` may wrap the walk.

        Two threads: while one reads, the other sums up or copies what it has read. Layer by layer: an arena's block
        holds one.
        """
        if self.arena is not None:
            parts = (2, 1) if self.layout is None else (3,)  # of three matrices of one size, or all of it
            expert = sum(aligned_bytes(part * self.expert_bytes // 3) for part in parts)
            self.arena.block_bytes = max(BLOCK, self.num_experts * expert)
        pool, count = ThreadPoolExecutor(READERS, "experts"), self.num_layers * self.num_experts
        try:
            layers = (pool.map(partial(self.get, layer), range(self.num_experts)) for layer in range(self.num_layers))
            read = chain.from_iterable(layers)
            for _ in read if progress is None else progress(read, count, "loading experts"):
                pass
        finally:
            pool.shutdown(cancel_futures=True)


def held_dtype(stored: np.dtype, wanted: DTypeLike | None) -> np.dtype:
    """The type to hand out: the stored one, or float32 (exact); raises UserError for a conversion that would round."""
    wanted = np.dtype(stored if wanted is None else wanted)
    if wanted not in (stored, np.dtype(np.float32)):
        raise UserError(
            f"experts are stored as {np.dtype(stored)}; {wanted} would round them (convert with --format bf16)"
        )
    return wanted
