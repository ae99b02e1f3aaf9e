"""`python -m hybrimoe_jax.convert SRC DST`: a Hugging Face folder becomes a checkpoint that this project reads expert by expert.

The work is done in `DST.partial` and renamed at the end, so `DST` is complete or absent. Each piece (see
`models/weights.py`) leaves a record with its hashes when it is written; a conversion that was killed starts again after
the last piece whose stored bytes still match their record. Memory stays a few row blocks above the process's base.
With `--format int4-g64` and the like the routed experts are rounded to that format (`host_kernels.packing`) and dense tensors keep
their type; `--dense-format` rounds the dense projections too (`models.dense_packing`). `--calibrate TEXT` rounds experts by what they do on a
text (`models.calibrated`). Experts that SRC has quantised already (`models.quantised`) are taken over as they are. With `--random` SRC is only a
configuration, and the weights are made up (`models.random_weights`).
With `--export-hf` the direction is reversed: a converted checkpoint becomes a Hugging Face folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hybrimoe_jax import cli
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.host_kernels.formats import ExpertWeights
from hybrimoe_jax.host_kernels.packing import Format, PackedExpert, PackedMatrix, dequantise, dequantise_expert
from hybrimoe_jax.models.checkpoint import TEXT_FILES, expert_names, from_arrays, open_hf
from hybrimoe_jax.models.pieces import (
    DTYPES,
    FORMATS,
    LAYOUT,
    PLAIN_VERSION,
    VERSION,
    ExpertForm,
    dense_leaf,
    digest,
    piece_is_whole,
    write_piece,
)
from hybrimoe_jax.models.quantised.experts import as_packed
from hybrimoe_jax.models.random_weights import random_weights
from hybrimoe_jax.models.safetensors_file import Outgoing, write_folder
from hybrimoe_jax.models.weights import PackedExperts, Weights
from hybrimoe_jax.runtime.store import Checkpoint, open_checkpoint

Progress = Callable[[Iterable, int, str], Iterable]


def silent(items: Iterable, total: int, label: str) -> Iterable:
    return items


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
      fmt: "f32" or "bf16" for every tensor, or a quantised format (`packing.Format`) for the routed experts; None keeps each
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
    from hybrimoe_jax.models.quantised.gguf_file import open_gguf

    return open_gguf(src)


def calibrate_by(weights: Weights, fmt: str | None, text: Path) -> Weights:
    """`models.calibrated` with a text file through the model's own tokenizer; UserError for what it cannot work with."""
    from hybrimoe_jax.models.calibrated import calibrated, windows  # jax takes a second to import
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


def write_checkpoint(
    weights: Weights,
    dst: str | os.PathLike,
    *,
    fmt: str | None = None,
    progress: Progress = silent,
    text_folder: str | os.PathLike | None = None,
    dense_format: str | None = None,
) -> Path:
    """Writes `models.checkpoint.Weights` to the folder `dst`, resuming in `dst.partial` where the same work was begun."""
    dst, config = Path(os.path.abspath(dst)), weights.config
    config_text = json.dumps(weights.raw_config, indent=2, sort_keys=True)
    form = ExpertForm.of(fmt or weights.expert_format, config.hidden_size, config.moe_width)
    dense_fmt = fmt if fmt in FORMATS else None
    projections = Format.parse(dense_format) if dense_format else None
    check_source_format(weights, form)
    plan = {
        "version": VERSION,
        "format": fmt,
        "dense_format": dense_format,
        "config": digest(config_text.encode()),
        "files": weights.files,
        "seed": weights.seed,
        "calibration": weights.calibration,
    }
    check_space(dst, weights, dense_fmt, form, projections)
    with workplace(dst, plan if weights.files or weights.seed is not None else None) as work:
        out, done = work / "out", work / "done"
        records = {}
        for path in done.glob("*.json"):
            with contextlib.suppress(OSError, json.JSONDecodeError):
                records[path.stem] = json.loads(path.read_text())
        for piece in progress(weights.pieces, len(weights.pieces), "converting"):
            folder, record = out / "pieces" / piece.name, records.get(piece.name)
            if record is None or not piece_is_whole(folder, record):
                records[piece.name] = write_piece(folder, piece, dense_fmt, form, projections)
                write_text(done / f"{piece.name}.json", json.dumps(records[piece.name]))
        for stray in (out / "pieces").iterdir():
            if stray.name not in records:  # what a killed writer left
                shutil.rmtree(stray)
        write_text(out / "config.json", config_text)
        origin = Path(text_folder) if text_folder is not None else weights.folder
        for name in TEXT_FILES if origin is not None else ():
            if (origin / name).is_file():
                shutil.copyfile(origin / name, out / name)
        manifest = {
            "layout": LAYOUT,
            "version": VERSION if form.layout or projections else PLAIN_VERSION,
            "format": form.format,
            **({"dense_format": dense_format} if projections else {}),
            "source": {
                "folder": weights.folder.resolve().name if weights.folder else None,
                "files": weights.files,
                **({} if weights.seed is None else {"random_seed": weights.seed}),
                **({} if weights.calibration is None else {"calibration": weights.calibration}),
            },
            "config": plan["config"],
            "model_type": config.model_type,
            "pieces": [records[piece.name] for piece in weights.pieces],
        }
        write_text(out / "manifest.json", json.dumps(manifest, indent=1))
        os.rename(out, dst)
    return dst


@contextlib.contextmanager
def workplace(dst: Path, plan: Mapping[str, Any] | None):
    """The folder `dst.partial`, locked; what is there is kept where it was begun with the same `plan`, else replaced.

    Removed when the body succeeds, kept when it fails. Raises UserError where another process holds it or it is not ours.
    """
    work = dst.with_name(dst.name + ".partial")
    if work.exists() and not (work / "lock").is_file() and (not work.is_dir() or any(work.iterdir())):
        raise UserError(f"{work}: in the way of the conversion and not made by one; remove it")
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{dst}: another conversion is writing it; wait for it or stop it") from None
        try:
            begun = json.loads((work / "plan.json").read_text())
        except (OSError, json.JSONDecodeError):
            begun = None
        if plan is None or begun != plan:
            for name in ("out", "done"):
                shutil.rmtree(work / name, ignore_errors=True)
            write_text(work / "plan.json", json.dumps(plan))
        (work / "out" / "pieces").mkdir(parents=True, exist_ok=True)
        (work / "done").mkdir(exist_ok=True)
        yield work
        shutil.rmtree(work)


def write_text(path: Path, text: str) -> None:
    """Writes beside and renames, so that a reader sees the old file or the whole new one."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def check_format(fmt: str | None) -> None:
    """Raises UserError for what is neither a plain format nor a quantised one."""
    if fmt is not None and fmt not in FORMATS:
        Format.parse(fmt)


def check_dense_format(dense_format: str | None) -> None:
    """Raises UserError for what is no quantised format (plain dense tensors follow `--format`)."""
    if dense_format is not None:
        Format.parse(dense_format)


def check_source_format(weights: Weights, form: ExpertForm) -> None:
    """Raises UserError where experts that are quantised already would be rounded a second time."""
    quantised = any(isinstance(piece.experts, PackedExperts) for piece in weights.pieces)
    if quantised and form.layout and form.format != weights.expert_format:
        raise UserError(
            f"{weights.folder or 'the model'}: its experts are {weights.expert_format}; rounding them again to {form.format} would lose "
            f"accuracy twice (give --format {weights.expert_format}, f32 or bf16)"
        )


def check_absent(dst: Path) -> None:
    if dst.is_dir() and not any(dst.iterdir()):
        return
    if dst.exists() or dst.is_symlink():
        raise UserError(f"{dst}: already exists; remove it or give another destination")


def check_space(
    dst: Path, weights: Weights, dense_fmt: str | None, form: ExpertForm, projections: Format | None
) -> None:
    """Raises UserError where the disk has less room than the checkpoint needs beyond what is already written."""
    dst.parent.mkdir(parents=True, exist_ok=True)
    config = weights.config
    need = len(config.moe_layers) * config.num_experts * form.nbytes
    for piece in weights.pieces:
        leaves = (dense_leaf(name, tensor, dense_fmt, projections) for name, tensor in piece.dense.items())
        need += sum(int(np.prod(leaf.leaf().shape)) * leaf.dtype.itemsize for leaf in leaves)
    written = sum(p.stat().st_size for p in dst.with_name(dst.name + ".partial").rglob("*") if p.is_file())
    free = shutil.disk_usage(dst.parent).free
    if need - written > free:
        raise UserError(
            f"{dst}: needs {need / 1e9:.1f} GB but the disk has {(free + written) / 1e9:.1f} GB; free some room"
        )


def export_hf(
    src: str | os.PathLike, dst: str | os.PathLike, progress: Progress = silent, fmt: str | None = None
) -> Path:
    """Writes a converted checkpoint back as a Hugging Face folder (safetensors, config, tokenizer) that transformers loads.

    Values are exactly those of the checkpoint. Quantised experts are written as the numbers that they stand for, in float32, or rounded to
    bfloat16 with `fmt` "bf16"; plain checkpoints take no `fmt`. Raises UserError where `src` is not a checkpoint or `dst` exists.
    """
    checkpoint, dst = open_checkpoint(src), Path(os.path.abspath(dst))
    check_absent(dst)
    if fmt is not None and (checkpoint.format in FORMATS or fmt not in FORMATS):
        raise UserError(
            f"--format {fmt} does not go with --export-hf: {src} holds {checkpoint.format}, and values are exported as they are stored "
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
        write_text(work / "out" / "config.json", json.dumps(raw, indent=2))
        for name in TEXT_FILES:
            if (checkpoint.path / name).is_file():
                shutil.copyfile(checkpoint.path / name, work / "out" / name)
        os.rename(work / "out", dst)
    return dst


def outgoing(checkpoint: Checkpoint, expert_dtype: np.dtype) -> Iterator[Outgoing]:
    """Every tensor of a checkpoint under its Hugging Face name, read when it is written."""
    config, ordinal = checkpoint.config, 0
    hidden, width = config.moe_width, config.hidden_size
    store = checkpoint.experts(keep=False)

    @functools.lru_cache(maxsize=1)  # an expert's three tensors follow each other
    def read(ordinal: int, expert: int) -> ExpertWeights:
        weights = store.get(ordinal, expert)
        return dequantise_expert(weights) if isinstance(weights, PackedExpert) else weights

    for piece in checkpoint.manifest["pieces"]:
        for name, entry in piece["dense"].items():

            def blocks(name=name):
                tensor = checkpoint.dense([name])[name]
                return [dequantise(tensor).astype(expert_dtype) if isinstance(tensor, PackedMatrix) else tensor]

            packed = "format" in entry
            shape, dtype = (entry["matrix"], expert_dtype) if packed else (entry["shape"], DTYPES[entry["dtype"]])
            yield Outgoing(name, tuple(shape), dtype, blocks)
        if piece["experts"] is None:
            continue
        for expert in range(config.num_experts):
            for part, name in enumerate(expert_names(config, piece["layer"], expert)):

                def blocks(ordinal=ordinal, expert=expert, part=part):
                    weights = read(ordinal, expert)
                    matrix = (weights.gate_up[:hidden], weights.gate_up[hidden:], weights.down)[part]
                    return [matrix.astype(expert_dtype, copy=False)]

                shape = (width, hidden) if part == 2 else (hidden, width)
                yield Outgoing(name, shape, expert_dtype, blocks)
        ordinal += 1


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
        return 130
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
