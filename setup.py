"""Builds the native host kernels, a plain shared library, if there is a C++ compiler; without one the package installs
all the same and says so. Everything else about the package is in pyproject.toml.

Each file of an instruction set is compiled with its own flags, and the library chooses among them at run time, so that
what is built on one machine runs on another: never -march=native.

The handlers for jitted programs (ffi*.cpp) need XLA's headers, which come with jaxlib; without them they are left out.
"""

import importlib.util
import os
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

FOLDER = Path("hybrimoe_jax/host_kernels/native")
ISAS = ["portable", "avx2", "avxvnni", "avx512", "avx512vl", "avx512vnni"]
PARTS = ["attention", "experts", "layout", "probe", "product", "routed", "rows", "run", "team", "wave"]
SOURCES = [f"{name}.cpp" for name in [*PARTS, *(f"isa_{name}" for name in ISAS)]]
HEADERS = ["attention.h", "experts.h", "layout.h", "rows.h", "run.h", "team.h", "wave.h"]
ARITHMETIC = ["kernels", "vectors", "silu", "probes", "lanes"]
ARITHMETIC += ["plain", "plain_tile", "plain_few", "plain_chunks", "plain_panels"]
ARITHMETIC += ["packed", "packed_parts", "packed_stream", "packed_block", "attention"]
HEADERS += [f"{name}.inc" for name in ARITHMETIC]
HANDLERS = ["ffi.cpp", "ffi_attention.cpp", "ffi_routed.cpp"]
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-fPIC", "-g0", "-pthread"]
# gcc 12 takes the undefined operands inside its own AVX-512 headers for a mistake.
FLAGS += ["-Wno-maybe-uninitialized", "-Wno-unused-function"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f"]
VNNI = [*AVX512, "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"]
ISA_FLAGS = {
    "isa_avx2.cpp": AVX2,
    "isa_avxvnni.cpp": [*AVX2, "-mavxvnni"],
    "isa_avx512.cpp": AVX512,
    "isa_avx512vl.cpp": VNNI,
    "isa_avx512vnni.cpp": VNNI,
}


def xla_headers():
    """The folder of XLA's headers, asked without importing jaxlib (which would load all of XLA); None where there is none."""
    found = importlib.util.find_spec("jaxlib")
    places = [] if found is None else [Path(place) / "include" for place in found.submodule_search_locations]
    return next((str(place) for place in places if place.is_dir()), None)


class BuildNative(build_ext):
    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"  # no Python in it, so none in its name

    def get_export_symbols(self, ext):
        return []

    def compile(self, ext, source, flags):
        return self.compiler.compile([source], self.build_temp, depends=ext.depends, extra_postargs=flags)

    def build_extension(self, ext):
        objects = []
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        for source in ext.sources:
            own = ISA_FLAGS.get(Path(source).name, []) if x86 else []
            try:
                objects += self.compile(ext, source, FLAGS + own)
            except CompileError:
                if not own:
                    raise
                print(f"{source}: this compiler does not know {' '.join(own)}; the library goes without")
                objects += self.compile(ext, source, FLAGS)
        objects += self.handlers(ext)
        file = self.get_ext_fullpath(ext.name)
        self.compiler.link_shared_object(objects, file, extra_postargs=["-pthread"], target_lang="c++")

    def handlers(self, ext):
        """The objects of the handlers, or none where the headers are absent or not for this compiler."""
        headers = xla_headers()
        if headers is None:
            self.warn("no jaxlib to build with: jitted programs will not call the native kernels")
            return []
        try:
            sources, flags = [str(FOLDER / name) for name in HANDLERS], [*FLAGS, "-isystem", headers]
            return self.compiler.compile(sources, self.build_temp, depends=ext.depends, extra_postargs=flags)
        except CompileError as error:
            self.warn(f"the FFI handlers do not compile ({error}): jitted programs will not call the native kernels")
            return []


setup(
    ext_modules=[
        Extension(
            "hybrimoe_jax.host_kernels.native.libexperts",
            sources=[str(FOLDER / name) for name in SOURCES],
            depends=[str(FOLDER / name) for name in [*HEADERS, *HANDLERS]],
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
