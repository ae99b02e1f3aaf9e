"""XLA's compiled programs, kept from one run of the tests to the next.

Most of what a test with an engine takes is compiling. jax keeps programs in a folder and writes an entry in place, so
that another process may read half of one, and a killed process leaves half of one. Here every process of the tests has
a folder of its own, which the commands that it starts use, too. It begins as hard links to the entries of earlier runs.
New entries that are whole are linked into the store, for all others.

The store is in the user's cache folder. Its name stands for all that a program may depend on: jaxlib, the processor
and its features, the native kernels. Beyond `LIMIT` bytes the oldest entries go.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import shutil
import tempfile
import time
from pathlib import Path

LIMIT = 512 * 2**20
STALE = 86400
"""Seconds after which a folder that a process left behind is removed."""
NATIVE = Path(__file__).parents[1] / "hybrimoe_jax/host_kernels/native/libexperts.so"


def root() -> Path:
    """Where caches of this user are kept."""
    home = os.environ.get("XDG_CACHE_HOME")
    return Path(home if home and os.path.isabs(home) else Path.home() / ".cache", "hybrimoe-jax", "test-programs")


def key() -> str:
    """What programs that may replace one another have in common."""
    facts = [importlib.metadata.version(name) for name in ("jax", "jaxlib")]
    facts += [platform.system(), platform.machine(), platform.libc_ver()[1]]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("latin-1").splitlines()
        facts += sorted({line for line in lines if line.split("\t")[0] in ("model name", "flags", "Features")})
    if NATIVE.is_file():
        facts.append(hashlib.sha256(NATIVE.read_bytes()).hexdigest())
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def whole(entry: Path) -> bool:
    """Whether jax can read the entry: its compression notices what is missing."""
    from jax._src.compilation_cache import decompress_executable

    try:
        return bool(decompress_executable(entry.read_bytes()))
    except Exception:
        return False


class ProgramCache:
    """One process's folder of programs, `own`, beside the store that all share."""

    def __init__(self, root: Path):
        self.store = root / key()
        self.store.mkdir(parents=True, exist_ok=True)
        self.own = Path(tempfile.mkdtemp(prefix="run-", dir=root))
        self._known: set[str] = set()
        self.exchange()

    def exchange(self) -> None:
        """Links the store's entries into the own folder and whole new ones of it into the store."""
        stored, here = ({p.name for p in folder.glob("*-cache")} for folder in (self.store, self.own))
        for name in here - stored - self._known:
            if whole(self.own / name):
                _link(self.own / name, self.store / name)
            else:
                (self.own / name).unlink(missing_ok=True)
        for name in stored - here:
            _link(self.store / name, self.own / name)
        self._known = {p.name for p in self.own.glob("*-cache")}

    def close(self) -> None:
        self.exchange()
        shutil.rmtree(self.own, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    with contextlib.suppress(FileExistsError, FileNotFoundError):  # another process was faster, or has made room
        os.link(source, target)


def make_room(root: Path) -> None:
    """Removes what killed processes left, and the oldest entries beyond `LIMIT`."""
    with contextlib.suppress(FileNotFoundError):  # another process makes room as well
        for folder in root.glob("run-*"):
            if time.time() - folder.stat().st_mtime > STALE:
                shutil.rmtree(folder, ignore_errors=True)
        entries = [
            (p.stat().st_mtime, p.stat().st_size, p) for p in root.glob("*/*-cache") if "run-" not in p.parent.name
        ]
        size = sum(size for _, size, _ in entries)
        for _, bytes_, path in sorted(entries):
            if size <= LIMIT:
                break
            path.unlink(missing_ok=True)
            size -= bytes_


def start() -> ProgramCache | None:
    """Makes this process, and those that it starts, use the cache.

    None where somebody chose a folder of their own, or where no folder can be made.
    """
    chosen = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if chosen and not Path(chosen).name.startswith("run-"):
        return None
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    # Caches of XLA's own lie in the folder, whose name would become part of each entry's.
    os.environ["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = "none"
    for place in (root(), Path(tempfile.gettempdir(), f"hybrimoe-jax-{os.getuid()}")):
        with contextlib.suppress(OSError, RuntimeError):
            place.mkdir(parents=True, exist_ok=True)
            make_room(place)
            cache = ProgramCache(place)
            os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache.own)
            return cache
    return None
