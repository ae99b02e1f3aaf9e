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
    found = _index(value)
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
    return str(value)


def choice(name: str, value: Any, known: Collection[str]) -> str:
    """One of the `known` texts."""
    if not isinstance(value, str) or value not in known:
        raise UserError(f"{name} {shown(value)} is unknown; choose one of {', '.join(known)}")
    return str(value)


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
    return found


def several(name: str, value: Any, one: type | tuple[type, ...]) -> list[Any]:
    """A list of what is given; a single one of kind `one` stands for a list of it."""
    if isinstance(value, one):
        return [value]
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Mapping)):
        raise UserError(f"{name} {shown(value)} is neither one of them nor a list")
    return list(value)


def names(what: str, given: Iterable[str], known: Collection[str], kind: str = "") -> None:
    """UserError for a name that is none of the `known` ones; `kind`: what it would be the name of, with a space."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
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


def _is_bool(value: Any) -> bool:
    return "bool" in str(getattr(value, "dtype", "")) and getattr(value, "ndim", 1) == 0


def _is_scalar(value: Any) -> bool:
    """A number, or what an array library calls a scalar: no text, no truth value, no array with a dimension."""
    if isinstance(value, bool) or _is_bool(value):
        return False
    return isinstance(value, numbers.Real) or (hasattr(value, "dtype") and getattr(value, "ndim", 1) == 0)


def _index(value: Any) -> int | None:
    try:
        return operator.index(value) if _is_scalar(value) else None
    except TypeError:
        return None


def _real(value: Any) -> float | None:
    try:
        return float(value) if _is_scalar(value) else None
    except (TypeError, ValueError, OverflowError):
        return None
