"""An H100 that is only described: programs are compiled for it on a machine without a GPU. Nothing runs.

XLA's GPU compiler needs a description of the chip, its own plugin, `ptxas` and `libdevice`. All three come as wheels
(the extra `gpu-aot`). `prepare` must be called before jax is imported. It hides a CUDA toolkit that is installed, so
that what compiles here compiles with the wheels alone.

The description is not read from a device. Its numbers are the data sheet's.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import warnings
from pathlib import Path

TOOLKIT_PROGRAMS = ("ptxas", "nvcc", "nvlink", "fatbinary")
TOOLKIT_VARIABLES = ("CUDA_HOME", "CUDA_PATH", "CUDA_DIR", "CUDA_ROOT", "CUDACXX")

H100 = """gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 l2_cache_size: 52428800
clock_rate_ghz: 1.98 shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
registers_per_core_limit: 65536 registers_per_block_limit: 65536
memory_bandwidth: 3352320000000 device_memory_size: 84978434048 }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 } runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""A GpuTargetConfigProto in text form: 132 multiprocessors, 80 GB of HBM3 at 3.35 TB/s."""


def wheels() -> Path | None:
    """The folder of `nvidia-cuda-nvcc`, with `bin/ptxas` and `nvvm/libdevice`; None where it is not installed."""
    found = importlib.util.find_spec("nvidia")
    for place in (found.submodule_search_locations or []) if found else []:
        for folder in sorted(Path(place).glob("cu1*")):
            if (folder / "bin/ptxas").is_file() and list((folder / "nvvm/libdevice").glob("libdevice.*.bc")):
                return folder
    return None


def missing() -> str | None:
    """What keeps programs from being compiled for a GPU, in a line; None where nothing does."""
    plugins = importlib.util.find_spec("jax_plugins")
    places = (plugins.submodule_search_locations or []) if plugins else []
    if not any(Path(place, "xla_cuda13").is_dir() for place in places):
        return "jax-cuda13-pjrt is not installed (pip install '.[gpu-aot]', or `make test-gpu-aot`)"
    if wheels() is None:
        return "nvidia-cuda-nvcc is not installed (pip install '.[gpu-aot]', or `make test-gpu-aot`)"
    return None


def prepare() -> None:
    """Sets this process up to compile for a GPU that is not there, with the wheels' tools and no others."""
    assert "jaxlib" not in sys.modules, "topology.prepare must come before jax is imported"
    folder = wheels()
    assert folder is not None, missing()
    for name in TOOLKIT_VARIABLES:
        os.environ.pop(name, None)
    paths = os.environ.get("PATH", "").split(os.pathsep)
    os.environ["PATH"] = os.pathsep.join(p for p in paths if not any(Path(p, t).exists() for t in TOOLKIT_PROGRAMS))
    os.environ["JAX_PLATFORMS"] = "cpu"  # else jax looks for a GPU
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    flags = os.environ.get("XLA_FLAGS", "").split()
    flags += ["--xla_gpu_autotune_level=0", f"--xla_gpu_cuda_data_dir={folder}"]  # autotuning would need a device
    os.environ["XLA_FLAGS"] = " ".join(flags)


@functools.cache
def sharding():
    """On one H100: what every argument's `jax.ShapeDtypeStruct` is given."""
    import jax
    from jax.experimental import topologies

    jax.devices()  # registers the installed plugin
    shape = {"topology_name": "h100", "topology": "1x1x1", "target_config": H100}
    return jax.sharding.SingleDeviceSharding(topologies.get_topology_desc(platform="cuda", **shape).devices[0])


def struct(shape: tuple[int, ...], dtype="float32"):
    """An array of the H100 that is only described."""
    import jax

    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding())


def compile_for_gpu(jitted, *args, **kwargs):
    """A jitted function compiled for arguments that are `struct`s: a `jax.stages.Compiled`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # donated arguments without a place
        return jitted.trace(*args, **kwargs).lower(lowering_platforms=("cuda",)).compile()
