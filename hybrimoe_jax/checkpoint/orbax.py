"""Orbax items on disk, written and read in bounded memory. The only file that imports Orbax or tensorstore.

`orbax.checkpoint.v1.save` needs about three times an array's size (measured: a 150 MB array added 290 MB beside
itself), so an item is saved with the first rows of each large leaf and the stored array is then grown, block by block,
through tensorstore. The result is an ordinary Orbax item: `orbax.checkpoint` loads it whole. Blocks are the chunks of
the stored array, so with one expert to a block, one expert is one read (measured 0.8-1.3 ms for 10 MB).

The items of a folder can be put into one uncompressed zip, where the same blocks are read in place.

Orbax is imported only to write: it brings in jax and about a second of start-up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import logging
import math
import os
import re
import shutil
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.files import replacing

TIMES = frozenset({"init_timestamp_nsecs", "commit_timestamp_nsecs"})


Form = tuple[tuple[int, ...], str]
"""An array's shape and the name of its type."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array to be written: `read(start, stop)` gives rows [start, stop) of the first axis; `rows` to a chunk."""

    shape: tuple[int, ...]
    rows: int
    read: Callable[[int, int], np.ndarray]


def save_item(folder: Path, leaves: Mapping[str, Leaf]) -> None:
    """Writes one Orbax item; memory is about four blocks of the largest leaf. `folder` must not exist.

    UserError where the system refuses a write: the disk is full.
    """
    first = {name: np.ascontiguousarray(leaf.read(0, min(leaf.rows, leaf.shape[0]))) for name, leaf in leaves.items()}
    with _writing(folder):
        _save(folder, first)
    del first
    gc.collect()  # Orbax leaves the arrays in reference cycles
    for name, leaf in leaves.items():
        if leaf.rows < leaf.shape[0]:
            with _writing(folder):
                _grow(folder, name, leaf)
    _forget_when_and_where(folder)


def _save(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    import orbax.checkpoint.experimental.v1 as ocp

    context = ocp.Context()
    context.array.saving.use_ocdbt = False  # plain chunk files: growing an array rewrites nothing
    context.array.saving.use_compression = False  # weights hardly shrink and reads are on the decode path
    with context:
        ocp.save(str(folder.absolute()), arrays)


def _grow(folder: Path, name: str, leaf: Leaf) -> None:
    """Writes what follows an array's first block."""
    store = open_leaf(folder, name, writable=True)
    store = store.resize(exclusive_max=list(leaf.shape), expand_only=True).result()
    pending = None
    for start in range(leaf.rows, leaf.shape[0], leaf.rows):
        stop = min(start + leaf.rows, leaf.shape[0])
        block = leaf.read(start, stop)  # while the block before is written
        if pending is not None:
            pending.result()
        pending = store[start:stop].write(block, can_reference_source_data_indefinitely=True)
    if pending is not None:
        pending.result()


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turns a write that the system refuses into a UserError.

    Orbax and its threads would tell of it several times, with tracebacks, and some after their loop has ended; and of
    the absence of OCDBT files.
    """
    hooks, disabled = (threading.excepthook, sys.unraisablehook), logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    threading.excepthook, sys.unraisablehook = map(_without_refusals, hooks)
    refused = None
    try:
        yield
    except (ValueError, OSError) as error:
        refused = None if isinstance(error, UserError) else _refusal(error)
        if refused is None:
            raise
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # from now on, as the hooks: more of them may come
        raise UserError(
            f"{folder}: cannot be written ({refused}); once that is mended, the same command goes on here"
        ) from None
    finally:
        logging.disable(disabled)
        if refused is None:
            threading.excepthook, sys.unraisablehook = hooks


def _refusal(error: BaseException | None) -> str | None:
    """What the system said, where it refused a write; tensorstore tells it in a text."""
    told = re.search(r"os_error_code='(\d+)'", str(error))
    number = error.errno if isinstance(error, OSError) else told and int(told[1])
    return None if number is None else os.strerror(number)


def _without_refusals(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A hook for what threads raise that drops refused writes, and what comes of them."""

    def told(news: Any) -> None:
        if _refusal(news.exc_value) is None and "Event loop is closed" not in str(news.exc_value):
            hook(news)

    return told


def _forget_when_and_where(folder: Path) -> None:
    """Takes the times and the path of its making out of Orbax's records of an item: equal arrays give equal bytes."""
    about = folder / "_CHECKPOINT_METADATA"
    values = json.loads(about.read_text())
    about.write_text(json.dumps({**values, **dict.fromkeys(TIMES.intersection(values))}))
    committed = folder / "commit_success.txt"  # it is the file that counts
    if committed.exists():
        committed.write_text("")


def zip_items(folder: Path) -> None:
    """Puts the arrays of a folder's items into `folder`.zip in place of the folder; equal arrays give equal bytes.

    Orbax's records of an item, which hold the time, are left out.
    """
    with replacing(folder.with_suffix(".zip"), "wb") as file, zipfile.ZipFile(file, "w") as archive:
        for path in sorted(folder.glob("*/state/**/*")):
            if path.is_file():
                archive.writestr(zipfile.ZipInfo(path.relative_to(folder).as_posix()), path.read_bytes())
    shutil.rmtree(folder)


def check_path(path: Path) -> None:
    """UserError for a folder that the library which reads and writes weights cannot name."""
    try:
        os.path.realpath(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{path}: not UTF-8 text, which names of folders with weights must be; rename it") from None


def in_zip(archive: Path, path: str) -> dict[str, Any]:
    """What lies at `path` within a zip, to tensorstore."""
    return {"driver": "zip", "base": {"driver": "file", "path": str(archive.absolute())}, "path": path}


@functools.cache
def tensorstore_context():
    """Few threads: reads happen beside kernels that own the cores."""
    import tensorstore as ts

    limits = {"data_copy_concurrency": {"limit": 1}, "file_io_concurrency": {"limit": 4}, "file_io_sync": False}
    return ts.Context(limits)


def open_leaf(folder: Path, name: str, writable: bool = False, form: Form | None = None):
    """A tensorstore handle on one leaf of an item; UserError where it is absent, unreadable or not of this form."""
    try:
        store = opening(folder, name, writable).result()
    except ValueError as error:
        raise unreadable(folder, name, error) from None
    return store if form is None else checked(store, form, folder, name)


def checked(store: Any, form: Form, folder: Path, name: str) -> Any:
    """The handle given; UserError where its array has another shape or type, or lies in blocks larger than itself."""
    have, block = (tuple(store.shape), store.dtype.name), store.chunk_layout.read_chunk.shape
    if have != form or math.prod(block) > math.prod(form[0]):
        raise UserError(
            f"{folder}: {name} is an array {have[1]} {list(have[0])} in blocks of {list(block)}, and {form[1]} "
            f"{list(form[0])} by manifest.json; convert the original again"
        )
    return store


def opening(folder: Path, name: str, writable: bool = False):
    """The handle of `open_leaf` to come; ValueError where the leaf is absent or unreadable."""
    import tensorstore as ts

    if folder.parent.suffix == ".zip":
        kvstore = in_zip(folder.parent, f"{folder.name}/state/{name}/")
    else:
        kvstore = {"driver": "file", "path": f"{(folder / 'state' / name).absolute()}/"}
    spec = {
        "driver": "zarr3",
        "kvstore": kvstore,
        "store_data_equal_to_fill_value": True,  # an all-zero expert is data, a missing file is not
        "fill_missing_data_reads": False,
        "recheck_cached_data": "open",  # a zip's directory is not asked for again at every read
    }
    return ts.open(spec, open=True, read=True, write=writable, context=tensorstore_context())


def read_rows(store, index: int | None, folder: Path, name: str) -> np.ndarray:
    """Row `index` of an opened leaf, or all of it; raises UserError where its chunk is missing or cut short."""
    try:
        return (store if index is None else store[index]).read().result()
    except ValueError as error:
        row = name if index is None else f"{name}[{index}]"
        raise unreadable(folder, row, error) from None


def read_leaves(folder: Path, forms: Mapping[str, Form]) -> dict[str, np.ndarray]:
    """Several leaves of given forms at once, opened and read side by side."""
    name, out = "", {}
    stores = [opening(folder, name) for name in forms]
    try:
        pending = {}
        for (name, form), store in zip(forms.items(), stores, strict=True):
            pending[name] = checked(store.result(), form, folder, name).read()
        for name, future in pending.items():
            out[name] = future.result()
    except UserError:
        raise
    except ValueError as error:
        raise unreadable(folder, name, error) from None
    return out


def unreadable(folder: Path, name: str, error: Exception) -> UserError:
    why = "a file is missing" if "NOT_FOUND" in str(error) else "a file is cut short or damaged"
    return UserError(f"{folder}: {name} can't be read ({why}); convert the original again")
