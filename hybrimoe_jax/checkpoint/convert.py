"""A folder, a GGUF file, random weights or a model in memory becomes a converted checkpoint.

Such a checkpoint is read expert by expert.

What was killed goes on where it stopped when it is given again, and the checkpoint is complete or absent (`writer`).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hybrimoe_jax import arguments
from hybrimoe_jax.checkpoint.hugging_face import from_arrays, open_hf
from hybrimoe_jax.checkpoint.quantised.experts import as_packed
from hybrimoe_jax.checkpoint.random import random_weights
from hybrimoe_jax.checkpoint.shards import FORMATS
from hybrimoe_jax.checkpoint.weights import PackedExperts, Weights
from hybrimoe_jax.checkpoint.writer import (
    Progress,
    check_absent,
    check_formats,
    silent,
    write_checkpoint,
)
from hybrimoe_jax.encoding import read_text
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.packing import Format


def convert(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    fmt: str | None = None,
    progress: Progress = silent,
    calibrate: str | os.PathLike | None = None,
    dense_format: str | None = None,
    zipped: bool = False,
) -> Path:
    """Converts the Hugging Face folder or GGUF file `src` to a new checkpoint folder `dst`.

    Args:
      fmt: "f32" or "bf16" for every tensor, or a quantised format (`formats.layout.Format`) for the routed experts.
        None keeps each tensor's own type (float16 widens to float32).
      progress: wraps the shards as `progress(shards, total, label)`.
      calibrate: a text file; experts are rounded to `fmt` by what they do on it (`checkpoint.calibrate`).
      dense_format: a quantised format for the dense projections; None leaves them plain.
      zipped: all arrays in one file, `pieces.zip`, where they are read in place.

    Experts that `src` has quantised already are taken over without rounding, or refused where no format holds them.

    Returns the checkpoint's path. Raises UserError for anything wrong with `src` (see `open_hf`), a `dst` that exists,
    another conversion at work on it, or a disk too full.
    """
    check_formats(fmt, dense_format)
    source, dst = Path(arguments.path("src", src)), arguments.path("dst", dst)
    text = None if calibrate is None else Path(arguments.path("calibrate", calibrate))
    check_absent(Path(dst))
    weights = as_packed(open_source(source), fmt)
    if text is not None:
        weights = calibrate_by(weights, fmt, text)
    return write_checkpoint(weights, dst, fmt=fmt, progress=progress, dense_format=dense_format, zipped=zipped)


def open_source(src: Path) -> Weights:
    """A Hugging Face folder, or a GGUF file."""
    if src.suffix != ".gguf" or src.is_dir():
        return open_hf(src)
    if not src.is_file():
        raise UserError(f"{src}: no such file")
    from hybrimoe_jax.checkpoint.gguf.file import open_gguf

    return open_gguf(src)


def calibrate_by(weights: Weights, fmt: str | None, text: Path) -> Weights:
    """Experts rounded by a text file, read with the model's own tokenizer; UserError for what it cannot work with."""
    from hybrimoe_jax.checkpoint.calibrate import calibrated, windows  # jax takes a second to import
    from hybrimoe_jax.text import Tokenizer

    if fmt is None or fmt in FORMATS:
        raise UserError(f"--calibrate goes with a quantised --format such as int4-g64, not with {fmt or 'none'}")
    if any(isinstance(shard.experts, PackedExperts) for shard in weights.shards):
        raise UserError(f"{weights.folder}: its experts are quantised already; leave out --calibrate")
    if weights.folder is None or not weights.folder.is_dir():
        raise UserError(f"{weights.folder}: --calibrate needs the tokenizer.json of a Hugging Face folder")
    ids = Tokenizer(weights.folder).encode(read_text(text, f"--calibrate {text}"))
    return calibrated(weights, Format.parse(fmt), windows(ids, weights.config.max_position_embeddings))


def convert_random(
    config: str | os.PathLike,
    dst: str | os.PathLike,
    fmt: str | None = None,
    seed: int = 0,
    progress: Progress = silent,
    dense_format: str | None = None,
    zipped: bool = False,
) -> Path:
    """Writes a checkpoint of random weights, at its real size, for the model that `config` describes.

    `config` is a `config.json` or its folder.

    Other arguments, result and errors as of `convert`; the same seed gives the same weights.
    """
    check_formats(fmt, dense_format)
    described, dst = Path(arguments.path("config", config)), arguments.path("dst", dst)
    check_absent(Path(dst))
    weights = random_weights(described, fmt, arguments.whole("seed", seed, 0))
    return write_checkpoint(weights, dst, fmt=fmt, progress=progress, dense_format=dense_format, zipped=zipped)


def save(
    dst: str | os.PathLike,
    raw_config: Mapping[str, Any],
    dense: Mapping[str, np.ndarray],
    experts: Iterable[tuple[np.ndarray, np.ndarray]],
    text_folder: str | os.PathLike | None = None,
    fmt: str | None = None,
    dense_format: str | None = None,
) -> Path:
    """Writes a model held in memory as a checkpoint; arguments as for `from_arrays`.

    `text_folder` is where tokenizer, chat template and generation_config.json are copied from, where they exist.
    """
    check_formats(fmt, dense_format)
    dst = arguments.path("dst", dst)
    check_absent(Path(dst))
    weights = from_arrays(raw_config, dense, experts)
    return write_checkpoint(weights, dst, fmt=fmt, text_folder=text_folder, dense_format=dense_format)


def return_freed_memory() -> None:
    """Has glibc keep one arena, and map blocks of a megabyte and more one by one, so that what is freed goes back.

    Otherwise each of tensorstore's threads keeps an arena with the largest it ever held: measured on a
    model with layers of 40 MB in blocks of 5 MB, up to 64 MB above the base, against 25 MB. Slower for
    programs that allocate often; this one does not.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # malloc.h
        mallopt(M_MMAP_THRESHOLD, 1 << 20)
        mallopt(M_ARENA_MAX, 1)
