"""What commands turn into one line on stderr: bad input (exit code 2), and a device that does not do its part (1).

What a message quotes out of a file or from a caller goes through `shown` (a value) or `shown_name` (a name).
"""

from __future__ import annotations

import contextlib
import os
import reprlib
from collections.abc import Iterator
from typing import Any

LONGEST_MESSAGE, LONGEST_NAME, LONGEST_VALUE = 1500, 200, 100  # characters


class _Short(reprlib.Repr):
    """`repr` of the first of a value's parts, with the number of them where some are left out."""

    def __init__(self, characters: int):
        super().__init__()
        self.maxlevel, self.maxdict, self.maxother, self.characters = 3, self.maxlist, characters, characters

    def repr_str(self, x: str, level: int) -> str:
        return self._cut(repr(x[: self.characters]), len(x), "characters")

    def repr_bytes(self, x: bytes, level: int) -> str:
        return self._cut(repr(x[: self.characters]), len(x), "bytes")

    def repr_int(self, x: int, level: int) -> str:
        fits = x.bit_length() < 3 * self.characters  # past some thousand digits `repr` refuses
        return repr(x) if fits else f"an integer of {x.bit_length():,} bits"

    def _cut(self, start: str, length: int, unit: str) -> str:
        return start if length <= self.characters else f"{start}... ({length:,} {unit})"


def printable(text: str) -> str:
    """`text` with control characters, lone surrogates and what turns a terminal's writing round as their escapes."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def shown(value: Any, characters: int = LONGEST_VALUE) -> str:
    """A value as a message quotes it: like `repr`, printable, in one line, and cut, with its length, where it is long.

    Takes whatever a file or a caller can give: megabytes, deep nesting, an object that has no `repr`.
    """
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    value = str.__str__(value) if isinstance(value, str) else value  # that of NumPy has another repr
    short = _Short(characters)
    many = isinstance(value, (list, tuple, dict)) and len(value) > short.maxlist
    text = _cut(short.repr(value).replace("\n", " "), 5 * characters)
    return printable(f"{text} ({len(value):,} items)" if many else text)


def shown_name(value: Any) -> str:
    """The name of a tensor, a key or a model as it is; like `shown` where it is long, not printable or no text."""
    return value if is_name(value) else shown(value)


def said(error: BaseException, characters: int = 300) -> str:
    """What kind of error it is and what it says, as a message quotes it."""
    return printable(_cut(": ".join(filter(None, (type(error).__name__, " ".join(str(error).split())))), characters))


def is_name(value: Any) -> bool:
    """Whether something is a text that fits in a table: printable, and neither empty nor long."""
    return isinstance(value, str) and value.isprintable() and 0 < len(value) <= LONGEST_NAME


def _cut(text: str, most: int, end: int = 0) -> str:
    """The beginning, and `end` characters of the end."""
    if len(text) <= most:
        return text
    return f"{text[: most - end]}... ({len(text):,} characters)" + (f" ...{text[-end:]}" if end else "")


def _message(text: str) -> str:
    """One line, printable, and cut in the middle: the beginning says where, the end what to do."""
    return printable(_cut(" ".join(text.splitlines()), LONGEST_MESSAGE, LONGEST_MESSAGE // 5))


class UserError(ValueError):
    """Something the caller can put right. The message says what was wrong, where, and what to do.

    It is one line, printable and of a bounded length, whatever it quotes.
    """

    def __str__(self) -> str:
        return _message(super().__str__())


class RuleError(UserError):
    """A cache policy, a scheduler or a predictor broke its contract. The step has ended; nothing of it is kept.

    Args: rule: its name; method: of its class; broken: what it did, with an example; layer: the MoE layer, where
      known.
    """

    def __init__(self, rule: str, method: str, broken: str, layer: int | str | None = None):
        super().__init__(rule, method, broken, layer)
        self.rule, self.method, self.broken, self.layer = rule, method, broken, layer

    def __str__(self) -> str:
        where = "" if self.layer is None else f", layer {self.layer}"
        return _message(f"{self.rule}{where}: {self.method} {self.broken}")


class DeviceError(RuntimeError):
    """The device did not do what it was given. The step has ended; the engine can try the next one."""


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Turns what a value of the wrong kind raises in the block into a UserError: `what` cannot be read.

    The block is where it is used first, wherever that may be.
    """
    try:
        yield
    except UserError:
        raise
    except (TypeError, AttributeError, LookupError, ValueError, ArithmeticError, RecursionError) as error:
        raise UserError(f"{what} cannot be read: a value in it is malformed ({said(error)})") from error
