"""From a folder's `quantization_config` to tensors under the names of the unquantised model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from hybrimoe_jax.checkpoint.quantised import awq, compressed_tensors, gptq
from hybrimoe_jax.checkpoint.quantised.codes import QuantisedTensor
from hybrimoe_jax.checkpoint.safetensors import FileTensor
from hybrimoe_jax.errors import UserError

METHODS = {"gptq": gptq.tensors, "awq": awq.tensors, "compressed-tensors": compressed_tensors.tensors}


def method_of(settings: Any) -> str:
    """The `quant_method`; raises UserError where it is not one of `METHODS`."""
    method = settings.get("quant_method", "unknown") if isinstance(settings, Mapping) else "unknown"
    if not isinstance(method, str) or method not in METHODS:
        raise UserError(
            f"config.json: quantization_config ({method}) is not supported ({', '.join(METHODS)} are); "
            "use an unquantised checkpoint"
        )
    return method


def expand(settings: Mapping[str, Any], stored: Mapping[str, FileTensor], known: Collection[str]) -> dict[str, Any]:
    """The stored tensors with quantised matrices under their plain names.

    Biases of zeros, which AutoGPTQ adds to layers that have none, are dropped where the model does not know them
    (`known`). Raises UserError for a method or variant that is not supported and for damage seen in the headers.
    """
    tensors = METHODS[method_of(settings)](settings, stored)
    made_up = []
    for name, tensor in tensors.items():
        stem, _, part = name.rpartition(".")
        if part == "bias" and name not in known and isinstance(tensors.get(f"{stem}.weight"), QuantisedTensor):
            if not tensor.read().any():
                made_up.append(name)
    return {name: tensor for name, tensor in tensors.items() if name not in made_up}
