"""Builds the native host kernels, a plain shared library, if there is a C++ compiler.

Without one the package installs all the same and says so. Everything else about the package is in pyproject.toml.

Each file of an instruction set is compiled with its own flags, and the library chooses among them at run time, so that
what is built on one machine runs on another: never -march=native.

The handlers for jitted programs (ffi*.cpp) need XLA's headers, which come with jaxlib; without them they are left out.
"""

import hashlib
import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
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
HANDLERS = ["ffi.cpp", "ffi_attention.cpp", "ffi_pace.cpp", "ffi_routed.cpp"]
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
BEST_FIRST = {
    "avx512_vnni": ["isa_avx512vnni.cpp", "isa_avx512vl.cpp"],
    "avx512f": ["isa_avx512.cpp"],
    "avx_vnni": ["isa_avxvnni.cpp"],
}
"""By a processor's flag the files that it runs; AVX2 and portable code is built for all."""
ONLY_HERE = "HYBRIMOE_NATIVE_ONLY_HERE"
"""Set in the environment: a quick build. Instruction sets that this processor would not choose are left out."""


OBJECTS = Path("build/objects")
"""Objects stay here between builds, each under a hash of its compiler, flags and preprocessed text."""
SECONDS = {"isa": 14, "ffi": 5}
"""What a file of this kind takes on one core of an AVX2 machine with gcc 12; all others take less than one."""


def xla_headers():
    """XLA's headers, found without importing jaxlib (which would load all of XLA); None where there are none."""
    found = importlib.util.find_spec("jaxlib")
    places = [] if found is None else [Path(place) / "include" for place in found.submodule_search_locations]
    return next((str(place) for place in places if place.is_dir()), None)


def seconds(source, own):
    """`own`: its own flags; without them the file of an instruction set is nearly empty."""
    kind = Path(source).stem.partition("_")[0]
    empty = kind == "isa" and not own and Path(source).name in ISA_FLAGS
    return 0.5 if empty else SECONDS.get(kind, 0.5)


def left_out():
    """Files of instruction sets that the library goes without."""
    if not os.environ.get(ONLY_HERE) or not os.path.exists("/proc/cpuinfo"):
        return set()
    flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\nflags")[2].partition("\n")[0].split())
    best = next((flag for flag in BEST_FIRST if flag in flags), None)
    return {name for flag, names in BEST_FIRST.items() for name in names if flag != best}


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class BuildNative(build_ext):
    """Compiles the library for every instruction set, or leaves it out."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"  # no Python in it, so none in its name

    def get_export_symbols(self, ext):
        return []

    def build_extension(self, ext):
        x86, self.xla = platform.machine().lower() in ("x86_64", "amd64"), xla_headers()
        isas = {name: flags for name, flags in ISA_FLAGS.items() if x86 and name not in left_out()}
        own = {source: isas.get(Path(source).name, []) for source in ext.sources}
        if self.xla is None:
            self.warn("no jaxlib to build with: jitted programs will not call the native kernels")
        else:
            own |= {str(FOLDER / name): ["-isystem", self.xla] for name in HANDLERS}
        sources = sorted(own, key=lambda source: seconds(source, own[source]), reverse=True)  # the longest first
        with ThreadPoolExecutor(cores()) as pool:
            places = dict(zip(sources, pool.map(lambda source: self.place(source, own[source]), sources)))
            missing = [source for source in sources if not (places[source] and places[source].exists())]
            if missing:
                work = sum(seconds(source, own[source]) for source in missing)
                time = f"about {work / cores():.0f} s on {cores()} idle cores"
                files = f"{len(missing)} of {len(sources)} files"
                print(f"* building the native kernels: {files}, {time}", file=sys.stderr, flush=True)
            objects = pool.map(lambda source: self.object(source, own[source], places[source]), sources)
            objects = [str(place) for place in objects if place]
        file = self.get_ext_fullpath(ext.name)
        self.compiler.link_shared_object(objects, file, extra_postargs=["-pthread"], target_lang="c++")

    def place(self, source, own):
        """Where the object is kept; None where the compiler does not take these flags."""
        command = [*getattr(self.compiler, "compiler_so_cxx", ["c++"]), *FLAGS, *own]
        try:
            text = subprocess.run([*command, "-E", "-P", source], capture_output=True)
            version = subprocess.run([*command, "--version"], capture_output=True).stdout
        except OSError as error:
            raise CompileError(f"no C++ compiler: {error}") from None
        if text.returncode:
            return None
        everything = repr(command).encode() + version + text.stdout
        known = hashlib.sha256(everything.replace(str(self.xla).encode(), b"xla"))  # another path for every build
        return OBJECTS / f"{Path(source).stem}-{known.hexdigest()[:24]}.o"

    def object(self, source, own, place):
        """The object of a file, kept or compiled; None where the library goes without."""
        try:
            return self.compiled(source, own, place)
        except CompileError as error:
            if not own:
                raise
            if Path(source).name in HANDLERS:
                self.warn(f"{source}: does not compile ({error}): jitted programs will not call the native kernels")
                return None
            print(f"{source}: this compiler does not know {' '.join(own)}; the library goes without", file=sys.stderr)
            return self.compiled(source, [], self.place(source, []))

    def compiled(self, source, own, place):
        if place is None:
            raise CompileError(f"{source}: the compiler refuses {' '.join([*FLAGS, *own])}")
        if not place.exists():
            OBJECTS.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=OBJECTS) as work:
                (made,) = self.compiler.compile([source], work, extra_postargs=[*FLAGS, *own])
                os.replace(made, place)
        return place


# Not to have a folder of the package's name beside one: here it is the package.
warnings.filterwarnings("ignore", message="Editable installation")

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
