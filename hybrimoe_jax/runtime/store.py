"""Opening a converted checkpoint, and the host's copy of its routed experts.

`ExpertStore` is where every expert comes from: host kernels compute from its arrays and transfers read them. Experts are
read on first use (one read each) or all at once; once read they stay. Arrays are C-contiguous, 64-byte aligned and
read-only, since kernels and transfers hold them while others read.

Shapes: E experts, D model width, F expert width; an expert is gate_up [2F, D] (gate rows first) and down [D, F], or the bytes of a
quantised one (`host_kernels.packing`), which are held as they are stored.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.host_kernels.formats import F32, Arena, ExpertWeights, aligned_copy, to_f32
from hybrimoe_jax.host_kernels.packing import (
    ExpertLayout,
    Format,
    HostExpert,
    MatrixLayout,
    PackedExpert,
    PackedMatrix,
    pack_expert,
)
from hybrimoe_jax.models.checkpoint import read_json
from hybrimoe_jax.models.config import ModelConfig
from hybrimoe_jax.models.orbax_io import open_leaf, read_leaves, read_rows
from hybrimoe_jax.models.pieces import EXPERTS, LAYOUT, PLAIN_VERSION, VERSION, ExpertForm, digest
from hybrimoe_jax.models.registry import parse_config

FREQUENCIES = "expert_frequencies.json"


class ExpertStore:
    """The routed experts of one model in host memory, by MoE-layer ordinal (0 .. L-1) and expert (0 .. E-1).

    Args:
      read: gives an expert's matrices [3, F*D] (gate, up, down) or an ExpertWeights; with `layout`, its bytes or a PackedExpert.
      shape: (L, E, F, D).
      dtype: what the arrays handed out hold; the source's own type, or float32; uint8 with `layout`.
      keep: False hands out a fresh read each time (for a walk over a model larger than memory).
      layout: of quantised experts; None for plain ones.
    """

    def __init__(
        self,
        read: Callable[[int, int], np.ndarray | HostExpert],
        shape: tuple[int, int, int, int],
        dtype: np.dtype,
        keep: bool = True,
        layout: ExpertLayout | None = None,
    ):
        self.num_layers, self.num_experts, self.hidden, self.width = shape
        self.dtype, self._read, self._keep, self.layout = np.dtype(dtype), read, keep, layout
        self._cells: list[list[HostExpert | None]] = [[None] * self.num_experts for _ in range(self.num_layers)]
        self._locks = [threading.Lock() for _ in range(16)]
        self._arena = Arena() if keep else None

    @classmethod
    def from_arrays(
        cls, layers: Sequence[tuple[np.ndarray, np.ndarray]], dtype=None, format: str | None = None
    ) -> ExpertStore:
        """A store over arrays in memory: per MoE layer gate_up [E, 2F, D] and down [E, D, F]; copied, or rounded to a quantised `format`, on
        first use."""
        layers = [(np.asarray(g), np.asarray(d)) for g, d in layers]
        if not layers:
            raise UserError("ExpertStore: no MoE layers were given")
        count, width, hidden = layers[0][1].shape
        stored = layers[0][1].dtype
        for i, (gate_up, down) in enumerate(layers):
            fits = gate_up.shape == (count, 2 * hidden, width) and down.shape == (count, width, hidden)
            if not fits or gate_up.dtype != stored or down.dtype != stored:
                raise UserError(
                    f"ExpertStore: layer {i} has gate_up {gate_up.shape} {gate_up.dtype} and down {down.shape} {down.dtype}; "
                    f"{(count, 2 * hidden, width)} and {(count, width, hidden)} of {stored} are needed"
                )

        def read(ordinal: int, expert: int) -> ExpertWeights:
            gate_up, down = layers[ordinal]
            return ExpertWeights(gate_up[expert], down[expert])

        shape = (len(layers), count, hidden, width)
        if format is None:
            return cls(read, shape, held_dtype(stored, dtype))
        layout = ExpertLayout(Format.parse(format), width, hidden)

        def rounded(ordinal: int, expert: int) -> PackedExpert:
            gate_up, down = map(to_f32, read(ordinal, expert))
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

    def get(self, ordinal: int, expert: int) -> HostExpert:
        """One expert's weights, read now if they were not; safe from any thread, read once.

        Raises UserError where the checkpoint's files are damaged, IndexError for an ordinal or expert that does not exist.
        """
        if not (0 <= ordinal < self.num_layers and 0 <= expert < self.num_experts):
            raise IndexError(
                f"expert {expert} of MoE layer {ordinal}: the model has {self.num_layers} x {self.num_experts}"
            )
        cell = self._cells[ordinal][expert]
        if cell is not None:
            return cell
        if not self._keep:
            return self._load(ordinal, expert)
        with self._locks[(ordinal * self.num_experts + expert) % len(self._locks)]:
            if self._cells[ordinal][expert] is None:
                self._cells[ordinal][expert] = self._load(ordinal, expert)
            return self._cells[ordinal][expert]

    def _load(self, ordinal: int, expert: int) -> HostExpert:
        source = self._read(ordinal, expert)
        if self.layout is not None:
            data = aligned_copy(source.data if isinstance(source, PackedExpert) else source, arena=self._arena)
            data.flags.writeable = False
            return PackedExpert(data, self.layout)
        if not isinstance(source, ExpertWeights):
            gate_up = source[:2].reshape(2 * self.hidden, self.width)
            source = ExpertWeights(gate_up, source[2].reshape(self.width, self.hidden))
        weights = ExpertWeights(*(aligned_copy(matrix, self.dtype, self._arena) for matrix in source))
        for matrix in weights:
            matrix.flags.writeable = False
        return weights

    def load_all(self, progress: Callable[[Iterable, int, str], Iterable] | None = None) -> None:
        """Reads every expert that was not read yet; `progress(items, total, label)` may wrap the walk."""
        every = [(i, e) for i in range(self.num_layers) for e in range(self.num_experts)]
        for ordinal, expert in every if progress is None else progress(every, len(every), "loading experts"):
            self.get(ordinal, expert)


def held_dtype(stored: np.dtype, wanted) -> np.dtype:
    """The type to hand out: the stored one, or float32 (exact); raises UserError for a conversion that would round."""
    wanted = np.dtype(stored if wanted is None else wanted)
    if wanted not in (stored, np.dtype(np.float32)):
        raise UserError(
            f"experts are stored as {np.dtype(stored)}; {wanted} would round them (convert with --format bf16)"
        )
    return wanted


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
    def pieces(self) -> dict[str, dict[str, Any]]:
        """The manifest's records by piece name."""
        return {piece["name"]: piece for piece in self.manifest["pieces"]}

    def frequencies(self) -> list[list[float]] | None:
        """Activation counts [MoE layer][expert] from other text (`expert_frequencies.json`), for static placements; None
        where the checkpoint has none. Raises UserError where the file does not fit the model."""
        path = self.path / FREQUENCIES
        if not path.is_file():
            return None
        saved = read_json(path)
        counts = saved.get("counts") if isinstance(saved, dict) else None
        shape = (len(self.config.moe_layers), self.config.num_experts)
        try:
            table = np.asarray(counts, np.float64)
        except (TypeError, ValueError):
            table = np.zeros(0)
        if table.shape != shape or not np.isfinite(table).all() or (table < 0).any():
            raise UserError(
                f"{path}: `counts` must be {shape[0]} lists of {shape[1]} counts; delete the file or make it again"
            )
        return table.tolist()

    def tokenizer(self):
        """The checkpoint's `text.Tokenizer`, or None where it came without one."""
        from hybrimoe_jax.text import Tokenizer

        known = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
        return Tokenizer(self.path) if any((self.path / name).is_file() for name in known) else None

    @property
    def dense_format(self) -> str | None:
        """The format of quantised dense projections; None where all dense tensors are plain."""
        return self.manifest.get("dense_format")

    def dense(self, names: Iterable[str] | None = None, verify: bool = False) -> dict[str, np.ndarray | PackedMatrix]:
        """Every tensor outside the routed experts (or just `names`) by checkpoint name, as stored.

        Raises UserError where a file is damaged and, with `verify`, where a tensor's hash differs from the manifest's.
        """
        wanted = None if names is None else set(names)
        out = {}
        for name, piece in self.pieces.items():
            chosen = [n for n in piece["dense"] if wanted is None or n in wanted]
            out |= read_leaves(self.path / "pieces" / name, chosen)
            for tensor in chosen if verify else ():
                if digest(out[tensor]) != piece["dense"][tensor]["hash"]:
                    raise UserError(
                        f"{self.path}: tensor {tensor} is corrupted (its hash differs); convert the original again"
                    )
            for tensor in chosen:
                if "format" in piece["dense"][tensor]:
                    out[tensor] = self._packed(tensor, piece["dense"][tensor], out[tensor])
        return out

    def _packed(self, name: str, record: dict[str, Any], data: np.ndarray) -> PackedMatrix:
        layout = MatrixLayout(Format.parse(record["format"]), *record["matrix"])
        if data.shape != (layout.nbytes,):
            raise UserError(
                f"{self.path}: tensor {name} has {data.size} bytes where {record['format']} needs {layout.nbytes}; convert the original again"
            )
        return PackedMatrix(data, layout)

    def experts(self, dtype=None, lazy: bool = True, verify: bool = False, keep: bool = True) -> ExpertStore:
        """The routed experts.

        Args:
          dtype: float32 widens bfloat16 exactly; None keeps the stored type. Quantised experts stay as they are.
          lazy: read each expert on first use; False reads all now.
          verify: hash each expert when it is read; a difference raises UserError naming layer and expert.
        """
        records = [piece for piece in self.manifest["pieces"] if piece["experts"]]
        if not records:
            raise UserError(f"{self.path}: the model has no mixture-of-experts layer")
        form = ExpertForm.of(self.format, self.config.hidden_size, self.config.moe_width)
        held = form.dtype if form.layout else held_dtype(form.dtype, dtype)
        opened: list[Any] = [None] * len(records)
        opening = threading.Lock()

        def read(ordinal: int, expert: int) -> np.ndarray:
            record = records[ordinal]
            folder = self.path / "pieces" / record["name"]
            with opening:
                if opened[ordinal] is None:
                    opened[ordinal] = open_leaf(folder, EXPERTS)
            packed = read_rows(opened[ordinal], expert, folder, EXPERTS)
            if verify and digest(packed) != record["experts"]["hashes"][expert]:
                raise UserError(
                    f"{self.path}: expert {expert} of layer {record['layer']} is corrupted (its hash differs from the "
                    "manifest's); convert the original again"
                )
            return packed

        shape = (len(records), self.config.num_experts, self.config.moe_width, self.config.hidden_size)
        store = ExpertStore(read, shape, held, keep, form.layout)
        if not lazy:
            store.load_all()
        return store


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a folder made by `python -m hybrimoe_jax.convert`; raises UserError for a wrong, incomplete or foreign one."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: {'not a folder' if path.exists() else 'no such folder'}; give a converted checkpoint")
    if not (path / "manifest.json").is_file():
        if any(path.glob("*.safetensors")) or (path / "config.json").is_file():
            raise UserError(f"{path}: not converted yet; run: python -m hybrimoe_jax.convert {path} DST")
        raise UserError(f"{path}: no manifest.json; give a folder made by python -m hybrimoe_jax.convert")
    manifest = read_json(path / "manifest.json")
    if not isinstance(manifest, dict) or manifest.get("layout") != LAYOUT:
        raise UserError(f"{path / 'manifest.json'}: not the manifest of a checkpoint made by hybrimoe_jax.convert")
    if manifest.get("version") not in (PLAIN_VERSION, VERSION):
        raise UserError(
            f"{path}: checkpoint layout version {manifest.get('version')}, this program reads {PLAIN_VERSION} and {VERSION}; convert the original again"
        )
    raw = read_json(path / "config.json")
    if digest(json.dumps(raw, indent=2, sort_keys=True).encode()) != manifest.get("config"):
        raise UserError(
            f"{path / 'config.json'}: changed since the conversion; restore it or convert the original again"
        )
    config = parse_config(raw)
    check_pieces(path, config, manifest)
    generation = path / "generation_config.json"
    defaults = read_json(generation) if generation.is_file() else {}
    if not isinstance(defaults, dict):
        raise UserError(f"{generation}: not a JSON object")
    return Checkpoint(path, config, raw, defaults, manifest)


def check_pieces(path: Path, config: ModelConfig, manifest: dict[str, Any]) -> None:
    """Raises UserError where the manifest does not describe this configuration's model or a piece's folder is missing."""
    try:
        pieces = manifest["pieces"]
        layers = tuple(piece["layer"] for piece in pieces if piece["experts"])
        stacks = {(*piece["experts"]["shape"], len(piece["experts"]["hashes"])) for piece in pieces if piece["experts"]}
        names = [piece["name"] for piece in pieces]
    except (KeyError, TypeError):
        raise UserError(f"{path / 'manifest.json'}: damaged; convert the original again") from None
    form = ExpertForm.of(str(manifest.get("format")), config.hidden_size, config.moe_width)
    expected = (config.num_experts, *form.row, config.num_experts)
    if layers != config.moe_layers or stacks - {expected}:
        raise UserError(
            f"{path / 'manifest.json'}: does not describe the model of config.json; convert the original again"
        )
    absent = [name for name in names if not (path / "pieces" / name / "state").is_dir()]
    if absent:
        raise UserError(f"{path}: incomplete, {', '.join(absent)} missing under pieces; convert the original again")
