"""Builds the native host kernels, a plain shared library, if there is a C++ compiler; without one the package installs
all the same and says so. Everything else about the package is in pyproject.toml.

Each file of an instruction set is compiled with its own flags, and the library chooses among them at run time, so that
what is built on one machine runs on another: never -march=native.
"""

import os
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FOLDER = Path("host_kernels/native")
SOURCES = ["experts.cpp", "team.cpp", "isa_portable.cpp", "isa_avx2.cpp", "isa_avx512.cpp"]
HEADERS = ["experts.h", "team.h", "kernels.inc"]
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-fPIC", "-g0", "-pthread"]
ISA_FLAGS = {"isa_avx2.cpp": ["-mavx2", "-mfma"], "isa_avx512.cpp": ["-mavx512f", "-mfma"]}


class BuildNative(build_ext):
    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"  # no Python in it, so none in its name

    def get_export_symbols(self, ext):
        return []

    def build_extension(self, ext):
        objects = []
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        for source in ext.sources:
            own = ISA_FLAGS.get(Path(source).name, []) if x86 else []
            objects += self.compiler.compile([source], self.build_temp, depends=ext.depends, extra_postargs=FLAGS + own)
        file = self.get_ext_fullpath(ext.name)
        self.compiler.link_shared_object(objects, file, extra_postargs=["-pthread"], target_lang="c++")


setup(
    ext_modules=[
        Extension(
            "hybrimoe_jax.host_kernels.native.libexperts",
            sources=[str(FOLDER / name) for name in SOURCES],
            depends=[str(FOLDER / name) for name in HEADERS],
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
