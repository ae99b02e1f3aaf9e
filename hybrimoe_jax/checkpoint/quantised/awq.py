"""AWQ folders, `gemm` version: int32 words along the outputs, in the order that its GPU kernel likes.

    qweight [K, R / 8] int32        8 outputs in a word; field i holds output ORDER[i] of the 8
    qzeros  [groups, R / 8] int32   the same, zero points as they are
    scales  [groups, R] float16

Source: the `quantization_config` keys and tensor layout published with AutoAWQ; Lin et al., arXiv 2306.00978.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from hybrimoe_jax.checkpoint.quantised.codes import (
    Codes,
    Kind,
    QuantisedTensor,
    centred,
    check_stored,
    fitting_group,
    gathered,
    groups_in_order,
    scale_type,
    unpack_words,
)
from hybrimoe_jax.checkpoint.safetensors import FileTensor
from hybrimoe_jax.errors import UserError, shown

PARTS = ("qweight", "qzeros", "scales")
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclasses.dataclass(frozen=True)
class AwqTensor(QuantisedTensor):
    """One matrix as AWQ stores it."""

    qweight: FileTensor
    qzeros: FileTensor
    scales: FileTensor

    def __post_init__(self):
        check_stored(self.where, (self.qweight, self.qzeros), self.scales)
        (groups, rows), columns = self.scales.shape, self.qweight.shape[0]
        want = (columns, rows // 8), (groups, rows // 8)
        have = self.qweight.shape, self.qzeros.shape
        if want != have or rows % 8 or columns % groups:
            raise UserError(
                f"{self.where}: qweight {list(have[0])}, qzeros {list(have[1])} and scales "
                f"{list(self.scales.shape)} do "
                "not belong together; download it again"
            )

    @property
    def where(self) -> str:
        return f"{self.qweight.path}: {self.qweight.name.removesuffix('.qweight')}"

    @property
    def shape(self) -> tuple[int, int]:
        return self.scales.shape[1], self.qweight.shape[0]

    @property
    def kind(self) -> Kind:
        columns, groups = self.shape[1], self.scales.shape[0]
        return Kind(4, fitting_group(columns // groups, columns), True, scale_type(self.scales))

    def group_of(self) -> np.ndarray:
        return groups_in_order(self.shape[1], self.shape[1] // self.scales.shape[0])

    def codes(self) -> Codes:
        codes, zeros = (in_order(part.integers()) for part in (self.qweight, self.qzeros))
        codes, zeros = centred(codes, zeros, 4, self.where)
        scales = np.ascontiguousarray(self.scales.read().astype(np.float32).T)
        return Codes(codes, scales, zeros, self.group_of())


def in_order(words: np.ndarray) -> np.ndarray:
    """int32 [n, R / 8] -> uint8 [R, n]."""
    fields = unpack_words(words, 4, 1, words.shape[1] * 8).reshape(words.shape[0], -1, 8)
    return np.ascontiguousarray(fields[:, :, np.argsort(ORDER)].reshape(words.shape[0], -1).T)


def tensors(settings: Mapping[str, Any], stored: Mapping[str, FileTensor]) -> dict[str, Any]:
    """`stored` with the parts of every quantised matrix `X` replaced by one `AwqTensor` named `X.weight`."""
    bits = settings.get("bits", settings.get("w_bit", 4))
    version = str(settings.get("version") or settings.get("format") or "gemm").lower()
    if bits != 4 or version != "gemm":
        raise UserError(
            f"config.json: AWQ with {shown(bits)} bits in version {shown(version)} is not supported "
            "(4 bits in version 'gemm' are)"
        )
    return gathered(stored, PARTS, PARTS, lambda found, stem: AwqTensor(*(found[part] for part in PARTS)))
