"""Whether a converted checkpoint's `manifest.json` describes the model of its `config.json`, value by value.

What is accepted here is what a conversion writes, or wrote: a hash of each dense tensor and of each expert, and in all
but the oldest a CRC-32 besides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybrimoe_jax.checkpoint.shards import DTYPES, EXPERTS, FORMATS, ExpertForm
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.packing import Format, MatrixLayout
from hybrimoe_jax.models.config import ModelConfig
from hybrimoe_jax.models.parameters import split
from hybrimoe_jax.models.registry import build_model


def check_manifest(path: Path, config: ModelConfig, manifest: dict[str, Any]) -> dict[str, int]:
    """The arrays that the manifest at `path` says there are: `SHARD/state/NAME` -> bytes.

    UserError where it is damaged, or does not fit the configuration's model.
    """
    leaves = {name: tuple(leaf.shape) for name, leaf in split(build_model(config))[1].items()}
    try:
        form = ExpertForm.of(_text(manifest["format"]), config.hidden_size, config.moe_width)
        shards = manifest["pieces"]
        names = [_text(shard["name"]) for shard in shards]
        layers = tuple(shard["layer"] for shard in shards if shard["experts"])
        records = [(shard["name"], *item) for shard in shards for item in shard["dense"].items()]
        fits = all(_experts_fit(shard["experts"], config.num_experts, form) for shard in shards if shard["experts"])
        fits &= layers == config.moe_layers and len(set(names)) == len(shards) == config.num_hidden_layers + 1
        fits &= len(records) == len(leaves) == len({name for _, name, _ in records} & leaves.keys())
        if fits:
            sizes = {f"{shard}/state/{name}": _dense_bytes(record, leaves[name]) for shard, name, record in records}
            experts = config.num_experts * form.nbytes
            sizes |= {f"{shard['name']}/state/{EXPERTS}": experts for shard in shards if shard["experts"]}
            if manifest.get("dense_format") is not None:
                Format.parse(_text(manifest["dense_format"]))
            return sizes
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (AttributeError, LookupError, TypeError):
        raise UserError(f"{path}: damaged; convert the original again") from None
    except ValueError:
        pass
    raise UserError(f"{path}: does not describe the model of config.json; convert the original again")


def _experts_fit(record: Mapping[str, Any], count: int, form: ExpertForm) -> bool:
    """Of a layer's experts; TypeError or LookupError for what is no record, or one without hashes."""
    hashes = [_text(value) for value in _list(record["hashes"])]
    crcs = [_whole(value) for value in _list(record["crc32s"])] if "crc32s" in record else hashes
    return _shape(record["shape"]) == (count, *form.row) and len(hashes) == len(crcs) == count


def _dense_bytes(record: Mapping[str, Any], shape: tuple[int, ...]) -> int:
    """Of a tensor of the model's shape; TypeError or LookupError for what is no record, ValueError for another's."""
    stored, dtype = _shape(record["shape"]), _text(record["dtype"])
    _text(record["hash"])
    _whole(record.get("crc32", 0))
    if "format" in record or "matrix" in record:
        layout = MatrixLayout(Format.parse(_text(record["format"])), *_shape(record["matrix"]))
        if _shape(record["matrix"]) != shape or stored != (layout.nbytes,) or dtype != "uint8":
            raise ValueError
    elif stored != shape or DTYPES.get(dtype) not in FORMATS.values():
        raise ValueError
    return math.prod(stored) * DTYPES[dtype].itemsize


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise TypeError
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError
    return value


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(map(_whole, _list(value)))
