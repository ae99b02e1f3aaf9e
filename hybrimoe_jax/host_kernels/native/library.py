"""Finding and loading the compiled library.

It lies beside this file where the installation had a C++ compiler. HYBRIMOE_NATIVE_LIBRARY names another file instead
(one built for debugging; one that does not exist switches the kernel off).
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
from pathlib import Path

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.layout import GROUPS, Format

VARIABLE = "HYBRIMOE_NATIVE_LIBRARY"
FILE = Path(__file__).with_name("libexperts.so")
PLAIN = {"float32": 0, "bfloat16": 1}
"""The library's numbers of unpacked formats, by the name of the dtype; `format_code` gives the others'."""
_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_int64


def path() -> Path:
    return Path(os.environ.get(VARIABLE) or FILE)


def available() -> bool:
    """Whether the library is there (it may still fail to load, with a UserError that says why)."""
    return path().is_file()


@functools.cache
def library() -> ctypes.CDLL:
    """The library with its argument types declared; see experts.h. UserError where it is absent or does not load."""
    file = path()
    if not file.is_file():
        raise UserError(
            f"host kernel 'native' needs {file}, which is not there: the package was installed without a C++ compiler; "
            "install one and then the package again, or use 'auto'"
        )
    try:
        found = ctypes.CDLL(str(file))
        found.experts_run.argtypes = [
            *(_INTEGER, _INTEGER, _POINTER, _INTEGER, _INTEGER, _POINTER),
            *(_POINTER, _POINTER, _POINTER, _POINTER, _INTEGER),
        ]
        found.experts_run_one.argtypes = [
            *(_INTEGER, _INTEGER, _POINTER, _INTEGER, _POINTER, _POINTER, _POINTER, _INTEGER)
        ]
        found.matrix_run.argtypes = [*[_INTEGER] * 4, _POINTER, _INTEGER, _POINTER, _POINTER, _INTEGER]
        found.matrix_bytes.argtypes, found.matrix_bytes.restype = [_INTEGER] * 3, _INTEGER
        found.probe_read.argtypes = [_INTEGER, _POINTER, *[_INTEGER] * 3]
        found.probe_arithmetic.argtypes = [_INTEGER] * 3
        found.probe_read.restype = found.probe_arithmetic.restype = _INTEGER
        found.experts_best_isa.restype = _INTEGER
        found.experts_isa.argtypes, found.experts_isa.restype = [_INTEGER], ctypes.c_char_p
        found.experts_silu_times.argtypes = [_INTEGER, _POINTER, _POINTER, _POINTER, _INTEGER]
        found.experts_silu_times.restype = found.experts_shutdown.restype = None
    except (OSError, AttributeError) as error:
        raise UserError(
            f"host kernel 'native': {file} does not load ({error}); install the package again, or use 'auto'"
        ) from None
    return found


def isas() -> dict[str, int]:
    """Instruction sets that the library has code for and this processor runs, best first, with their numbers."""
    numbers = itertools.count()
    names = iter(lambda: library().experts_isa(next(numbers)), None)
    return {name.decode(): number for number, name in enumerate(names) if name}


def format_code(format: Format) -> int:
    """The library's number of a packed format; see layout.h."""
    kind = 0 if format.bits == 8 else 2 if format.zeros else 1
    return 16 + kind + 3 * ((format.scale == "f32") + 2 * (format.a8 + 2 * GROUPS.index(format.group)))
