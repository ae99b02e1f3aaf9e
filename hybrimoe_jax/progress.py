"""How far something long has come: one line on a terminal's stderr, one in a notebook's cell, nothing anywhere else.

The line vanishes at the end. HYBRIMOE_PROGRESS=off turns it off.
"""

from __future__ import annotations

import html
import importlib
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from hybrimoe_jax import encoding

T = TypeVar("T")

EVERY_S = 0.1
"""Between two updates at least."""
SOON_S = 1.0
"""Work that ends sooner shows nothing."""
SWITCH = "HYBRIMOE_PROGRESS"


class Progress:
    """A block's progress. `total`: how many things there are, None where nobody knows.

    Args: label: what is being done. unit: of what, "tokens" for one. at_once: show it before SOON_S.
    """

    def __init__(self, label: str, total: int | None = None, unit: str = "", at_once: bool = False):
        self.label, self.total, self.unit = label, total, unit
        self._began = self._shown = self._since = time.monotonic()
        if at_once:
            self._began -= SOON_S
            self._shown -= EVERY_S
        self._line = _line()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._line is not None:
            self._line.clear()

    def restart(self, label: str, total: int | None) -> None:
        """Something else is done from now on."""
        self.label, self.total, self._since = label, total, time.monotonic()

    def track(self, items: Iterable[T], total: int, label: str) -> Iterator[T]:
        """Yields the items and shows how many have been."""
        self.restart(label, total)
        for number, item in enumerate(items):
            self.to(number)
            yield item

    def to(self, done: int, label: str | None = None) -> None:
        """So many are done."""
        self.label = label or self.label
        now = time.monotonic()
        if self._line is None or now - self._began < SOON_S or now - self._shown < EVERY_S:
            return
        self._shown = now
        self._line.show(self._text(done, now - self._since))

    def _text(self, done: int, seconds: float) -> str:
        if self.total is None:
            return f"{self.label} ..."
        left = (self.total - done) * seconds / done if done else 0.0
        unit = f" {self.unit}" if self.unit else ""
        rate = f", {done / seconds:.3g}{unit} a second, {_duration(left)} left" if done and seconds > 0 else ""
        return f"{self.label}: {done} of {self.total}{unit}{rate}"


def track(items: Iterable[T], total: int, label: str) -> Iterator[T]:
    """The same by itself."""
    with Progress(label, total) as progress:
        yield from progress.track(items, total, label)


class _Terminal:
    def show(self, text: str) -> None:
        columns = shutil.get_terminal_size().columns
        encoding.show(f"\r{text[: columns - 1]}\x1b[K")
        self._used = True

    _used = False

    def clear(self) -> None:
        if self._used:
            encoding.show("\r\x1b[K")


class _Notebook:
    """A line of HTML that is replaced: no widget is needed, and none stays in the file."""

    _display: Any = None

    def show(self, text: str) -> None:
        shown = {"text/plain": text, "text/html": f'<span style="color: #666">{html.escape(text)}</span>'}
        if self._display is None:
            self._display = importlib.import_module("IPython.display").display(shown, raw=True, display_id=True)
        else:
            self._display.update(shown, raw=True)

    def clear(self) -> None:
        if self._display is not None:
            self._display.update({"text/plain": "", "text/html": ""}, raw=True)


def _line() -> _Terminal | _Notebook | None:
    if os.environ.get(SWITCH, "").lower() in ("off", "0"):
        return None
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None and getattr(shell, "kernel", None) is not None:
        return _Notebook()
    return _Terminal() if sys.stderr is not None and sys.stderr.isatty() else None


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
