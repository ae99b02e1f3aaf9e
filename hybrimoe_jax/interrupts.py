"""Ctrl-C from a command's first line on: exit code 130 and one word, never a traceback.

Until `gently` an interrupt ends the process at once. From then on it is raised, so that what has begun is put in order.
What is being imported comes to its end first: a library may take KeyboardInterrupt for an error of its own, or lose it.
A second interrupt is not raised: within a second it is the same one, for people press twice, and later it ends the
process at once.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import types

TYPE_CHECKING = False
if TYPE_CHECKING:  # `typing` itself takes a while
    from typing import Any

INTERRUPTED = 130
COMMANDS = ("demo", "generate", "convert", "calibrate", "simulate", "trace", "bench", "reproduce", "train")
_IMPORTING = "<frozen importlib._bootstrap>"
_LOOK_AGAIN_S, _PATIENCE_S = 0.02, 1.0
_first = 0.0
"""When the interrupt came that is being answered."""


def listen() -> None:
    """Called by the package's first line: where its import is how a command begins, it is interrupted by one word."""
    module = _started_module()
    if module is None or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return  # a library, or somebody has chosen already: a shell lets what runs in its background ignore Ctrl-C
    known = module in ("hybrimoe_jax", *(f"hybrimoe_jax.{name}" for name in COMMANDS))
    signal.signal(signal.SIGINT, at_once if known else silently)


def gently() -> bool:
    """From now on an interrupt is a KeyboardInterrupt. False where this process is no command."""
    if signal.getsignal(signal.SIGINT) is not at_once:
        return False
    sys.unraisablehook = _unraisable
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGALRM, _interrupt)
    return True


def end_at_once() -> None:
    """From now on an interrupt ends the process at once, as does one that is still to be raised: its work is done."""
    if signal.getitimer(signal.ITIMER_REAL)[0] and signal.getsignal(signal.SIGALRM) is _interrupt:
        at_once()
    if signal.getsignal(signal.SIGINT) in (_interrupt, _again):
        signal.signal(signal.SIGINT, at_once)


def no_more() -> None:
    """A second Ctrl-C says nothing more: the first one is being answered."""
    if signal.getsignal(signal.SIGINT) in (at_once, _interrupt, _again):
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def at_once(*_: object) -> None:
    """Ends the process with the word."""
    try:
        os.write(2, b"interrupted\n")
    finally:
        os._exit(INTERRUPTED)


def silently(*_: object) -> None:
    """Ends a process of a command, which says the word itself."""
    os._exit(INTERRUPTED)


def _interrupt(signum: int, frame: types.FrameType | None) -> None:
    global _first
    while frame is not None:
        if frame.f_code.co_filename == _IMPORTING:
            signal.setitimer(signal.ITIMER_REAL, _LOOK_AGAIN_S)
            return
        frame = frame.f_back
    _first = time.monotonic()
    signal.signal(signal.SIGINT, _again)
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _again(*_: object) -> None:
    if time.monotonic() - _first > _PATIENCE_S:
        at_once()


def _unraisable(unraisable: Any) -> None:
    """Where the interpreter would only print it: in a finaliser, for one."""
    if unraisable.exc_type is KeyboardInterrupt:
        at_once()
    sys.__unraisablehook__(unraisable)


def _started_module() -> str | None:
    """The module of this package that this process was started with."""
    program = (getattr(sys, "argv", None) or [""])[0]
    if os.path.basename(program).removesuffix(".exe") == "hybrimoe-jax":
        return "hybrimoe_jax"
    if program != "-m":  # which it is while Python looks for the module
        return None
    given = (part.removeprefix("-m") for part in sys.orig_argv[1:])
    return next((part for part in given if part.partition(".")[0] == "hybrimoe_jax"), None)
