"""Compiles hybrimoe_jax/models/cuda/experts.cu to the PTX files beside it; `--check` only compares.

    pip install nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-runtime      # and a C++ compiler
    python scripts/make_ptx.py [--check] [--nvcc PATH]

The files name the PTX version of CUDA 12.0, older than the compiler's own, so that every driver which jax supports
takes them. `ptxas` says whether they keep to it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "hybrimoe_jax" / "models" / "cuda" / "experts.cu"
VARIANTS = {f"int{bits}-{rows}": (bits, rows) for bits in (4, 8) for rows in (1, 8)}
PTX_VERSION, OLDEST = "8.0", "75"
"""Of CUDA 12.0; compute capability 7.5 (Turing)."""


def wheel_nvcc() -> Path | None:
    """Of the wheels nvidia-cuda-nvcc and nvidia-nvvm on Python's path."""
    places = (Path(folder, "nvidia", "cu13", "bin", "nvcc") for folder in sys.path)
    return next((place for place in places if place.exists()), None)


def source_hash() -> str:
    return hashlib.sha256(SOURCE.read_bytes()).hexdigest()


def compiled(nvcc: Path, bits: int, rows: int) -> str:
    """The PTX of one variant, without the compiler's comments."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.ptx")
        command = [nvcc, "-ptx", f"-arch=compute_{OLDEST}", f"-DBITS={bits}", f"-DROWS={rows}", "-o", out, SOURCE]
        path = f"{nvcc.parent}{os.pathsep}{os.environ.get('PATH', '')}"
        subprocess.run(command, check=True, env={**os.environ, "PATH": path})
        text = out.read_text()
    release = re.search(r"release ([\d.]+)", text)
    text = re.sub(r"^\s*//.*\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"\s*//.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\n\s*\n+", "\n", text).strip()
    text = re.sub(r"^\.version .*", f".version {PTX_VERSION}", text, flags=re.MULTILINE)
    made = f"// Made by scripts/make_ptx.py with nvcc {release and release[1]} from experts.cu, sha256 {source_hash()}"
    return f"{made}\n{text}\n"


def assembled(ptxas: Path, ptx: Path, target: str, out: Path) -> str:
    """What ptxas reports of a file: registers, spills."""
    command = [ptxas, "-v", f"-arch={target}", ptx, "-o", out]
    return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a file differs")
    parser.add_argument("--nvcc", type=Path, default=wheel_nvcc(), help="default: that of the wheels")
    options = parser.parse_args()
    if options.nvcc is None:
        parser.error("no nvcc: pip install nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-runtime")
    differing = 0
    for name, variant in VARIANTS.items():
        file, text = SOURCE.with_name(f"{name}.ptx"), compiled(options.nvcc, *variant)
        if not file.exists() or file.read_text() != text:
            differing += 1
            print(f"{file.name}: {'differs' if options.check else 'written'}")
            if not options.check:
                file.write_text(text)
    return int(options.check and differing > 0)


if __name__ == "__main__":
    sys.exit(main())
