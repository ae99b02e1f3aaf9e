"""The source of the GPU's kernels, compiled for the CPU (cuda_emulation.cpp), in place of the call to them."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from hybrimoe_jax.files import cache_folder

SOURCE = Path(__file__).with_name("cuda_emulation.cpp")
KERNELS = Path(__file__).parents[1] / "hybrimoe_jax" / "models" / "cuda"
COMPILER = shutil.which(os.environ.get("CXX", "c++")) or ""
needs_compiler = pytest.mark.skipif(not COMPILER, reason="no C++ compiler")
NAMES = ("silu_gate_up", "add_down")
FLAGS = ("-std=c++17", "-O1", "-w", "-shared", "-fPIC")


def kept_folder(otherwise: Path) -> Path:
    """The user's folder for what these sources, this compiler and these flags make; `otherwise` where it cannot be."""
    version = subprocess.check_output([COMPILER, "--version"], text=True).partition("\n")[0]
    made_of = hashlib.sha256(repr((version, platform.machine(), FLAGS)).encode())
    for source in (SOURCE, KERNELS / "experts.cu"):  # which include the system's headers alone
        made_of.update(source.read_bytes())
    with contextlib.suppress(OSError, RuntimeError):
        folder = cache_folder() / "test-emulation" / made_of.hexdigest()
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    return otherwise


def build(otherwise: Path) -> dict[str, ctypes.CDLL]:
    """By the PTX file's name, the same kernels for the CPU; kept in `kept_folder`."""
    libraries, folder = {}, kept_folder(otherwise)
    for bits in (4, 8):
        for rows in (1, 8):
            out = folder / f"int{bits}-{rows}.so"
            if not out.exists():
                with tempfile.TemporaryDirectory(dir=folder) as beside:  # whoever else looks finds it whole or not
                    new = Path(beside, out.name)
                    defines = [f"-DBITS={bits}", f"-DROWS={rows}"]
                    subprocess.run([COMPILER, *FLAGS, f"-I{KERNELS}", *defines, "-o", new, SOURCE], check=True)
                    new.replace(out)
            libraries[out.stem] = ctypes.CDLL(str(out))
            libraries[out.stem].loads_of.restype = ctypes.c_longlong
    return libraries


class Emulation:
    """Stands in for `packed_cuda._call`; counts how the pool's bytes are read."""

    def __init__(self, libraries: dict[str, ctypes.CDLL]):
        self.libraries = libraries
        self.times_read: np.ndarray | None = None  # of each byte of the pool, uint8 [S, nbytes]
        self.loads = dict.fromkeys((4, 8, 16), 0)  # from the pool, by their bytes
        self.launched: list[tuple[str, str]] = []

    def __call__(self, kernels: str, name: str, grid: tuple[int, int], threads: int, out, *operands):
        library, which = self.libraries[kernels], NAMES.index(name)
        assert threads == library.threads_of(which)
        self.launched.append((kernels, name))
        arrays = [np.ascontiguousarray(operand) for operand in operands]
        result = np.full(out.shape, np.nan, out.dtype)  # what is not written shows
        pool = next(array for array in arrays if array.dtype == np.uint8)
        if self.times_read is None:
            self.times_read = np.zeros(pool.shape, np.uint8)
        for array in arrays:
            counts = self.times_read.ctypes.data if array is pool else None
            library.declare(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes), ctypes.c_void_p(counts))
        places = [array.ctypes.data for array in (*arrays, result)]
        library.launch(which, *grid, threads, (ctypes.c_void_p * len(places))(*places))
        for size in self.loads:
            self.loads[size] += library.loads_of(size)
        library.forget()
        return jnp.asarray(result)
