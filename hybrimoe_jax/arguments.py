"""What callers hand over, checked: each function takes an argument's name and value, and returns it as a plain one.

Numbers of NumPy and of other libraries are numbers. UserError, naming the argument, for what is something else or out
of range: True is no number, 2.5 no count, None and NaN are nothing at all.
"""

from __future__ import annotations

import difflib
import errno
import functools
import inspect
import math
import numbers
import operator
import os
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

from hybrimoe_jax.errors import UserError, shown

T = TypeVar("T")

MOST = 2**63 - 1
"""Counts above it are slips of the keyboard, and more than arrays take."""
MOST_WORKERS, WORKERS_A_CORE = 64, 8
"""Threads or processes that may be asked for: many more than there are cores make the start take minutes."""


def whole(name: str, value: Any, least: int | None = None, most: int | None = MOST) -> int:
    """A whole number within `least`..`most`; 4.0 is one, too."""
    found = index(value)
    if found is None:
        inexact = _real(value)
        if inexact is None or not inexact.is_integer():
            raise UserError(f"{name} {shown(value)} is no whole number")
        found = int(inexact)
    if least is not None and found < least:
        raise UserError(f"{name} {shown(found)} must be at least {least}")
    if most is not None and found > most:
        raise UserError(f"{name} {shown(found)} must be at most {most}")
    return found


def workers(name: str, value: Any) -> int:
    """How many threads or processes are started: not far more than there are cores."""
    cores = os.cpu_count() or 1
    count, most = whole(name, value, 1), max(MOST_WORKERS, WORKERS_A_CORE * cores)
    if count > most:
        raise UserError(f"{name} {count}: this machine has {cores} cores; at most {most} are started")
    return count


def number(name: str, value: Any) -> float:
    """A finite number."""
    found = _real(value)
    if found is None or not math.isfinite(found):
        raise UserError(f"{name} {shown(value)} is no {'finite ' if found is not None else ''}number")
    return found


def flag(name: str, value: Any) -> bool:
    """True or False, NumPy's too."""
    if isinstance(value, bool) or _is_bool(value):
        return bool(value)
    raise UserError(f"{name} {shown(value)} is neither True nor False")


def text(name: str, value: Any) -> str:
    """A text."""
    if not isinstance(value, str):
        raise UserError(f"{name} {shown(value)} is no text")
    return str.__str__(value)  # an enumeration's own `str` is its name


def choice(name: str, value: Any, known: Collection[str]) -> str:
    """One of the `known` texts."""
    if not isinstance(value, str) or value not in known:
        raise UserError(f"{name} {shown(value)} is unknown; choose one of {', '.join(known)}")
    return str.__str__(value)


def path(name: str, value: Any) -> str:
    """A file or folder, as a text or a `Path`."""
    found = os.fspath(value) if isinstance(value, os.PathLike) else value
    try:
        fine = isinstance(found, str) and found and "\0" not in found and os.fsencode(found)
        if fine:
            os.lstat(found)
    except UnicodeEncodeError:
        fine = False
    except OSError as error:
        fine = error.errno != errno.ENAMETOOLONG
    if not fine:
        raise UserError(f"{name} {shown(value)} is no file or folder; give its path")
    if not os.path.isabs(found):
        try:
            os.getcwd()
        except OSError:
            raise UserError(f"{name} {shown(value)}: the current folder is gone; change into another one") from None
    return str.__str__(found)


def several(name: str, value: Any, one: type | tuple[type, ...]) -> list[Any]:
    """A list of what is given; a single one of kind `one`, or an array without a dimension, stands for a list of it."""
    value = value if isinstance(value, one) else plain(name, value)
    if isinstance(value, one):
        return [value]
    if not isinstance(value, Iterable) or isinstance(value, (str, *NO_LISTS)):
        raise UserError(f"{name} {shown(value)} is neither one of them nor a list")
    return list(value)


def names(what: str, given: Iterable[str], known: Collection[str], kind: str = "") -> None:
    """UserError for a name that is none of the `known` ones; `kind`: what it would be the name of, with a space."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1) if isinstance(name, str) else ()
            meant = f"did you mean {near[0]}?" if near else f"known: {', '.join(known) or 'none'}"
            raise UserError(f"{what} has no {kind}{shown(name)} ({meant})")


def named_fields(cls: type[T]) -> type[T]:
    """The dataclass, whose constructor refuses a name that is no field as `names` does."""
    make, known = cls.__init__, list(inspect.signature(cls).parameters)

    @functools.wraps(make)
    def checked(self: T, *args: Any, **fields: Any) -> None:
        names(cls.__name__, fields, known)
        make(self, *args, **fields)

    cls.__init__ = checked
    return cls


NO_LISTS = (Mapping, bytes, bytearray, memoryview)
"""What can be walked through, and stands for one thing all the same."""
NO_NUMBERS = ("datetime", "timedelta", "void", "record")
"""How the names of those types of NumPy begin whose values turn into whole numbers, but are none."""


def plain(name: str, value: Any) -> Any:
    """What an array or a table holds, whoever's it is, as lists of Python's own values; anything else as it is."""
    if isinstance(value, (str, *NO_LISTS)) or not (hasattr(value, "tolist") or hasattr(value, "__array__")):
        return value
    try:
        if not dtype_name(value).startswith(NO_NUMBERS):
            return value.tolist() if hasattr(value, "tolist") else value.__array__().tolist()
    except (TypeError, ValueError, RuntimeError):  # an array without values, or one that is not held as rows
        pass
    raise UserError(f"{name}: {shown(value)} cannot be read; give a list")


def is_scalar_array(value: Any) -> bool:
    """Whether it is what an array library calls a scalar, whatever it holds."""
    return hasattr(value, "dtype") and getattr(value, "ndim", 1) == 0


def dtype_name(value: Any) -> str:
    """What an array library calls the type of its elements, as in "int64" or "torch.bfloat16"; "" for no array."""
    dtype = getattr(value, "dtype", "")
    return str(getattr(dtype, "name", dtype))


def index(value: Any) -> int | None:
    """A whole number of whatever library; None for anything else, a truth value, a duration and 4.0 among them."""
    if type(value) is int:
        return value
    try:
        return operator.index(value) if _is_number(value) else None
    except (TypeError, RuntimeError):  # torch's for a tensor without values
        return None


def _is_bool(value: Any) -> bool:
    return is_scalar_array(value) and "bool" in dtype_name(value)


def _is_number(value: Any) -> bool:
    """No text, truth value or duration, nothing masked, no array with a dimension."""
    if hasattr(value, "dtype"):
        return is_scalar_array(value) and bool(_NUMBERS.match(dtype_name(value))) and not getattr(value, "mask", False)
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


_NUMBERS = re.compile(r"(\w+\.)?(u?int|b?float|longdouble)\d*")


def _real(value: Any) -> float | None:
    try:
        return float(value) if _is_number(value) else None
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
