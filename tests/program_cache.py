"""XLA's compiled programs, kept from one run of the tests to the next, as commands keep them for their users.

Most of what a test with an engine takes is compiling. A process of the tests and the commands that it starts share a
folder of programs. The store has a place of its own in the user's cache folder.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import tempfile
from pathlib import Path

from hybrimoe_jax.engine.program_cache import SETTINGS, ProgramCache
from hybrimoe_jax.files import cache_folder

LIMIT = 512 * 2**20
MOST_MAPPINGS = 30_000
"""Less than half of what Linux lets a process have (`vm.max_map_count`, 65,530)."""


def let_go() -> None:
    """Drops what this process has compiled, where it is much; the files stay.

    Each of XLA's programs for the CPU is three mappings of memory. A process that has too many ends with a segmentation
    fault when the next one is read.
    """
    with contextlib.suppress(OSError), open("/proc/self/maps", "rb") as maps:
        if "jax" in sys.modules and sum(1 for _ in maps) > MOST_MAPPINGS:
            sys.modules["jax"].clear_caches()
            gc.collect()


def start() -> ProgramCache | None:
    """Makes this process, and those that it starts, use the cache.

    None where somebody chose a folder of their own, or where no folder can be made.
    """
    chosen = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if chosen and not Path(chosen).name.startswith("run-"):
        return None
    os.environ.update({name.upper(): str(value) for name, value in SETTINGS.items()})
    for place in (cache_folder() / "test-programs", Path(tempfile.gettempdir(), f"hybrimoe-jax-{os.getuid()}")):
        with contextlib.suppress(OSError, RuntimeError):
            cache = ProgramCache(place, LIMIT)
            os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache.own)
            return cache
    return None
