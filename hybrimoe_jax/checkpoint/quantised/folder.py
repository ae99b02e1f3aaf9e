"""From a folder's `quantization_config`, or the files beside, to tensors under the names of the unquantised model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from hybrimoe_jax.checkpoint.quantised import awq, compressed_tensors, gptq
from hybrimoe_jax.checkpoint.quantised.codes import QuantisedTensor
from hybrimoe_jax.checkpoint.safetensors import FileTensor
from hybrimoe_jax.errors import UserError, shown
from hybrimoe_jax.files import present, read_json

BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Where AutoGPTQ and AutoAWQ wrote the settings before `config.json` had them -> the method, where it is not said."""
SAME = {"w_bit": "bits", "q_group_size": "group_size"}
"""AutoAWQ's names of them -> those of `config.json`."""
NUMBERS = ("quant_method", "bits", "group_size", "sym", "desc_act", "checkpoint_format", "zero_point", "version")
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


def settings_of(folder: Path, stated: Any, stored: Iterable[str]) -> Any:
    """What `config.json` states (None: nothing), and what only the files `BESIDE` say; None for plain weights.

    A file that a quantiser left beside weights that are plain now is not looked at. Raises UserError where tensors are
    quantised and nothing says how, and where two files say different things.
    """
    coded = next((name for name in stored if name.endswith(".qweight")), None)
    if coded is None or not isinstance(stated or {}, Mapping):
        return stated or None
    found, where = dict(stated or {}), "config.json"
    for name, method in BESIDE.items():
        if not present(folder / name):
            continue
        beside = read_json(folder / name)
        if not isinstance(beside, Mapping):
            raise UserError(f"{folder / name}: not a JSON object")
        beside = {SAME.get(key, key): value for key, value in beside.items() if value is not None}
        beside.setdefault("quant_method", method)
        for key in NUMBERS:
            ours, theirs = (str(side.get(key)).lower() for side in (found, beside))
            if found.get(key) is not None and key in beside and ours != theirs:
                raise UserError(
                    f"{folder / name}: {key} is {shown(beside[key])}, but {shown(found[key])} in {where}; remove the "
                    "file that does not belong to these weights"
                )
        found, where = beside | {key: value for key, value in found.items() if value is not None}, name
    if not found:
        raise UserError(
            f"{folder}: {coded} is quantised, but neither config.json has a quantization_config nor is there a "
            f"{' or '.join(BESIDE)}; download it again"
        )
    return found


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
