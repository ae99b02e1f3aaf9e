"""The files of a converted checkpoint's items, looked over before a library opens them, which trusts what it finds.

Orbax items lie in the folder `pieces` or, uncompressed, in `pieces.zip`. An array of an item is a folder of its own: a
description, `zarr.json`, and files of data. Of a description the parser recurses into what is nested, and of a file of
data all is read, however long it is: both are bounded here, by what the manifest says.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.files import check_plain_file

DESCRIPTION = "zarr.json"
LONGEST_DESCRIPTION, MOST_BRACKETS = 1 << 16, 256
"""Bytes of a description, and the objects and lists in it. One that was written here has 0.5 kB and ten of them."""
FRAMING = 1 << 20
"""Bytes that a file of data may have beyond its array: sums and, where it is compressed, what that adds."""
DAMAGED = (zipfile.BadZipFile, ValueError, OSError, RuntimeError, EOFError, LookupError, ArithmeticError)
"""What Python's reader of zips raises for bytes that are none."""

File = tuple[str, int, Callable[[], bytes]]
"""A file's path within the items, its size in bytes, and what reads it."""


def items_of(checkpoint: Path) -> Path:
    """Where a checkpoint's items lie: its folder `pieces`, or the zip in its place. UserError where both are there."""
    zipped, folder = checkpoint / "pieces.zip", checkpoint / "pieces"
    if zipped.is_file() and os.path.lexists(folder):
        raise UserError(f"{checkpoint}: both pieces and pieces.zip are there; remove the one that is out of date")
    return zipped if zipped.is_file() else folder


def item_names(items: Path, arrays: Mapping[str, int]) -> set[str]:
    """The items in a folder or zip. `arrays`: of each array that will be read, as `ITEM/state/NAME`, the bytes.

    UserError for a damaged zip, for what is no plain file, and for a file of one of these arrays that cannot be its.
    """
    names = set()
    for name, size, read in (_in_zip if items.suffix == ".zip" else _in_folder)(items):
        item, *rest = name.split("/")
        if rest[:1] == ["state"]:
            names.add(item)
        most = arrays.get("/".join((item, *rest[:2])))
        if most is None or len(rest) < 3:
            continue
        wrong = None
        if rest[2:] == [DESCRIPTION]:
            try:
                text = read() if size <= LONGEST_DESCRIPTION else b""
            except DAMAGED:
                raise _damaged(items / name) from None
            if not text or text.count(b"[") + text.count(b"{") > MOST_BRACKETS:
                wrong = "no description of an array"
        elif size > most + FRAMING:
            wrong = f"{size:,} bytes, where its array has {most:,} by manifest.json"
        if wrong:
            raise UserError(f"{items}/{name}: {wrong}; convert the original again")
    return names


def _in_folder(items: Path) -> Iterator[File]:
    """Links are followed, each once for each array that it leads to."""
    waiting, seen = [""], set()
    while waiting:
        below = waiting.pop()
        try:
            entries = list(os.scandir(items / below))
        except OSError:  # it will be missing
            continue
        for entry in entries:
            name = f"{below}{entry.name}"
            try:
                folder, size = entry.is_dir(), entry.stat().st_size
            except OSError:  # a link that leads nowhere, or to itself
                continue
            if not folder:
                check_plain_file(entry.path, entry.path)
                yield name, size, lambda path=entry.path: Path(path).read_bytes()
                continue
            if entry.is_symlink():
                link = (os.path.realpath(entry.path), *name.split("/")[:3])
                if link in seen:
                    continue
                seen.add(link)
            waiting.append(f"{name}/")


def _in_zip(items: Path) -> Iterator[File]:
    """UserError for an archive that is damaged, or whose members are compressed or have one name."""
    try:
        with zipfile.ZipFile(items) as archive:
            names = set()
            for entry in archive.infolist():
                if entry.filename in names:
                    raise UserError(f"{items}: it has two members {entry.filename}; convert the original again")
                names.add(entry.filename)
                if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                    raise UserError(f"{items}: {entry.filename} is compressed; zip the items again without (zip -0)")
                yield entry.filename, entry.file_size, lambda entry=entry: archive.read(entry)
    except UserError:
        raise
    except DAMAGED:
        raise _damaged(items) from None


def _damaged(items: Path) -> UserError:
    return UserError(f"{items}: damaged; convert the original again")
