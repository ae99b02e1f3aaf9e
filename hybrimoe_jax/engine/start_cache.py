"""What makes the next start fast: a folder of compiled programs and measurements. Imports no jax.

Nothing in it changes an answer; all of it can be deleted at any time.
"""

from __future__ import annotations

import atexit
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

from hybrimoe_jax.engine.program_cache import SETTINGS, ProgramCache
from hybrimoe_jax.files import cache_folder

VARIABLE = "HYBRIMOE_START_CACHE"
PROGRAMS_LIMIT = 128 * 2**20


def start_folder(choice: str) -> Path | None:
    """The folder that an `EngineConfig.start_cache` names; None for "off", and where there is no home for "default"."""
    if choice == "default":
        choice = os.environ.get(VARIABLE) or "default"
    try:
        folder = cache_folder() if choice == "default" else Path(choice).expanduser()
    except RuntimeError:
        return None
    return None if choice == "off" else folder


def usable(choice: str) -> str:
    """`choice`, or "off" where files cannot be written there, with one warning."""
    folder = start_folder(choice)
    if folder is None:
        return "off"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return choice
    except OSError as error:
        _warn(folder, error)
        return "off"


def keep_programs(choice: str) -> ProgramCache | None:
    """Has jax keep compiled programs in the folder, for the whole process and until its end.

    None where nothing is done: nothing is to be kept, or jax has been given a folder, by JAX_COMPILATION_CACHE_DIR, its
    config or an earlier call.
    """
    import jax

    folder = start_folder(choice)
    config: Any = jax.config  # its stubs lack the options
    if folder is None or config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
        return None
    try:
        cache = ProgramCache(folder / "programs", PROGRAMS_LIMIT)
    except OSError as error:
        _warn(folder, error)
        return None
    for name, value in {**SETTINGS, "jax_compilation_cache_dir": str(cache.own)}.items():
        config.update(name, value)
    atexit.register(cache.close)
    return cache


def _warn(folder: Path, error: OSError) -> None:
    warnings.warn(
        f"{folder}: nothing can be kept there ({error.strerror or error}), so the next start takes as long as this one",
        stacklevel=4,
    )
