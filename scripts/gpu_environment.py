"""`python scripts/gpu_environment.py`: what is installed, and what jax finds.

Exit code 1 where a needed package is missing.
"""

from __future__ import annotations

import argparse
import importlib.metadata as metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

from gpu_report import report

NEEDED = ("jax", "jaxlib", "flax", "orbax-checkpoint", "tensorstore", "numpy", "ml_dtypes", "chex", "optax")
NEEDED += ("tokenizers", "jinja2", "safetensors", "threadpoolctl")
WANTED = ("pytest", "hypothesis", "onednn-cpu-gomp", "jax-cuda13-pjrt", "jax-cuda12-pjrt")


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def main() -> int:
    top = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    top.add_argument("--json", type=Path, help="where the figures go")
    args = top.parse_args()
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        print(subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip())
    except OSError:
        print("no nvidia-smi")
    found = {name: version(name) for name in (*NEEDED, *WANTED)}
    print("python", platform.python_version(), "cores", os.cpu_count(), found)
    import jax

    from hybrimoe_jax.host_kernels import get_kernel

    device = jax.devices()[0]
    about = {"device": device.device_kind, "platform": device.platform, "jax": jax.__version__}
    kernel = get_kernel("auto").describe()
    print(about, "memories", sorted(m.kind for m in device.addressable_memories()), device.memory_stats())
    print("host kernel", kernel)
    if device.platform == "cpu":
        print("jax finds no GPU: everything runs on the CPU backend, and decides nothing")
    report(args.json, {"environment": {**found, "host kernel": kernel}}, about)
    missing = [name for name in NEEDED if found[name] is None]
    print("missing:", missing or "nothing that is needed")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
