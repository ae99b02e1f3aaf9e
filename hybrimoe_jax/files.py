"""Where results are written, for every command: files that are complete or absent.

A plain file is written beside its place and renamed into it. It keeps its permissions, and a symbolic link to it stays.
Anything else that takes bytes (a pipe, a device, this program's own output) is written into, when all is there.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import secrets
import select
import shutil
import stat
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeGuard

from hybrimoe_jax.encoding import PATIENCE_S, read_text
from hybrimoe_jax.errors import UserError, shown

Target = str | os.PathLike[str]
STUCK_S = 6 * PATIENCE_S
"""How long who reads a pipe may take nothing."""
LONGEST_JSON = 1 << 26
"""Bytes of a JSON file, of which a large tokenizer has 35 MB: parsed, a file can take 25 times its size."""


def is_object(value: object) -> TypeGuard[dict[str, Any]]:
    """Whether what a JSON file gave is an object."""
    return isinstance(value, dict)


def cache_folder() -> Path:
    """Where this program keeps what it can make again, by the platform's convention. RuntimeError without a home."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "hybrimoe-jax"
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    return Path(chosen if os.path.isabs(chosen) else Path.home() / ".cache") / "hybrimoe-jax"


def read_json(path: Path, where: str = "", most: int = LONGEST_JSON) -> Any:
    """Parses a JSON file; raises UserError naming it, or `where`, where it is missing, malformed or too long."""
    where = where or f"{path}"
    text = read_text(path, where, most)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}); download or save it again") from None


def present(path: Path) -> bool:
    """Whether there is a file, of those that a folder may lack.

    UserError where something else has its name: a link that leads nowhere, as in a download's folder after a part of it
    was deleted, is not a file that nobody wanted.
    """
    if path.is_file():
        return True
    if os.path.lexists(path):
        what = "a link that leads nowhere" if path.is_symlink() and not path.exists() else "no plain file"
        raise UserError(f"{path}: {what}; download or save it again, or remove it")
    return False


def check_plain_file(path: Target, where: str) -> None:
    """Refuses to read a pipe or a device as a file that is read in parts: UserError that begins with `where`."""
    odd = False
    with contextlib.suppress(OSError, ValueError):
        mode = os.stat(path).st_mode
        odd = not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)
    if odd:
        raise UserError(f"{where}: no plain file; write what it gives into one first")


@contextlib.contextmanager
def replacing(path: Target, mode: str = "w") -> Iterator[IO[Any]]:
    """Opens a new file that takes the place of `path` when the block ends well, and vanishes when it does not.

    `mode` is "w" (UTF-8 text) or "wb". Raises UserError, naming `path`, where the system refuses the write; an error
    of another file, which the block reads, passes as it is.
    """
    name = _named(path)
    try:
        target = _place(name)
        if target is None:
            file = io.BytesIO()
            with _opened(file, mode) as writer:
                yield writer
                writer.flush()
                data = file.getvalue()
            _pour(name, data)
            return
        beside = _beside(target)
        try:
            with _opened(open(beside, "xb"), mode) as writer:
                yield writer
            _take_place(beside, target)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(beside)
    except OSError as error:
        passes = error.filename not in (None, name) and not os.fsdecode(error.filename).endswith(OURS)
        if passes or (isinstance(error, BrokenPipeError) and _descriptor(name) is not None):
            raise
        raise UserError(f"{name}: cannot be written ({error.strerror or error})") from error


def check_outputs(outputs: Mapping[str, Target | None], inputs: Iterable[Target | None] = ()) -> None:
    """`check_writable` for every file of a command, by its flag; UserError where two of them are one file."""
    taken: dict[str, str] = {}
    for flag, path in outputs.items():
        if path is None:
            continue
        target = check_writable(path, flag, inputs)
        if target is not None and taken.setdefault(target, flag) != flag:
            raise UserError(f"{flag} {path}: {taken[target]} is written there, too; give each a file of its own")


def files_in(texts: Iterable[Any]) -> list[str]:
    """The files that a command's arguments name, as a whole or in part: `paced:FILE`, `FILE.py:CLASS`, `FILE,FILE`."""
    flat = [text for given in texts for text in (given if isinstance(given, list) else [given])]
    parts = [
        part
        for text in flat
        if isinstance(text, str)
        for part in (text, text.partition(":")[2], *re.split("[:,]", text))
    ]
    return [part for part in dict.fromkeys(parts) if os.path.isfile(part)]


def check_writable(path: Target, what: str, inputs: Iterable[Target | None] = ()) -> str | None:
    """Refuses, before long work begins, a file that `replacing` could not write when it ends; leaves nothing behind.

    Raises UserError that begins with `what` for a folder or a block device, for a file whose folder is missing or takes
    no files, and for what is among the `inputs` or in a folder of them. Returns where a plain file will lie.
    """
    name = _named(path, what)
    where = f"{what} {name}"
    try:
        target = _place(name, where)
        if os.path.isfile(name) and any(_holds(given, name) for given in inputs if given is not None):
            raise UserError(f"{where}: it is one of the files to read; give another name for the result")
        if target is None:
            return None
        if not os.path.isdir(os.path.dirname(target)):
            raise UserError(f"{where}: there is no folder {os.path.dirname(name) or os.path.dirname(target)}")
        _try_to_write(_beside(target))
    except OSError as error:
        raise UserError(f"{where}: cannot be written ({error.strerror or error})") from None
    return target


def check_folder_to_be(path: Target, what: str) -> None:
    """The same for a folder: one in which files can be made, or that can be made itself, with those above it."""
    if not os.fspath(path):
        raise UserError(f"{what}: the name is empty; give a folder")
    try:
        folder = Path(os.path.realpath(path))
        there = next(above for above in (folder, *folder.parents) if above.exists() or above.is_symlink())
        if not there.is_dir():
            raise UserError(f"{what} {path}: {there} is no folder")
        _try_to_write(_beside(str(there / folder.name)))
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{what} {path}: cannot be written ({getattr(error, 'strerror', None) or error})") from None


OURS = f".{os.getpid()}.part"
"""How the names of files end that are being written."""


def _named(path: Target, what: str = "a result") -> str:
    """UserError for what is no path of a file."""
    try:
        name = os.fsdecode(path)
        os.fsencode(name)
    except UnicodeEncodeError:
        raise UserError(f"{what}: {shown(path)} is no name of a file; give one") from None
    except TypeError:
        raise UserError(f"{what}: {shown(path)} is no path; give a file's name") from None
    if not name or "\0" in name or (name.endswith(os.sep) and not os.path.isdir(name)):
        raise UserError(f"{what}: {shown(name)} is no name of a file; give one")
    return name


def _place(name: str, where: str = "") -> str | None:
    """The plain file that is to be replaced or made, links followed; None for what is written into as it is.

    That is this program's own output, whatever is no plain file, and a file in a folder that takes no new ones.
    """
    try:
        found = os.stat(name)
    except FileNotFoundError:
        return os.path.realpath(name)
    if _descriptor(name) is not None:
        return None
    for is_kind, kind in KINDS.items():
        if is_kind(found.st_mode):
            raise UserError(f"{where or name}: it is {kind}; give a file")
    if not _may(name, os.W_OK):
        raise OSError(errno.EACCES, "it is write-protected", name)
    target = os.path.realpath(name)
    plain = stat.S_ISREG(found.st_mode) and _may(os.path.dirname(target), os.W_OK | os.X_OK)
    return target if plain else None


KINDS = {stat.S_ISDIR: "a folder", stat.S_ISBLK: "a block device", stat.S_ISSOCK: "a socket"}
"""What takes no result."""


def _descriptor(name: str) -> int | None:
    """Of this program's standard output and error the one that is this very file, as /dev/stdout is."""
    for number in (1, 2):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(name), os.fstat(number)):
                return number
    return None


def _may(path: str, what: int) -> bool:
    return os.access(path, what, effective_ids=os.access in os.supports_effective_ids)


def _holds(given: Target, target: str) -> bool:
    """Whether what is read is this file, or a folder that it lies in."""
    with contextlib.suppress(OSError, ValueError):
        if os.path.isdir(given):
            return Path(os.path.realpath(given)) in Path(os.path.realpath(target)).parents
        return os.path.samefile(given, target)
    return False


def _beside(target: str) -> str:
    folder, name = os.path.split(target)
    return os.path.join(folder, f".{name[:40]}.{secrets.token_hex(4)}{OURS}")


def _opened(file: IO[bytes], mode: str) -> Any:
    return file if mode == "wb" else io.TextIOWrapper(file, "utf-8", newline="\n")


def _try_to_write(beside: str) -> None:
    try:
        open(beside, "xb").close()
    finally:
        with contextlib.suppress(OSError):
            os.unlink(beside)


def _take_place(beside: str, target: str) -> None:
    """Renames; a file that is replaced hands on its permissions and, where the system lets it, its owner."""
    with contextlib.suppress(FileNotFoundError):
        old, new = os.stat(target), os.stat(beside)
        if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
            with contextlib.suppress(OSError):
                os.chown(beside, old.st_uid, old.st_gid)
        os.chmod(beside, stat.S_IMODE(old.st_mode))
    try:
        os.replace(beside, target)
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.EPERM, errno.EACCES):
            raise
        shutil.copyfile(beside, target)  # mounted by itself, as containers do; or another's, in a folder like /tmp


def _pour(name: str, data: bytes) -> None:
    """Writes into what is there already."""
    own = _descriptor(name)
    if own is not None:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
    file = _open_to_write(name) if own is None else os.dup(own)
    ready, left = select.poll(), memoryview(data)
    ready.register(file, select.POLLOUT)
    try:
        while left:
            if not ready.poll(1e3 * STUCK_S if own is None else None):
                raise OSError(None, f"nobody has read what is in this pipe for {STUCK_S:.0f} s", name)
            with contextlib.suppress(BlockingIOError):
                left = left[os.write(file, left[: select.PIPE_BUF]) :]
    finally:
        os.close(file)


def _open_to_write(name: str) -> int:
    """A pipe waits a while for somebody who reads it."""
    patience = time.monotonic() + PATIENCE_S
    while True:
        try:
            return os.open(name, os.O_WRONLY | os.O_TRUNC | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.ENXIO or not stat.S_ISFIFO(os.stat(name).st_mode):
                raise
        if time.monotonic() > patience:
            raise OSError(None, f"nobody has opened this pipe to read for {PATIENCE_S:.0f} s", name)
        time.sleep(0.05)
