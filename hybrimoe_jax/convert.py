"""`python -m hybrimoe_jax.convert SRC DST`: a Hugging Face folder becomes a checkpoint that this project reads expert by expert.

What was killed goes on where it stopped when it is given again, and `DST` is complete or absent (`models.checkpoint_writer`).
With `--format int4-g64` and the like the routed experts are rounded to that format (`host_kernels.layout`) and dense tensors keep
their type; `--dense-format` rounds the dense projections too (`models.dense_packing`). `--calibrate TEXT` rounds experts by what they do on a
text (`models.calibrated`). Experts that SRC has quantised already (`models.quantised`) are taken over as they are. With `--random` SRC is only a
configuration, and the weights are made up (`models.random_weights`).
With `--export-hf` the direction is reversed: a converted checkpoint becomes a Hugging Face folder (`exporting`).
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hybrimoe_jax import cli
from hybrimoe_jax.checkpoint.export import export_hf
from hybrimoe_jax.checkpoint.hugging_face import from_arrays, open_hf
from hybrimoe_jax.checkpoint.quantised.experts import as_packed
from hybrimoe_jax.checkpoint.random import random_weights
from hybrimoe_jax.checkpoint.shards import FORMATS
from hybrimoe_jax.checkpoint.weights import PackedExperts, Weights
from hybrimoe_jax.checkpoint.writer import (
    Progress,
    check_absent,
    check_dense_format,
    check_format,
    silent,
    write_checkpoint,
)
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.packing import Format


def convert(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    fmt: str | None = None,
    progress: Progress = silent,
    calibrate: str | os.PathLike | None = None,
    dense_format: str | None = None,
) -> Path:
    """Converts the Hugging Face folder or GGUF file `src` to a new checkpoint folder `dst`.

    Args:
      fmt: "f32" or "bf16" for every tensor, or a quantised format (`layout.Format`) for the routed experts; None keeps each
        tensor's own type (float16 widens to float32).
      progress: wraps the pieces as `progress(pieces, total, label)`.
      calibrate: a text file; experts are rounded to `fmt` by what they do on it (`models.calibrated`).
      dense_format: a quantised format for the dense projections; None leaves them plain.

    Experts that `src` has quantised already are taken over without rounding, or refused where no format holds them.

    Returns the checkpoint's path. Raises UserError for anything wrong with `src` (see `models.checkpoint.open_hf`), a `dst` that
    exists, another conversion at work on it, or a disk too full.
    """
    check_format(fmt)
    check_dense_format(dense_format)
    check_absent(Path(dst))
    weights = as_packed(open_source(Path(src)), fmt)
    if calibrate is not None:
        weights = calibrate_by(weights, fmt, Path(calibrate))
    return write_checkpoint(weights, dst, fmt=fmt, progress=progress, dense_format=dense_format)


def open_source(src: Path) -> Weights:
    """A Hugging Face folder, or a GGUF file."""
    if src.suffix != ".gguf" or src.is_dir():
        return open_hf(src)
    if not src.is_file():
        raise UserError(f"{src}: no such file")
    from hybrimoe_jax.checkpoint.gguf.file import open_gguf

    return open_gguf(src)


def calibrate_by(weights: Weights, fmt: str | None, text: Path) -> Weights:
    """`models.calibrated` with a text file through the model's own tokenizer; UserError for what it cannot work with."""
    from hybrimoe_jax.checkpoint.calibrate import calibrated, windows  # jax takes a second to import
    from hybrimoe_jax.text import Tokenizer

    if fmt is None or fmt in FORMATS:
        raise UserError(f"--calibrate goes with a quantised --format such as int4-g64, not with {fmt or 'none'}")
    if any(isinstance(piece.experts, PackedExperts) for piece in weights.pieces):
        raise UserError(f"{weights.folder}: its experts are quantised already; leave out --calibrate")
    if weights.folder is None or not weights.folder.is_dir():
        raise UserError(f"{weights.folder}: --calibrate needs the tokenizer.json of a Hugging Face folder")
    if not text.is_file():
        raise UserError(f"{text}: no such file; --calibrate takes a text file")
    ids = Tokenizer(weights.folder).encode(text.read_text(encoding="utf-8", errors="replace"))
    return calibrated(weights, Format.parse(fmt), windows(ids, weights.config.max_position_embeddings))


def convert_random(
    config: str | os.PathLike,
    dst: str | os.PathLike,
    fmt: str | None = None,
    seed: int = 0,
    progress: Progress = silent,
    dense_format: str | None = None,
) -> Path:
    """Writes a checkpoint of random weights for the model that `config` (a `config.json`, or its folder) describes, at its real size.

    Other arguments, result and errors as of `convert`; the same seed gives the same weights.
    """
    check_format(fmt)
    check_dense_format(dense_format)
    check_absent(Path(dst))
    weights = random_weights(config, fmt, seed)
    return write_checkpoint(weights, dst, fmt=fmt, progress=progress, dense_format=dense_format)


def save(
    dst: str | os.PathLike,
    raw_config: Mapping[str, Any],
    dense: Mapping[str, np.ndarray],
    experts: Iterable[tuple[np.ndarray, np.ndarray]],
    text_folder: str | os.PathLike | None = None,
    fmt: str | None = None,
    dense_format: str | None = None,
) -> Path:
    """Writes a model held in memory as a checkpoint; arguments as for `models.checkpoint.from_arrays`.

    `text_folder` is where tokenizer, chat template and generation_config.json are copied from, where they exist.
    """
    check_format(fmt)
    check_dense_format(dense_format)
    check_absent(Path(dst))
    weights = from_arrays(raw_config, dense, experts)
    return write_checkpoint(weights, dst, fmt=fmt, text_folder=text_folder, dense_format=dense_format)


def return_freed_memory() -> None:
    """Has glibc keep one arena, and map blocks of a megabyte and more one by one, so that what is freed goes back.

    Otherwise each of tensorstore's threads keeps an arena with the largest it ever held: measured on a model with layers
    of 40 MB in blocks of 5 MB, up to 64 MB above the base, against 25 MB. Slower for programs that allocate often; this one
    does not.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # malloc.h
        mallopt(M_MMAP_THRESHOLD, 1 << 20)
        mallopt(M_ARENA_MAX, 1)


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser(prog="python -m hybrimoe_jax.convert", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "src",
        metavar="SRC",
        help="Hugging Face folder or GGUF file (with --export-hf: a converted checkpoint; with --random: a config.json or its folder)",
    )
    parser.add_argument("dst", metavar="DST", help="folder to make; must not exist")
    parser.add_argument(
        "--format",
        metavar="F",
        help="f32 or bf16 for every tensor, or a quantised format for the routed experts: int8-g64, int4-g64, int4z-g128, ... (default: "
        "the checkpoint's own)",
    )
    parser.add_argument(
        "--calibrate",
        metavar="TEXT",
        help="with a quantised --format: round by what the experts do on this text file (slower, smaller errors)",
    )
    parser.add_argument(
        "--dense-format",
        metavar="F",
        help="a quantised format for the dense projections too: attention, shared experts, dense layers, head (default: plain)",
    )
    parser.add_argument(
        "--random", action="store_true", help="write random weights for SRC, a configuration, at the model's real size"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of --random (default 0)")
    parser.add_argument(
        "--export-hf",
        action="store_true",
        help="write SRC, a converted checkpoint, as a Hugging Face folder; quantised experts as float32 (with --format bf16 rounded)",
    )
    args = parser.parse_args(argv)
    if args.export_hf and args.random:
        parser.error("--random does not go with --export-hf")
    if args.seed is not None and (not args.random or args.seed < 0):
        parser.error("--seed is a number of at least 0 and goes with --random")
    if args.calibrate and (args.random or args.export_hf):
        parser.error("--calibrate goes with converting a folder")
    if args.dense_format is not None and args.export_hf:
        parser.error("--dense-format does not go with --export-hf")
    return_freed_memory()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing here computes; leave an accelerator to others
    try:
        if args.export_hf:
            path = export_hf(args.src, args.dst, cli.progress, args.format)
        elif args.random:
            path = convert_random(args.src, args.dst, args.format, args.seed or 0, cli.progress, args.dense_format)
        else:
            path = convert(args.src, args.dst, args.format, cli.progress, args.calibrate, args.dense_format)
    except KeyboardInterrupt:
        print(
            "interrupted; the same command " + ("starts over" if args.export_hf else "goes on from here"),
            file=sys.stderr,
        )
        return cli.INTERRUPTED
    total = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    print(f"{path}: {total / 1e6:.1f} MB")
    if args.src.endswith(".gguf"):
        print(
            f"a GGUF's vocabulary is not read: copy the model's tokenizer.json and tokenizer_config.json into {path}",
            file=sys.stderr,
        )
    return 0


if __name__ == "__main__":
    cli.run(main)
