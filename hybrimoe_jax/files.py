"""Files that are complete or absent: written beside their place, then renamed into it."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TypeGuard

from hybrimoe_jax.errors import UserError


def is_object(value: object) -> TypeGuard[dict[str, Any]]:
    """Whether what a JSON file gave is an object."""
    return isinstance(value, dict)


def cache_folder() -> Path:
    """Where this program keeps what it can make again, by the platform's convention. RuntimeError without a home."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "hybrimoe-jax"
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    return Path(chosen if os.path.isabs(chosen) else Path.home() / ".cache") / "hybrimoe-jax"


def read_json(path: Path) -> Any:
    """Parses a JSON file; raises UserError naming it where it is missing or malformed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); download or save it again") from None


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Opens a new file that takes the place of `path` when the block ends well, and vanishes when it does not.

    `mode` is "w" (UTF-8 text) or "wb". Raises UserError, naming `path`, where the system refuses the write; an error
    of another file, which the block reads, passes as it is.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(beside, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
        os.replace(beside, path)
    except OSError as error:
        if error.filename not in (None, str(beside)):
            raise
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str], what: str) -> None:
    """Refuses, before long work begins, a file that `replacing` could not write when it ends; leaves nothing behind.

    Raises UserError that begins with `what` for a folder or device, and for a file whose folder is missing or takes
    no files.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise UserError(f"{what} {path}: it is {'a folder' if path.is_dir() else 'no plain file'}; give a file")
    if not path.parent.is_dir():
        raise UserError(f"{what} {path}: there is no folder {path.parent}")
    _try_to_write(path, path.parent, what)


def check_folder_to_be(path: str | os.PathLike[str], what: str) -> None:
    """The same for a folder: one in which files can be made, or that can be made itself, with those above it."""
    path = Path(os.path.abspath(path))
    there = next(folder for folder in (path, *path.parents) if folder.exists() or folder.is_symlink())
    if not there.is_dir():
        raise UserError(f"{what} {path}: {there} is no folder")
    _try_to_write(path, there, what)


def _try_to_write(path: Path, folder: Path, what: str) -> None:
    beside = folder / f".{path.name}.{os.getpid()}.part"
    try:
        beside.touch(exist_ok=False)
        beside.unlink()
    except OSError as error:
        raise UserError(f"{what} {path}: cannot be written ({error.strerror or error})") from None
