"""A model's weights wherever they lie, in a file or in memory, read a few rows at a time.

Weights come in *shards*: `outer` (token table, final norm, head) and one for each decoder layer, so that whoever
walks over a model holds one shard at a time.

Shapes: E experts, D model width, F expert width. A routed expert is gate [F, D], up [F, D], down [D, F].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hybrimoe_jax.errors import UserError, shown_name
from hybrimoe_jax.formats.packing import ExpertLayout, PackedExpert, dequantise
from hybrimoe_jax.formats.plain import BF16
from hybrimoe_jax.models.config import ModelConfig


class Tensor(Protocol):
    """An array that may still lie in a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray: ...


def by_new_name(tensors: Iterable[tuple[str, str, Any]], where: object) -> dict[str, Any]:
    """Tensors under new names, from (new name, the one in the file, tensor).

    UserError, naming both, where two of a file come to stand under one.
    """
    out, before = dict[str, Any](), dict[str, str]()
    for new, old, tensor in tensors:
        if new in out:
            raise UserError(
                f"{where}: {shown_name(before[new])} and {shown_name(old)} are both {shown_name(new)}; download or "
                "save it again"
            )
        out[new], before[new] = tensor, old
    return out


@dataclasses.dataclass(frozen=True)
class ArrayTensor:
    """A tensor already in memory."""

    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.array[start:stop]


class Experts(Protocol):
    """A layer's routed experts wherever they lie."""

    @property
    def count(self) -> int: ...

    @property
    def dtypes(self) -> tuple[np.dtype, ...]: ...

    def read(self, expert: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """-> gate [F, D], up [F, D], down [D, F]."""
        ...


@dataclasses.dataclass(frozen=True)
class StackedExperts:
    """A layer's routed experts as two fused tensors: gate_up [E, 2F, D] (gate rows first) and down [E, D, F]."""

    gate_up: Tensor
    down: Tensor

    @property
    def count(self) -> int:
        return self.down.shape[0]

    @property
    def dtypes(self) -> tuple[np.dtype, ...]:
        return self.gate_up.dtype, self.down.dtype

    def read(self, expert: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """-> gate [F, D], up [F, D], down [D, F]."""
        gate_up = self.gate_up.read(expert, expert + 1)[0]
        half = gate_up.shape[0] // 2
        return gate_up[:half], gate_up[half:], self.down.read(expert, expert + 1)[0]


@dataclasses.dataclass(frozen=True)
class ListedExperts:
    """A layer's routed experts as three tensors each: `matrices[e]` is (gate [F, D], up [F, D], down [D, F])."""

    matrices: tuple[tuple[Tensor, Tensor, Tensor], ...]

    @property
    def count(self) -> int:
        return len(self.matrices)

    @property
    def dtypes(self) -> tuple[np.dtype, ...]:
        return tuple(t.dtype for triple in self.matrices for t in triple)

    def read(self, expert: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        gate, up, down = self.matrices[expert]
        return gate.read(), up.read(), down.read()


@dataclasses.dataclass(frozen=True)
class PackedExperts:
    """A layer's routed experts that are quantised already: `packed(e)` gives one."""

    count: int
    layout: ExpertLayout
    packed: Callable[[int], PackedExpert]

    @property
    def dtypes(self) -> tuple[np.dtype, ...]:
        return (np.dtype(np.float32),)

    def read(self, expert: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """-> what the codes stand for: gate [F, D], up [F, D], down [D, F], float32."""
        gate, up, down = map(dequantise, self.packed(expert).matrices)
        return gate, up, down


@dataclasses.dataclass(frozen=True)
class Shard:
    """What is converted, checked and written as one: `layer` is the decoder layer's index, None for `outer`."""

    name: str
    layer: int | None
    dense: Mapping[str, Tensor]
    experts: Experts | None


@dataclasses.dataclass(frozen=True)
class Weights:
    """A whole model's weights, wherever they lie; `files` says what they were read from (name -> size, time).

    `seed` is that of random weights, None for others; `calibration` identifies the text by which experts are rounded.
    """

    config: ModelConfig
    raw_config: dict[str, Any]
    shards: tuple[Shard, ...]
    folder: Path | None = None
    files: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    seed: int | None = None
    calibration: str | None = None

    @property
    def expert_format(self) -> str:
        """The format that keeps the routed experts as they are.

        A quantised one's name, `bf16` where all are stored so, else `f32`.
        """
        formats = {str(p.experts.layout.format) for p in self.shards if isinstance(p.experts, PackedExperts)}
        if formats:
            (format,) = formats
            return format
        return "bf16" if self.expert_dtype == BF16 else "f32"

    @property
    def expert_dtype(self) -> np.dtype:
        """bfloat16 where every routed expert is stored so, else float32 (exact for float16 too)."""
        dtypes = {d for shard in self.shards if shard.experts for d in shard.experts.dtypes}
        return BF16 if dtypes == {BF16} else np.dtype(np.float32)


def row_block(shape: tuple[int, ...], dtype: np.dtype, limit: int = 4 << 20) -> int:
    """How many rows of the first axis fit in `limit` bytes, at least one."""
    row = int(np.prod(shape[1:], dtype=np.int64)) * np.dtype(dtype).itemsize
    return max(1, min(shape[0], limit // max(row, 1)))
