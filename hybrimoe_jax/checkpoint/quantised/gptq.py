"""GPTQ folders as AutoGPTQ and GPTQModel write them: int32 words of codes, of zero points, and the group of each input.

    qweight [K * bits / 32, R] int32     codes of one output, neighbouring inputs in one word, lowest bits first
    qzeros  [groups, R * bits / 32]      zero points, neighbouring outputs in one word
    scales  [groups, R] float16
    g_idx   [K] int32                    the group of each input; k // group_size unless act-order sorted the inputs

Checkpoints of format `gptq` (the first version) store each zero point less one; GPTQModel turns them into
`gptq_v2`, which stores them as they are, by adding one to every field of the words at once, carries included;
so does this file. Source: the `quantize_config` keys and tensor layouts published with AutoGPTQ and
GPTQModel; Frantar et al., arXiv 2210.17323.
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
    check_group_size,
    check_stored,
    fitting_group,
    gathered,
    groups_in_order,
    groups_listed,
    run_length,
    scale_type,
    unpack_words,
)
from hybrimoe_jax.checkpoint.safetensors import FileTensor
from hybrimoe_jax.errors import UserError, shown

PARTS = ("qweight", "qzeros", "scales", "g_idx")
VERSIONS = {"gptq": 1, "gptq_v2": 0}
"""`checkpoint_format` -> what must be added to a stored zero point."""


@dataclasses.dataclass(frozen=True)
class GptqTensor(QuantisedTensor):
    """One matrix as GPTQ stores it."""

    qweight: FileTensor
    qzeros: FileTensor
    scales: FileTensor
    g_idx: FileTensor | None
    bits: int
    symmetric: bool
    sorted_inputs: bool  # act-order: `g_idx` must be read to know the groups
    add: int
    group_size: Any  # as the configuration has it; without `g_idx` it is all that tells where a group ends

    def __post_init__(self):
        check_stored(self.where, (self.qweight, self.qzeros), self.scales)
        groups, rows = self.scales.shape
        fields = 32 // self.bits
        columns = self.qweight.shape[0] * fields
        want = (columns // fields, rows), (groups, rows // fields), (columns,)
        have = self.qweight.shape, self.qzeros.shape, self.g_idx.shape if self.g_idx is not None else (columns,)
        if want != have:
            raise UserError(
                f"{self.where}: shapes of qweight, qzeros, g_idx are {[list(s) for s in have]}, not "
                f"{[list(s) for s in want]} as {self.bits} bits and scales {list(self.scales.shape)} need; "
                "download it again"
            )
        if self.g_idx is None and self.sorted_inputs:
            raise UserError(
                f"{self.where}: desc_act is set, but there is no g_idx to say which group an input is in; "
                "download it again"
            )
        if self.g_idx is None:
            _ = self.run  # refuses a number of groups that `group_size` does not give

    @property
    def where(self) -> str:
        return f"{self.qweight.path}: {self.qweight.name.removesuffix('.qweight')}"

    @property
    def shape(self) -> tuple[int, int]:
        return self.scales.shape[1], self.qweight.shape[0] * 32 // self.bits

    @property
    def run(self) -> int:
        """The inputs of a group, where there is no `g_idx`."""
        return check_group_size([self.group_size], self.shape[1], self.scales.shape[0], self.where)

    @property
    def kind(self) -> Kind:
        groups, columns = self.scales.shape[0], self.shape[1]
        if self.sorted_inputs and self.g_idx is not None:
            group = run_length(self.group_of())
        else:
            size = -(-columns // groups) if self.g_idx is not None else self.run
            group = fitting_group(size, columns)
        return Kind(self.bits, group, not self.symmetric, scale_type(self.scales))

    def group_of(self) -> np.ndarray:
        groups, columns = self.scales.shape[0], self.shape[1]
        if self.g_idx is None:
            return groups_in_order(columns, self.run)
        return groups_listed(self.g_idx, groups, self.where)

    def codes(self) -> Codes:
        rows, columns = self.shape
        codes = np.ascontiguousarray(unpack_words(self.qweight.integers(), self.bits, 0, columns).T)
        zeros = self.zero_points(rows)
        codes, zeros = centred(codes, zeros, self.bits, self.where)
        scales = np.ascontiguousarray(self.scales.read().astype(np.float32).T)
        return Codes(codes, scales, zeros, self.group_of())

    def zero_points(self, rows: int) -> np.ndarray:
        """The zero points, [R, N]; UserError where they are those of a symmetric matrix in the other version."""
        one_each = np.uint32(self.add * sum(1 << shift for shift in range(0, 32, self.bits)))
        words = self.qzeros.integers().view(np.uint32) + one_each  # modulo 2^32, as GPTQModel adds
        zeros = np.ascontiguousarray(unpack_words(words, self.bits, 1, rows).T)
        middle, label = 2 ** (self.bits - 1), next(name for name, add in VERSIONS.items() if add == self.add)
        if np.all(zeros == middle - 1 + 2 * self.add):
            other = next(name for name in VERSIONS if name != label)
            raise UserError(
                f"{self.where}: every zero point is {zeros.flat[0]}, where {middle} is the middle: it is labelled "
                f"{label!r} but stored as {other!r}; set checkpoint_format to {other!r} in quantization_config"
            )
        if self.symmetric and not np.all(zeros == middle):
            raise UserError(
                f"{self.where}: quantization_config calls it symmetric (sym) but its zero points are not all {middle}; "
                "set sym to false if they are right, else download it again"
            )
        return zeros


def tensors(settings: Mapping[str, Any], stored: Mapping[str, FileTensor]) -> dict[str, Any]:
    """`stored` with the parts of every quantised matrix `X` replaced by one `GptqTensor` named `X.weight`."""
    version = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if version not in VERSIONS or settings.get("is_marlin_format"):
        raise UserError(
            f"config.json: GPTQ checkpoint_format {shown(version)} is not supported ({', '.join(VERSIONS)} are); "
            "save it in one of these"
        )
    for key in ("adapter", "rotation"):
        if settings.get(key):
            raise UserError(f"config.json: GPTQ {key} {shown(settings[key])} is not supported; save it without")
    if settings.get("pack_dtype", "int32") not in ("int32", None):
        raise UserError(f"config.json: GPTQ pack_dtype {shown(settings['pack_dtype'])} is not supported (int32 is)")

    def matrix(found: dict[str, FileTensor], stem: str) -> GptqTensor:
        qweight, g_idx = found["qweight"], found.get("g_idx")
        bits = settings.get("bits")
        if g_idx is not None and g_idx.shape[0]:  # GPTQModel's `dynamic` rules may differ from module to module
            bits = qweight.shape[0] * 32 / g_idx.shape[0]
        if bits not in (4, 8):
            raise UserError(f"{qweight.path}: {stem} has {bits:g} bits; GPTQ with 4 or 8 is supported")
        symmetric, sorted_inputs = bool(settings.get("sym", False)), bool(settings.get("desc_act", False))
        tensors = (qweight, found["qzeros"], found["scales"], g_idx)
        size = settings.get("group_size")
        return GptqTensor(*tensors, int(bits), symmetric, sorted_inputs, VERSIONS[version], size)

    out = gathered(stored, PARTS, PARTS[:3], matrix)
    if (first := next((tensor for tensor in out.values() if isinstance(tensor, GptqTensor)), None)) is not None:
        first.zero_points(first.shape[0])  # a wrong label is seen before anything is converted
    return out
