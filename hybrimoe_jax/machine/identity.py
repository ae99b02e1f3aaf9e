"""Which machine this is, as far as compiled programs and measured times depend on it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path

PACKAGES = ("hybrimoe-jax", "jax", "jaxlib", "numpy")


def machine_facts(files: Sequence[Path] = ()) -> list[str]:
    """The system, the processor with its features, the cores and the software; `files` by their contents.

    Two machines that share a home folder differ here unless one may stand for the other.
    """
    facts = software()
    facts += [platform.system(), platform.machine(), platform.libc_ver()[1], os.environ.get("NPROC", "")]
    facts += [str(cores()), *_cpuinfo("model name", "flags", "Features")]
    return facts + [hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()]


def software() -> list[str]:
    """The packages that times depend on, with their versions."""
    return [f"{name} {_version(name)}" for name in PACKAGES]


def processor() -> str:
    """The processor's name, or its architecture where the system tells no more."""
    names = _cpuinfo("model name")
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpuinfo(*keys: str) -> list[str]:
    """The different lines of these keys, sorted; none where the system has no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text("latin-1").splitlines()
    except OSError:
        return []
    return sorted({line for line in lines if line.split("\t")[0] in keys})


def digest(facts: Sequence[str]) -> str:
    """A short name for the facts, good for a file."""
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from its folder, not installed
        return ""
