"""Writing a converted checkpoint: shard by shard, in a folder beside its place, so that it is complete or absent.

The work is done in `DST.partial` and renamed at the end. Each shard (see `weights`) leaves a record with its hashes
when it is written. Work that was killed starts again after the last shard with stored bytes that still match their
record. Memory stays a few row blocks above the process's base.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hybrimoe_jax import arguments
from hybrimoe_jax.checkpoint.hugging_face import TEXT_FILES
from hybrimoe_jax.checkpoint.orbax import check_path, zip_items
from hybrimoe_jax.checkpoint.shards import (
    FORMATS,
    LAYOUT,
    PLAIN_VERSION,
    VERSION,
    ExpertForm,
    dense_leaf,
    digest,
    shard_is_whole,
    write_shard,
)
from hybrimoe_jax.checkpoint.weights import PackedExperts, Weights
from hybrimoe_jax.errors import UserError, shown
from hybrimoe_jax.files import check_folder_to_be, present, replacing
from hybrimoe_jax.formats.layout import PLAIN, QUANTISED, check_format
from hybrimoe_jax.formats.packing import Format
from hybrimoe_jax.text.templates import MORE

Progress = Callable[[Iterable, int, str], Iterable]


def silent(items: Iterable, total: int, label: str) -> Iterable:
    return items


def write_checkpoint(
    weights: Weights,
    dst: str | os.PathLike,
    *,
    fmt: str | None = None,
    progress: Progress = silent,
    text_folder: str | os.PathLike | None = None,
    dense_format: str | None = None,
    zipped: bool = False,
) -> Path:
    """Writes weights to the folder `dst`, resuming in `dst.partial` where the same work was begun.

    `zipped` puts all arrays into one file, `pieces.zip` (see `orbax.zip_items`).
    """
    dst, config = Path(os.path.realpath(dst)), weights.config
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
        "zipped": zipped,
    }
    source = weights.folder or "the model in memory"
    check_space(dst, weights, dense_fmt, form, projections, copies=1 + zipped)
    with workplace(dst, plan if weights.files or weights.seed is not None else None) as work:
        out, done = work / "out", work / "done"
        records = {}
        for path in done.glob("*.json"):
            with contextlib.suppress(OSError, ValueError):
                records[path.stem] = json.loads(path.read_bytes())
        for shard in progress(weights.shards, len(weights.shards), "converting"):
            folder, record = out / "pieces" / shard.name, records.get(shard.name)
            if record is None or not shard_is_whole(folder, record):
                records[shard.name] = write_shard(folder, shard, dense_fmt, form, projections, source)
                write_record(done / f"{shard.name}.json", records[shard.name])
        for stray in (out / "pieces").iterdir():
            if stray.name not in records:  # what a killed writer left
                shutil.rmtree(stray)
        if zipped:
            zip_items(out / "pieces")
        (out / "config.json").write_text(config_text, encoding="utf-8")
        origin = Path(text_folder) if text_folder is not None else weights.folder
        if origin is not None:
            copy_text_files(origin, out)
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
            "pieces": [records[shard.name] for shard in weights.shards],
        }
        (out / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        os.rename(out, dst)
    return dst


@contextlib.contextmanager
def workplace(dst: Path, plan: Mapping[str, Any] | None) -> Iterator[Path]:
    """The folder `dst.partial`, locked; what is there is kept where it was begun with the same `plan`, else replaced.

    Removed when the body succeeds, kept when it fails. Raises UserError where
    another process holds it or it is not ours.
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
            begun = json.loads((work / "plan.json").read_bytes())
        except (OSError, ValueError):
            begun = None
        if plan is None or begun != plan:
            for name in ("out", "done"):
                shutil.rmtree(work / name, ignore_errors=True)
            write_record(work / "plan.json", plan)
        (work / "out" / "pieces").mkdir(parents=True, exist_ok=True)
        (work / "done").mkdir(exist_ok=True)
        yield work
        shutil.rmtree(work)


def write_record(path: Path, values: Any) -> None:
    with replacing(path) as file:
        file.write(json.dumps(values))


def copy_text_files(origin: Path, out: Path) -> None:
    """Tokenizer, chat templates and generation_config.json, where they exist."""
    more = [f"{MORE}/{path.name}" for path in sorted((origin / MORE).glob("*.jinja"))]
    if more:
        (out / MORE).mkdir(exist_ok=True)
    for name in (*TEXT_FILES, *more):
        if present(origin / name):
            shutil.copyfile(origin / name, out / name)


def check_formats(fmt: str | None, dense_format: str | None) -> None:
    """Raises UserError for an unknown format, and a dense one that is not quantised (plain tensors follow `fmt`)."""
    if fmt is not None:
        check_format(arguments.text("format", fmt))
    if dense_format is not None and arguments.text("dense_format", dense_format) in PLAIN:
        raise UserError(f"dense format {shown(dense_format)} is a plain one; leave it out, or say {QUANTISED}")
    if dense_format is not None:
        Format.parse(dense_format)


def check_source_format(weights: Weights, form: ExpertForm) -> None:
    """Raises UserError where experts that are quantised already would be rounded a second time."""
    quantised = any(isinstance(shard.experts, PackedExperts) for shard in weights.shards)
    if quantised and form.layout and form.format != weights.expert_format:
        raise UserError(
            f"{weights.folder or 'the model'}: its experts are {weights.expert_format}; rounding them again to "
            f"{form.format} would lose "
            f"accuracy twice (give --format {weights.expert_format}, f32 or bf16)"
        )


def check_absent(dst: Path) -> None:
    """Raises UserError where no folder can be made of this name, links followed; an empty one may be there."""
    if "\0" in str(dst):
        raise UserError(f"{shown(dst)}: no name of a folder; give one")
    if os.path.ismount(dst):
        raise UserError(f"{dst}: a file system is mounted there, which nothing can replace; give a folder in it")
    check_path(dst)
    try:
        empty = dst.is_dir() and not any(dst.iterdir())
    except OSError as error:
        raise UserError(f"{dst}: cannot be made ({error.strerror or error})") from None
    if not empty and (dst.exists() or dst.is_symlink()):
        raise UserError(f"{dst}: already exists; remove it or give another destination")
    check_folder_to_be(os.path.dirname(os.path.realpath(dst)), f"{dst}: its folder")


def check_space(
    dst: Path, weights: Weights, dense_fmt: str | None, form: ExpertForm, projections: Format | None, copies: int
) -> None:
    """Raises UserError where the disk has less room than the checkpoint needs beyond what is already written."""
    dst.parent.mkdir(parents=True, exist_ok=True)
    config = weights.config
    need = len(config.moe_layers) * config.num_experts * form.nbytes
    for shard in weights.shards:
        leaves = (dense_leaf(name, tensor, dense_fmt, projections) for name, tensor in shard.dense.items())
        need += sum(int(np.prod(leaf.leaf().shape)) * leaf.dtype.itemsize for leaf in leaves)
    need *= copies
    written = sum(p.stat().st_size for p in dst.with_name(dst.name + ".partial").rglob("*") if p.is_file())
    free = shutil.disk_usage(dst.parent).free
    if need - written > free:
        raise UserError(
            f"{dst}: needs {need / 1e9:.1f} GB but the disk has {(free + written) / 1e9:.1f} GB; free some room"
        )
