"""compressed-tensors folders in its `pack-quantized` format.

Weights are signed integers of 4 or 8 bits with a scale per group or row.

    weight_packed      [R, K * bits / 32] int32     code + 2^(bits-1), neighbouring inputs in one word, lowest first
    weight_scale       [R, groups]                  float16, bfloat16 or float32; one column with strategy `channel`
    weight_zero_point  [R * bits / 32, groups]      only asymmetric ones; packed along outputs, shifted like the codes
    weight_shape       [2] int64                    R, K
    weight_g_idx       [K] int32                    only with act-order: the group of each input

Source: the `quantization_config` keys and tensor layout published with the compressed-tensors project.
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

PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")


@dataclasses.dataclass(frozen=True)
class PackedTensor(QuantisedTensor):
    """One matrix as compressed-tensors stores it, packed."""

    packed: FileTensor
    scale: FileTensor
    zero_point: FileTensor | None
    g_idx: FileTensor | None
    size: tuple[int, int]
    bits: int
    group_sizes: tuple[Any, ...]  # those of the configuration; -1 is a whole row
    symmetric: bool  # by the configuration

    def __post_init__(self):
        check_stored(self.where, (self.packed, self.zero_point), self.scale)
        rows, columns = self.shape
        fields = 32 // self.bits
        groups = self.scale.shape[1] if len(self.scale.shape) == 2 else 0
        fits = self.packed.shape == (rows, -(-columns // fields)) and self.scale.shape[:1] == (rows,) and groups
        if fits and self.zero_point is not None:
            fits = self.zero_point.shape == (-(-rows // fields), groups)
        if fits and self.g_idx is not None:
            fits = self.g_idx.shape == (columns,)
        if not fits:
            raise UserError(
                f"{self.where}: weight_packed {list(self.packed.shape)} and weight_scale "
                f"{list(self.scale.shape)} do not "
                f"belong to {self.bits} bits of shape {list(self.shape)}; download it again"
            )
        if self.g_idx is None:
            _ = self.group_size  # refuses a number of groups that no size of the configuration gives

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    @property
    def where(self) -> str:
        return f"{self.packed.path}: {self.packed.name.removesuffix('.weight_packed')}"

    @property
    def group_size(self) -> int:
        """The inputs of a group, where there is no `weight_g_idx`."""
        return check_group_size(self.group_sizes, self.shape[1], self.scale.shape[1], self.where)

    @property
    def kind(self) -> Kind:
        if self.g_idx is None:
            group = fitting_group(self.group_size, self.shape[1])
        else:
            group = run_length(self.group_of())
        return Kind(self.bits, group, self.zero_point is not None and not self.symmetric, scale_type(self.scale))

    def group_of(self) -> np.ndarray:
        if self.g_idx is None:
            return groups_in_order(self.shape[1], self.group_size)
        return groups_listed(self.g_idx, self.scale.shape[1], self.where)

    def codes(self) -> Codes:
        rows, columns = self.shape
        codes = unpack_words(self.packed.integers(), self.bits, 1, columns)
        zeros = None
        if self.zero_point is not None:
            zeros = unpack_words(self.zero_point.integers(), self.bits, 0, rows)
        codes, zeros = centred(codes, zeros, self.bits, self.where)
        if zeros is not None and self.symmetric:
            raise UserError(
                f"{self.where}: weight_zero_point moves its zeros, though config.json calls its {self.bits} bits "
                "symmetric; download it again"
            )
        return Codes(codes, self.scale.read().astype(np.float32), zeros, self.group_of())


def tensors(settings: Mapping[str, Any], stored: Mapping[str, FileTensor]) -> dict[str, Any]:
    """`stored` with the parts of every quantised matrix `X` replaced by one `PackedTensor` named `X.weight`."""
    groups = settings.get("config_groups") or {}
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise UserError("config.json: compressed-tensors config_groups must be an object of objects")
    for name, group in groups.items():
        check(name, settings.get("format"), group)
    for key in ("kv_cache_scheme", "transform_config"):
        if settings.get(key):
            raise UserError(f"config.json: compressed-tensors {key} is not supported; save it without")
    weights = [group["weights"] for group in groups.values()]
    asymmetric = {one.get("num_bits") for one in weights if one.get("symmetric") is False}
    symmetric = {one.get("num_bits") for one in weights if one.get("symmetric") is True} - asymmetric
    asymmetric -= {one.get("num_bits") for one in weights if one.get("symmetric") is not False}
    sizes = tuple(-1 if one["strategy"] == "channel" else one.get("group_size") for one in weights)

    def matrix(found: dict[str, FileTensor], stem: str) -> PackedTensor:
        packed = found["weight_packed"]
        rows, columns = (int(n) for n in found["weight_shape"].integers())
        bits = 8 if packed.shape[1] * 4 >= columns else 4
        optional = found.get("weight_zero_point"), found.get("weight_g_idx")
        if optional[0] is None and bits in asymmetric:
            raise UserError(
                f"{packed.path}: {stem} has no weight_zero_point, though config.json calls its {bits} bits asymmetric; "
                "download it again"
            )
        return PackedTensor(packed, found["weight_scale"], *optional, (rows, columns), bits, sizes, bits in symmetric)

    return gathered(stored, PARTS, ("weight_packed", "weight_scale", "weight_shape"), matrix)


def check(name: str, overall: str | None, group: Mapping[str, Any]) -> None:
    """Raises UserError for a scheme that is not a plain group or channel quantisation of weights."""
    weights, style = group.get("weights") or {}, group.get("format") or overall
    what = None
    if not isinstance(weights, Mapping):
        what = f"weights {shown(weights)} (an object is)"
    elif style != "pack-quantized":
        what = f"format {shown(style)} (pack-quantized is)"
    elif group.get("input_activations") or group.get("output_activations"):
        what = "quantised activations (weights alone are)"
    elif weights.get("type", "int") != "int" or weights.get("num_bits") not in (4, 8):
        what = f"weights of type {weights.get('type')} with {weights.get('num_bits')} bits (int with 4 or 8 is)"
    elif weights.get("strategy") not in ("group", "channel"):
        what = f"strategy {shown(weights.get('strategy'))} (group and channel are)"
    if what:
        raise UserError(f"config.json: compressed-tensors {name}: {what.replace(' (', ' is not supported (', 1)}")
