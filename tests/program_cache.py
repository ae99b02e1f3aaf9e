"""XLA's compiled programs, kept from one run of the tests to the next, as commands keep them for their users.

Most of what a test with an engine takes is compiling. A process of the tests and the commands that it starts share a
folder of programs. The store has a place of its own in the user's cache folder.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from hybrimoe_jax.engine.program_cache import SETTINGS, ProgramCache
from hybrimoe_jax.files import cache_folder

LIMIT = 512 * 2**20


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
