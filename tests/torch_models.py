"""The tiny models of `tiny` as the PyTorch engine takes them: something with a checkpoint's methods."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import tiny

from hybrimoe_jax.checkpoint.expert_store import ExpertStore

_numbers = itertools.count()


@dataclasses.dataclass
class TinyCheckpoint:
    """What `TorchOffload` asks of a `Checkpoint`."""

    config: Any
    weights: dict
    arrays: list
    format: str = "f32"
    tokenizer: Any = None
    generation_config: dict = dataclasses.field(default_factory=dict)
    path: Path = dataclasses.field(default_factory=lambda: Path(f"tiny-{next(_numbers)}"))
    """Engines of one folder share its experts; no two of these do."""

    @classmethod
    def of(cls, family: str, format: str = "f32") -> TinyCheckpoint:
        return cls(*tiny.weights(family), format)

    def frequencies(self) -> None:
        return None

    def dense(self, verify: bool = False) -> dict:
        return self.weights

    def experts(self, lazy: bool, verify: bool, keep: bool) -> ExpertStore:
        arrays, plain = self.arrays, self.format in ("f32", "bf16")
        if self.format == "bf16":
            arrays = [tuple(matrix.astype(tiny.BF16) for matrix in layer) for layer in arrays]
        return ExpertStore.from_arrays(arrays, format=None if plain else self.format)


def offload(family: str, *, format: str = "f32", **options):
    """A `TorchOffload` of a tiny model with the invented machine's costs, as `tiny.engine`."""
    from hybrimoe_jax.baselines.torch_offload import TorchOffload

    checkpoint = TinyCheckpoint.of(family, format)
    if not options.get("device", "").startswith("paced"):
        options = {"profile": tiny.costs(checkpoint.config, format=format), **options}
    return TorchOffload(checkpoint, threads=1, **{"prefill_chunk": 16, **options})
