"""The way back: a converted checkpoint as a Hugging Face folder.

Quantised weights are written as the numbers that they stand for.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hybrimoe_jax.checkpoint.hugging_face import expert_names
from hybrimoe_jax.checkpoint.reader import Checkpoint, open_checkpoint
from hybrimoe_jax.checkpoint.safetensors import Outgoing, write_folder
from hybrimoe_jax.checkpoint.shards import DTYPES, FORMATS
from hybrimoe_jax.checkpoint.writer import Progress, check_absent, copy_text_files, silent, workplace
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.packing import PackedMatrix, dequantise, plain_expert
from hybrimoe_jax.formats.plain import ExpertWeights


def export_hf(
    src: str | os.PathLike, dst: str | os.PathLike, progress: Progress = silent, fmt: str | None = None
) -> Path:
    """Writes a converted checkpoint back as a Hugging Face folder that transformers loads.

    It holds safetensors, the config and the tokenizer.

    Values are exactly those of the checkpoint. Quantised experts are written as the numbers that they stand for,
    in float32, or rounded to bfloat16 with `fmt` "bf16"; plain checkpoints take no `fmt`. Raises UserError where
    `src` is not a checkpoint or `dst` exists.
    """
    check_absent(Path(dst))
    checkpoint, dst = open_checkpoint(Path(src)), Path(os.path.realpath(dst))
    if fmt is not None and (checkpoint.format in FORMATS or fmt not in FORMATS):
        raise UserError(
            f"--format {fmt} does not go with --export-hf: {src} holds {checkpoint.format}, and values are "
            "exported as they are stored "
            "(quantised experts as f32, or with --format bf16 rounded to that)"
        )
    plain = checkpoint.format if checkpoint.format in FORMATS else fmt or "f32"
    with workplace(dst, None) as work:
        tensors = list(outgoing(checkpoint, FORMATS[plain]))
        write_folder(work / "out", progress(tensors, len(tensors), "exporting"))
        os.rmdir(work / "out" / "pieces")
        raw = dict(checkpoint.raw_config)
        raw.pop("torch_dtype", None)
        raw["dtype"] = "bfloat16" if plain == "bf16" else "float32"
        (work / "out" / "config.json").write_text(json.dumps(raw, indent=2), encoding="utf-8")
        copy_text_files(checkpoint.path, work / "out")
        os.rename(work / "out", dst)
    return dst


def outgoing(checkpoint: Checkpoint, expert_dtype: np.dtype) -> Iterator[Outgoing]:
    """Every tensor of a checkpoint under its Hugging Face name, read when it is written."""
    config, moe_layer = checkpoint.config, 0
    hidden, width = config.moe_width, config.hidden_size
    store = checkpoint.experts(keep=False)

    @functools.lru_cache(maxsize=1)  # an expert's three tensors follow each other
    def read(moe_layer: int, expert: int) -> ExpertWeights:
        return plain_expert(store.get(moe_layer, expert))

    for shard in checkpoint.manifest["pieces"]:
        for name, entry in shard["dense"].items():

            def tensor_blocks(name=name):
                tensor = checkpoint.dense([name])[name]
                return [dequantise(tensor).astype(expert_dtype) if isinstance(tensor, PackedMatrix) else tensor]

            packed = "format" in entry
            shape, dtype = (entry["matrix"], expert_dtype) if packed else (entry["shape"], DTYPES[entry["dtype"]])
            yield Outgoing(name, tuple(shape), dtype, tensor_blocks)
        if shard["experts"] is None:
            continue
        for expert in range(config.num_experts):
            for part, name in enumerate(expert_names(config, shard["layer"], expert)):

                def matrix_blocks(moe_layer=moe_layer, expert=expert, part=part):
                    weights = read(moe_layer, expert)
                    matrix = (weights.gate_up[:hidden], weights.gate_up[hidden:], weights.down)[part]
                    return [matrix.astype(expert_dtype, copy=False)]

                shape = (width, hidden) if part == 2 else (hidden, width)
                yield Outgoing(name, shape, expert_dtype, matrix_blocks)
        moe_layer += 1
