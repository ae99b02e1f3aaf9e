"""XLA's compiled programs, kept from one process to the next. Imports no jax.

Most of what a start takes is compiling. jax keeps programs in a folder and writes an entry in place, so that another
process may read half of one, and a killed process leaves half of one, which every later start would warn of. Here every
process has a folder of its own. It begins as hard links to the entries of a store. New entries that are whole are
linked into the store, under a name that ends in their checksum. What no longer fits its name is removed and compiled
again.

The store's name stands for all that a program may depend on beside what jax itself looks at: the versions, the
processor and its features, the cores, the native kernels. Beyond a limit the oldest entries go.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import tempfile
import time
import zlib
from pathlib import Path

from hybrimoe_jax.host_kernels.native import library
from hybrimoe_jax.machine.identity import digest, machine_facts

STALE = 86400
"""Seconds after which the folder of a process that has ended, or runs elsewhere, is removed."""
SETTINGS = {
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
    # Caches of XLA's own would lie in the folder, whose name would become part of each entry's.
    "jax_persistent_cache_enable_xla_caches": "none",
}
"""Of jax, beside the folder."""


class ProgramCache:
    """One process's folder of programs, `own`, beside the store that all share.

    Raises OSError where no such folders, or no hard links, can be made in `root`.
    """

    def __init__(self, root: Path, limit: int):
        self.store = root / digest(machine_facts([library.path()]))
        self.store.mkdir(parents=True, exist_ok=True)
        make_room(root, limit)
        self._pid = os.getpid()
        self.own = Path(tempfile.mkdtemp(prefix=f"run-{platform.node()}-{self._pid}-", dir=root))
        self._known: set[str] = set()
        try:
            _check_links(self.own)
            self.exchange()
        except OSError:
            shutil.rmtree(self.own, ignore_errors=True)
            raise

    def exchange(self) -> None:
        """Links the store's entries into the own folder and whole new ones of it into the store."""
        stored = {path.name.rpartition(".")[0]: path for path in self.store.glob("*-cache.*")}
        here = {path.name for path in self.own.glob("*-cache")}
        for name in here - stored.keys() - self._known:
            data = (self.own / name).read_bytes()
            if _is_whole(data):
                _link(self.own / name, self.store / f"{name}.{zlib.crc32(data):08x}")
            else:
                (self.own / name).unlink(missing_ok=True)
        for name in stored.keys() - here:
            with contextlib.suppress(FileNotFoundError):  # another process has made room
                if f".{zlib.crc32(stored[name].read_bytes()):08x}" == stored[name].suffix:
                    _link(stored[name], self.own / name)
                else:
                    stored[name].unlink()
        self._known = {path.name for path in self.own.glob("*-cache")}

    def share(self) -> None:
        """`exchange`, where a full disk is no reason to fail."""
        with contextlib.suppress(OSError):
            self.exchange()

    def close(self) -> None:
        if os.getpid() != self._pid:  # a fork's end is not the owner's
            return
        self.share()
        shutil.rmtree(self.own, ignore_errors=True)


def make_room(root: Path, limit: int) -> None:
    """Removes what killed processes left, and the oldest entries beyond `limit` bytes."""
    with contextlib.suppress(FileNotFoundError):  # another process makes room as well
        for folder in root.glob("run-*"):
            if time.time() - folder.stat().st_mtime > STALE and not _is_running(folder.name):
                shutil.rmtree(folder, ignore_errors=True)
        entries = [(path.stat(), path) for path in root.glob("*/*-cache*") if "run-" not in path.parent.name]
        size = sum(stat.st_size for stat, _ in entries)
        for stat, path in sorted(entries, key=lambda entry: entry[0].st_mtime):
            if size <= limit:
                break
            path.unlink(missing_ok=True)
            size -= stat.st_size


def _is_running(folder: str) -> bool:
    """Whether the process of that folder's name is one of this machine that lives."""
    _, _, owner = folder.partition("-")
    node, pid, *_ = [*owner.rsplit("-", 2), "", ""]
    if node != platform.node() or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def _is_whole(entry: bytes) -> bool:
    """Whether jax can read the entry: its compression notices what is missing."""
    from jax._src.compilation_cache import decompress_executable

    try:
        return bool(decompress_executable(entry))
    except Exception:
        return False


def _link(source: Path, target: Path) -> None:
    with contextlib.suppress(FileExistsError, FileNotFoundError):  # another process was faster, or has made room
        os.link(source, target)


def _check_links(folder: Path) -> None:
    """Raises OSError where the file system has no hard links."""
    (folder / "file").touch()
    os.link(folder / "file", folder / "link")
    for name in ("file", "link"):
        (folder / name).unlink()
