"""Compiled programs are memory mappings, of which a process may have only so many. Imports no jax by itself."""

from __future__ import annotations

import contextlib
import gc
import sys
from pathlib import Path

SHARE = 0.5
"""Of the mappings that a process may have, those that it may hold before it lets go of programs."""
LIMIT, HELD = Path("/proc/sys/vm/max_map_count"), Path("/proc/self/maps")
"""Linux's; nothing is done where they are not."""


def spare() -> bool:
    """Drops what jax has compiled in this process, where that is very much -> whether it did.

    Each of XLA's programs for the CPU is three mappings. Beyond Linux's limit XLA ends the process with a segmentation
    fault. What is still used is compiled again, or read from the start cache.
    """
    with contextlib.suppress(OSError, ValueError):
        with HELD.open("rb") as held:
            count = sum(1 for _ in held)
        if "jax" in sys.modules and count > SHARE * int(LIMIT.read_text()):
            sys.modules["jax"].clear_caches()
            gc.collect()
            return True
    return False
