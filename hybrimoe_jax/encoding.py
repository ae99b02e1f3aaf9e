"""Text at the border: where bytes become text, and text becomes bytes.

What comes in (files, standard input, arguments) is UTF-8 in every locale, with or without a byte order mark, and its
lines end in a line feed. It is refused where it is not: a wrong character would change what a model is asked. What goes
out is in the stream's own encoding; a character that it lacks is written as its escape.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import select
import stat
import sys
from typing import IO

from hybrimoe_jax.errors import UserError, printable, shown

LONGEST_TEXT = 1 << 29
"""Bytes of a text at most: what is longer is no text, /dev/zero for one."""
PATIENCE_S = 10.0
"""How long a pipe may stay without anybody at its other end."""

CONTROLS = {number: printable(chr(number)) for number in (*range(32), *range(127, 160)) if chr(number) not in "\n\t"}


def decode(data: bytes, where: str) -> str:
    """Bytes from outside as text. UserError, beginning with `where`, that names the first byte which is not UTF-8."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{where}: it is UTF-16 text; save it as UTF-8")
    text = _from_utf8(data, where).removeprefix("\ufeff")
    return check_text(text.replace("\r\n", "\n").replace("\r", "\n"), where)


def argument(text: str, where: str) -> str:
    """Text of a command line, which came as bytes in whatever the locale is; UserError where it is not UTF-8."""
    with contextlib.suppress(UnicodeEncodeError):
        text = _from_utf8(os.fsencode(text), where)
    return check_text(text, where)


def _from_utf8(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        found = f"byte {error.start} ({data[error.start]:#04x}) is not UTF-8 text"
    raise UserError(f"{where}: {found}; save it as UTF-8")


def check_text(text: str, where: str) -> str:
    """The text, where it can be a prompt. UserError for what is no character: half a surrogate pair, or NUL."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: character {error.start} ({shown(text[error.start])}) is half a surrogate pair, no text; "
            "write the whole character"
        ) from None
    if "\0" in text:
        raise UserError(f"{where}: character {text.index(chr(0))} is NUL, so it is no UTF-8 text; save it as UTF-8")
    return text


def read_text(path: str | os.PathLike[str], where: str = "", most: int | None = None) -> str:
    """A text file, or what a pipe gives, of at most so many bytes (default: LONGEST_TEXT).

    UserError, beginning with `where` (default: the path), where there is none.
    """
    return decode(read_bytes(path, where, LONGEST_TEXT if most is None else most), where or f"{path}")


def read_bytes(path: str | os.PathLike[str], where: str = "", most: int = LONGEST_TEXT) -> bytes:
    """The bytes of a file that is read as a whole, at most so many; UserError where it cannot be."""
    where = where or f"{path}"
    try:
        with open(path, "rb", opener=_opened) as file:
            return _limited(file, where, most)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{where}: no such file") from None
    except (OSError, ValueError) as error:  # NUL in a path is a ValueError
        raise _unreadable(where, error) from None


def read_stdin() -> str:
    """All of standard input; UserError where it is closed, cannot be read or is no text."""
    where = "standard input"
    if sys.stdin is None:
        raise UserError(f"{where}: it is closed; give the text as an argument")
    try:
        if not hasattr(sys.stdin, "buffer"):
            return check_text(sys.stdin.read(), where)
        return decode(_limited(sys.stdin.buffer, where, LONGEST_TEXT), where)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise _unreadable(where, error) from None


def _limited(file: IO[bytes], where: str, most: int) -> bytes:
    data = bytearray()
    while part := file.read(1 << 20):
        data += part
        if len(data) > most:
            raise UserError(f"{where}: it is longer than {most >> 20} MiB, the most that is read; give the right file")
    return bytes(data)


def _unreadable(where: str, error: Exception) -> UserError:
    return UserError(f"{where}: cannot be read ({getattr(error, 'strerror', None) or error})")


def _opened(path: str, flags: int) -> int:
    """A descriptor; a named pipe into which nobody writes does not hold the program for ever."""
    file = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    if stat.S_ISFIFO(os.fstat(file).st_mode) and not path.startswith(("/dev/fd/", "/proc/")):
        waiting = select.poll()
        waiting.register(file, select.POLLIN)
        if not waiting.poll(1e3 * PATIENCE_S):
            os.close(file)
            raise OSError(None, f"a pipe into which nobody has written for {PATIENCE_S:.0f} s", path)
    os.set_blocking(file, True)
    return file


def prepare_streams() -> None:
    """Has standard output and error take any text, and keeps the three standard descriptors from other files.

    A closed one would be given to the next file that is opened, and what a library prints would go into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            _occupy(number)
            if name == "stderr":
                sys.stderr = open(os.devnull, "w")
        elif isinstance(stream, io.TextIOWrapper):
            if number and stream.errors in ("strict", "surrogateescape"):
                stream.reconfigure(errors="backslashreplace")
            with contextlib.suppress(OSError, ValueError):
                os.set_blocking(stream.fileno(), True)  # another program can have made the pipe one that does not wait


def _occupy(number: int) -> None:
    with contextlib.suppress(OSError):
        os.fstat(number)
        return
    file = os.open(os.devnull, os.O_RDWR)
    if file != number:
        os.dup2(file, number)
        os.close(file)


def say(text: str) -> None:
    """A line on standard error, printable. Where nobody can be told, nothing."""
    show(printable(text) + "\n")


def show(text: str) -> None:
    """The same of a text as it is, which may move a terminal's cursor."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(text)
        sys.stderr.flush()


def for_stream(text: str, stream: IO[str]) -> str:
    """A model's text as it is; on a terminal without control characters, which could do anything with it."""
    return text.translate(CONTROLS) if stream.isatty() else text
