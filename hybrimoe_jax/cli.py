"""What every command shares: errors as one line, exit codes, a progress bar.

Exit codes: 0 done, 2 bad input (argparse's own code too), 130 interrupted, 141 the reader of a pipe went away.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import NoReturn, TypeVar

from hybrimoe_jax.errors import UserError

T = TypeVar("T")


def run(main: Callable[[], int | None]) -> NoReturn:
    """Runs a command's `main` and exits; bad input becomes one line on stderr, never a traceback."""
    try:
        code = main() or 0
        sys.stdout.flush()
    except UserError as error:
        code = fail(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes again at exit
        code = 141
    except OSError as error:
        if error.filename is None or error.strerror is None:
            raise
        code = fail(f"{error.filename}: {error.strerror}")
    sys.exit(code)


class Parser(argparse.ArgumentParser):
    """Refuses a command line in one line, as any other bad input is refused; argparse alone prints the whole usage first."""

    def error(self, message: str) -> NoReturn:
        sys.exit(fail(f"{message} (see {self.prog} --help)"))


def fail(message: str) -> int:
    """Prints `error: message` as one line on stderr and returns exit code 2."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2


def progress(items: Iterable[T], total: int, label: str) -> Iterator[T]:
    """Yields `items`, showing a bar on stderr while it is a terminal."""
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, description=label, total=total, console=Console(stderr=True), transient=True)


def lookahead(text: str) -> int | str:
    """The value of a `--lookahead` flag: a number of layers, or "adaptive"."""
    return text if text == "adaptive" else int(text)
