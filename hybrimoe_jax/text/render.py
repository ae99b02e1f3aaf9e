"""Chat templates are programs from a download, so they run in a process of their own, within limits.

jinja2's sandbox keeps a template from Python's insides, and from nothing else: nested loops hang, `'a' * 3000000000`
takes all memory, deep nesting can end an interpreter. One child process (`render_child.py`) renders for this one. It is
started with the first prompt and kept; a template that goes past a limit ends it, and the next prompt starts another.
"""

from __future__ import annotations

import atexit
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybrimoe_jax.errors import UserError, shown

SECONDS = 5  # by the clock, if the child has computed for a fifth of them: a busy machine refuses no prompt
PATIENCE_S = 60  # for a child that computes nothing, as one that was stopped, and for its start
BYTES = 512 << 20
CHILD = Path(__file__).with_name("render_child.py")


class TemplateError(Exception):
    """What a template did wrong, as the end of a sentence."""


class Renderer:
    """The child process. One prompt at a time; not to be used after `TemplateError` where it has ended."""

    def __init__(self):
        self._late = False
        environment = os.environ | {"LC_ALL": "C", "MALLOC_ARENA_MAX": "1"}  # both spare address space
        command = [sys.executable, "-I", "-S", str(CHILD), _folders(), str(SECONDS), str(BYTES)]
        pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        try:
            self._process = subprocess.Popen(command, bufsize=0, env=environment, **pipes)
        except (OSError, ValueError) as error:
            raise _no_process(str(error)) from None
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input, self._output = self._process.stdin, io.BufferedReader(self._process.stdout)  # type: ignore[arg-type]
        try:
            limited = json.loads(self._line(PATIENCE_S))["memory"]
        except BaseException as error:
            self.end()
            if not isinstance(error, ValueError):
                raise
            raise _no_process(f"exit code {self._process.returncode}") from None
        if not limited:
            warnings.warn("this system limits no memory: a chat template can take any amount of it", stacklevel=2)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def render(self, template: str, variables: str) -> str:
        """The text that `template` makes of `variables`, a JSON object. Raises TemplateError."""
        request = f'{{"template": {json.dumps(template)}, "variables": {variables}}}\n'
        try:
            self._input.write(request.encode())
            answer = json.loads(self._line(SECONDS))
        except (OSError, ValueError):
            self.end()
            raise TemplateError(self._ending()) from None
        except BaseException:  # Ctrl-C: an answer that nobody awaits is on its way
            self.end()
            raise
        if not answer:
            self.end()
            raise TemplateError(f"it takes more than {BYTES >> 20} MB of memory")
        if "error" in answer:
            raise TemplateError(answer["error"])
        return answer["text"]

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self.forget()

    def forget(self) -> None:
        """Closes this process's ends of the pipes, and leaves the child to the process that started it, if another."""
        self._input.close()
        self._output.close()
        self._process.returncode = self._process.returncode or 0

    def _line(self, seconds: float) -> bytes:
        """The next line that the child writes; nothing if it takes longer, for then it is ended."""
        read = threading.Event()
        threading.Thread(target=self._bound, args=(read, seconds), daemon=True).start()
        try:
            return self._output.readline()
        finally:
            read.set()

    def _bound(self, read: threading.Event, seconds: float) -> None:
        before, pause, waited = self._computed_s(), SECONDS / 20, 0.0
        while not read.wait(pause):
            waited += pause  # not by the clock: where the machine pauses both processes, the child is not late
            if waited >= PATIENCE_S or (waited >= seconds and self._computed_s() - before >= SECONDS / 5):
                self._late = True
                self._process.kill()
                return

    def _computed_s(self) -> float:
        """What the child has computed so far; the time where no system but Linux tells."""
        try:
            return time.clock_gettime((~self._process.pid << 3) | 2)  # as of clock_getcpuclockid(3)
        except (AttributeError, OSError, OverflowError):
            return time.monotonic()

    def _ending(self) -> str:
        code = self._process.returncode
        if self._late or code == -getattr(signal, "SIGPROF", 0):
            return f"it takes more than {SECONDS} seconds"
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"it ends the process that renders it ({name}), for want of memory or by nesting too deep"


_renderer: Renderer | None = None
_turn = threading.Lock()


def render(template: str, variables: Mapping[str, Any]) -> str:
    """The text that a chat template makes of `variables`: what JSON can say, and what NumPy and mappings hold of it.

    The child process computes for 5 s and takes 512 MB at most, and the text is of 8 million characters and four
    times the variables at most. From any thread, one prompt at a time. Raises TemplateError for whatever a template
    does, and UserError where a variable is no JSON or no process can be started.
    """
    global _renderer
    try:
        given = json.dumps(variables, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"a chat template takes what JSON can say: {shown(str(error))}") from None
    with _turn:
        if _renderer is None or not _renderer.alive:
            _forget()
            _renderer = Renderer()
        return _renderer.render(template, given)


def _plain(value: Any) -> Any:
    """What JSON says of a value that is none of its own types."""
    if isinstance(value, Mapping):
        return dict(value)
    for method in ("tolist", "model_dump"):  # NumPy's arrays and numbers; pydantic's models, as of OpenAI's client
        if callable(getattr(value, method, None)):
            return getattr(value, method)()
    raise TypeError(f"{type(value).__name__} is no JSON")


def _folders() -> str:
    """Where jinja2 and what it imports lie: all that the child finds besides Python's own modules."""
    found = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
    if any(spec is None or spec.origin is None for spec in found):
        raise UserError("chat templates need jinja2, which is not installed: pip install jinja2")
    return os.pathsep.join(dict.fromkeys(str(Path(spec.origin).parents[1]) for spec in found if spec and spec.origin))


def _no_process(why: str) -> UserError:
    return UserError(
        f"a chat template is rendered by a process of its own, and {shown(sys.executable)} cannot be started for it "
        f"({why}): give the prompt as it is, without a template (--ignore-chat-template)"
    )


def _stop() -> None:
    global _renderer
    if _renderer is not None:
        _renderer.end()
        _renderer = None


def _forget() -> None:
    global _renderer
    if _renderer is not None:
        _renderer.forget()
        _renderer = None


def _after_fork() -> None:
    """The child process is the parent's: this one starts its own."""
    global _turn
    _turn = threading.Lock()
    _forget()


atexit.register(_stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
