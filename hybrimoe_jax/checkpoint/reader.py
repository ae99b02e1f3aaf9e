"""Opening a converted checkpoint: what its folder holds, checked, and its dense tensors and routed experts."""

from __future__ import annotations

import dataclasses
import functools
import json
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from hybrimoe_jax import arguments
from hybrimoe_jax.checkpoint.expert_store import ExpertStore, held_dtype
from hybrimoe_jax.checkpoint.item_files import item_names, items_of
from hybrimoe_jax.checkpoint.manifest import check_manifest
from hybrimoe_jax.checkpoint.orbax import check_path, open_leaf, read_leaves, read_rows
from hybrimoe_jax.checkpoint.shards import EXPERTS, LAYOUT, PLAIN_VERSION, VERSION, ExpertForm, damage, digest
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.files import present, read_json
from hybrimoe_jax.formats.packing import (
    Format,
    MatrixLayout,
    PackedMatrix,
)
from hybrimoe_jax.models.config import ModelConfig
from hybrimoe_jax.models.registry import parse_config

FREQUENCIES = "expert_frequencies.json"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A converted checkpoint folder: everything but the weights is read when it is opened."""

    path: Path
    config: ModelConfig
    raw_config: dict[str, Any]
    generation_config: dict[str, Any]
    manifest: dict[str, Any]

    @property
    def format(self) -> str:
        """The experts' weight format: `f32`, `bf16`, or a quantised one's name."""
        return self.manifest["format"]

    @property
    def shards(self) -> dict[str, dict[str, Any]]:
        """The manifest's records by shard name."""
        return {shard["name"]: shard for shard in self.manifest["pieces"]}

    def frequencies(self) -> list[list[float]] | None:
        """Activation counts [MoE layer][expert] from other text, for static placements.

        They lie in `expert_frequencies.json`; None where the checkpoint has none. Raises UserError where the file does
        not fit the model.
        """
        path = self.path / FREQUENCIES
        if not present(path):
            return None
        saved = read_json(path)
        counts = saved.get("counts") if isinstance(saved, dict) else None
        shape = (len(self.config.moe_layers), self.config.num_experts)
        try:
            table = np.asarray(counts, np.float64)
        except (TypeError, ValueError, OverflowError):
            table = np.zeros((0, 0))
        if table.shape != shape or not ((table >= 0) & (table <= 1e18)).all():
            raise UserError(
                f"{path}: `counts` must be {shape[0]} lists of {shape[1]} counts; delete the file or make it again"
            )
        return table.tolist()

    @functools.cached_property
    def tokenizer(self):
        """The checkpoint's `text.Tokenizer`, or None where it came without one."""
        from hybrimoe_jax.text import Tokenizer

        known = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
        return Tokenizer(self.path) if any(present(self.path / name) for name in known) else None

    @property
    def dense_format(self) -> str | None:
        """The format of quantised dense projections; None where all dense tensors are plain."""
        return self.manifest.get("dense_format")

    def dense(self, names: Iterable[str] | None = None, verify: bool = False) -> dict[str, np.ndarray | PackedMatrix]:
        """Every tensor outside the routed experts (or just `names`) by checkpoint name, as stored.

        Raises UserError where a file is damaged, or a tensor's CRC-32 (with `verify` its hash) is not the manifest's.
        """
        wanted = None if names is None else set(names)
        out, items = {}, items_of(self.path)
        for name, shard in self.shards.items():
            chosen = [n for n in shard["dense"] if wanted is None or n in wanted]
            forms = {n: (tuple(shard["dense"][n]["shape"]), shard["dense"][n]["dtype"]) for n in chosen}
            out |= read_leaves(items / name, forms)
            for tensor in chosen:
                record = shard["dense"][tensor]
                how = damage(out[tensor], record["hash"] if verify else None, record.get("crc32"))
                if how is not None:
                    raise UserError(
                        f"{self.path}: tensor {tensor} is corrupted (its {how} differs from the manifest's); convert "
                        "the original again"
                    )
            for tensor in chosen:
                if "format" in shard["dense"][tensor]:
                    out[tensor] = self._packed(tensor, shard["dense"][tensor], out[tensor])
        return out

    def _packed(self, name: str, record: dict[str, Any], data: np.ndarray) -> PackedMatrix:
        layout = MatrixLayout(Format.parse(record["format"]), *record["matrix"])
        if data.shape != (layout.nbytes,):
            raise UserError(
                f"{self.path}: tensor {name} has {data.size} bytes where {record['format']} needs "
                f"{layout.nbytes}; convert the original again"
            )
        return PackedMatrix(data, layout)

    def experts(
        self, dtype=None, lazy: bool = True, verify: bool = False, keep: bool = True, progress: Any = None
    ) -> ExpertStore:
        """The routed experts.

        Args:
          dtype: float32 widens bfloat16 exactly; None keeps the stored type. Quantised experts stay as they are.
          lazy: read each expert on first use; False reads all now.
          verify: hash each expert when it is read, instead of comparing its CRC-32, which checkpoints of old lack; a
            difference raises UserError naming layer and expert.
          progress: wraps the walk over all of them, see `ExpertStore.load_all`.
        """
        records = [shard for shard in self.manifest["pieces"] if shard["experts"]]
        if not records:
            raise UserError(f"{self.path}: the model has no mixture-of-experts layer")
        form = ExpertForm.of(self.format, self.config.hidden_size, self.config.moe_width)
        held = form.dtype if form.layout else held_dtype(form.dtype, dtype)
        opened: list[Any] = [None] * len(records)
        opening, items = threading.Lock(), items_of(self.path)
        stored = (self.config.num_experts, *form.row), form.dtype.name

        def read(moe_layer: int, expert: int) -> np.ndarray:
            record = records[moe_layer]
            folder = items / record["name"]
            with opening:
                if opened[moe_layer] is None:
                    opened[moe_layer] = open_leaf(folder, EXPERTS, form=stored)
            packed = read_rows(opened[moe_layer], expert, folder, EXPERTS)
            sums = record["experts"]
            crc = sums["crc32s"][expert] if "crc32s" in sums else None
            how = damage(packed, sums["hashes"][expert] if verify else None, crc)
            if how is not None:
                raise UserError(
                    f"{self.path}: expert {expert} of layer {record['layer']} is corrupted (its {how} differs from the "
                    "manifest's); convert the original again"
                )
            return packed

        shape = (len(records), self.config.num_experts, self.config.moe_width, self.config.hidden_size)
        store = ExpertStore(read, shape, held, keep, form.layout)
        if not lazy:
            store.load_all(progress)
        return store


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a folder made by `python -m hybrimoe_jax.convert`.

    Raises UserError for a wrong, incomplete or foreign one.
    """
    path = Path(arguments.path("checkpoint", path))
    if not path.is_dir():
        raise UserError(f"{path}: {'not a folder' if path.exists() else 'no such folder'}; give a converted checkpoint")
    if not (path / "manifest.json").is_file():
        if any(path.glob("*.safetensors")) or (path / "config.json").is_file():
            raise UserError(f"{path}: not converted yet; run: python -m hybrimoe_jax.convert {path} DST")
        raise UserError(f"{path}: no manifest.json; give a folder made by python -m hybrimoe_jax.convert")
    check_path(path)
    manifest = read_json(path / "manifest.json")
    if not isinstance(manifest, dict) or manifest.get("layout") != LAYOUT:
        raise UserError(f"{path / 'manifest.json'}: not the manifest of a checkpoint made by hybrimoe_jax.convert")
    if manifest.get("version") not in (PLAIN_VERSION, VERSION):
        raise UserError(
            f"{path}: checkpoint layout version {manifest.get('version')}, this program reads {PLAIN_VERSION} "
            f"and {VERSION}; convert the original again"
        )
    raw = read_json(path / "config.json")
    if digest(json.dumps(raw, indent=2, sort_keys=True).encode()) != manifest.get("config"):
        raise UserError(
            f"{path / 'config.json'}: changed since the conversion; restore it or convert the original again"
        )
    config = parse_config(raw)
    arrays, items = check_manifest(path / "manifest.json", config, manifest), items_of(path)
    there = item_names(items, arrays)
    absent = [shard["name"] for shard in manifest["pieces"] if shard["name"] not in there]
    if absent:
        raise UserError(f"{path}: incomplete, {', '.join(absent)} missing in {items.name}; convert the original again")
    generation = path / "generation_config.json"
    defaults = read_json(generation) if present(generation) else {}
    if not isinstance(defaults, dict):
        raise UserError(f"{generation}: not a JSON object")
    return Checkpoint(path, config, raw, defaults, manifest)
