"""What every command shares: errors as one line, exit codes, a progress bar.

Exit codes: 0 done, 1 the device or the machine's memory failed, or this program did (a fault of its own keeps its
traceback), 2 bad input (argparse's own code too), 130 interrupted, 141 the reader of a pipe went away.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import gc
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn, TypeVar

from hybrimoe_jax import interrupts
from hybrimoe_jax.encoding import prepare_streams, say
from hybrimoe_jax.errors import DeviceError, UserError, printable, said
from hybrimoe_jax.files import check_outputs, check_writable, files_in
from hybrimoe_jax.interrupts import INTERRUPTED
from hybrimoe_jax.progress import track

T = TypeVar("T")


FAILED = 1
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


def run(main: Callable[[], int | None]) -> NoReturn:
    """Runs a command's `main` and exits; bad input and warnings are one line on stderr each, never a traceback."""
    warnings.formatwarning = lambda message, *_: printable(f"warning: {message}\n")
    prepare_streams()
    try:
        interrupts.gently()
        code = _run(main)
        interrupts.end_at_once()
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code == INTERRUPTED:
        interrupts.no_more()
        say("interrupted")
    if code in (FAILED, INTERRUPTED):
        # At once: threads of XLA may still run a program, or wait for one for ever. The interpreter's end would take
        # from under them what they read.
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
    gc.freeze()  # what jax and its modules hold goes with the process: looking through it takes half a second
    sys.exit(code)


def _run(main: Callable[[], int | None]) -> int:
    """The exit code, where what `main` raised has been said."""
    if sys.stdout is None:
        return fail("standard output is closed")
    try:
        code = main() or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        return fail(str(error))
    except BrokenPipeError:
        _forget_output()
        return 141
    except OSError as error:
        if error.filename is not None and error.strerror is not None:
            return fail(f"{error.filename}: {error.strerror}")
        if error.errno == errno.ENOENT and not error.filename and not _here():
            return fail("the current folder is gone; change into another one")
        if error.errno in UNWRITABLE:
            _forget_output()
            return fail(f"cannot write the output: {error.strerror}")
        _say_fault(error)
    except Exception as error:
        if _of_a_jax_setting(error):
            return fail(f"jax takes no such setting ({said(error)}); change or unset the environment variable")
        _say_fault(error)
    return FAILED


def _of_a_jax_setting(error: Exception) -> bool:
    """Whether jax refuses what it reads as it is imported: `JAX_...` in the environment."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return isinstance(error, ValueError) and frame.f_code.co_filename.endswith(
        "jax/_src/config.py".replace("/", os.sep)
    )


def _here() -> bool:
    with contextlib.suppress(OSError):
        return bool(os.getcwd())
    return False


def _say_fault(error: Exception) -> None:
    """A line where a device or the memory failed; the traceback where this program did."""
    if isinstance(error, MemoryError):
        fail(f"this machine's memory ran out ({said(error)}); end other programs, or take a smaller model or --lazy")
    elif isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        fail(f"the system gives this program no more threads or memory ({said(error)}); see ulimit -u and ulimit -v")
    elif isinstance(error, DeviceError):
        fail(str(error))
    elif isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
        fail(f"the device's memory ran out ({said(error)}); end what else uses it, or give it less to hold")
    else:
        say("".join(traceback.format_exception(error)))
        fail("that is a fault of this program and none of yours; please report it with the lines above")


def _forget_output() -> None:
    """Lets what is still to be written go nowhere: the interpreter flushes again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Parser(argparse.ArgumentParser):
    """Refuses a command line in one line, as any other bad input is refused.

    argparse alone prints the whole usage first.
    """

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file, flush=True)  # argparse alone is silent where it cannot be written

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """`--flag=--` is a value as any other: Python 3.11 drops it, and hands over an empty list."""
        if action.option_strings and arg_strings == ["--"]:
            value = self._get_value(action, "--")
            self._check_value(action, value)
            return value if action.nargs in (None, argparse.OPTIONAL) else [value]
        if action.metavar in ("DIR", "FILE") and "" in arg_strings:  # of a variable that is not set, mostly
            name = (action.option_strings or [action.dest])[0]
            raise UserError(f"{name}: an empty text is no path; leave it out, or give one")
        return super()._get_values(action, arg_strings)

    def error(self, message: str) -> NoReturn:
        sys.exit(fail(f"{message} (see {self.prog} --help)"))


def check_results(
    args: argparse.Namespace, results: Iterable[str], folders: Iterable[str | None] = (), texts: Iterable[str] = ()
) -> None:
    """UserError for a result that could not be written at the end, or would take the place of what the command reads.

    That is a file in one of the `folders`, and any that another argument names. Where a state is taken up and kept
    again it may be one file (`--load-x`, `--save-x`).

    Args: results: names of the arguments whose files are written; texts: of those that name no file.
    """
    flags = {name: f"--{name.replace('_', '-')}" for name in results}
    check_outputs({flag: getattr(args, name) for name, flag in flags.items()}, folders)
    for name, flag in flags.items():
        if getattr(args, name) is not None:
            apart = {*flags, *texts, name.replace("save", "load")}
            check_writable(getattr(args, name), flag, files_in(v for k, v in vars(args).items() if k not in apart))


def first_paragraph(doc: str | None) -> str:
    """Of a module's docstring, for its command's --help; nothing where Python has dropped docstrings."""
    return (doc or "").split("\n\n")[0]


def fail(message: str) -> int:
    """Prints `error: message` as one line on stderr and returns exit code 2."""
    say(str(UserError("error: " + " ".join(message.split()))))
    return 2


def progress(items: Iterable[T], total: int, label: str) -> Iterator[T]:
    """Yields `items`, showing how many have been on stderr while it is a terminal."""
    return track(items, total, label)


def lookahead(text: str) -> int | str:
    """The value of a `--lookahead` flag: a number of layers, or "adaptive"."""
    return text if text == "adaptive" else int(text)
