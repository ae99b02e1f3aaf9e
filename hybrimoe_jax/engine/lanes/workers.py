"""Threads that serve a queue.

They are stopped and joined before the interpreter goes: a daemon thread that is inside jax at that moment would be
unwound through C++ frames, which aborts the process. Imports no jax.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any


class Worker:
    """One thread that calls `serve(task)` for each task in turn, until `stop` or the end of the program."""

    def __init__(self, serve: Callable[[Any], None], name: str):
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        thread = threading.Thread(target=_loop, args=(self._tasks, serve), name=name, daemon=True)
        thread.start()
        self._stop = weakref.finalize(self, _finish, self._tasks, thread)  # also runs at exit

    def put(self, task: Any) -> None:
        self._tasks.put(task)

    def stop(self) -> None:
        """Returns when the tasks put before have been served. Calling it again does nothing."""
        self._stop()

    def abandon(self) -> None:
        """For a thread that does not come back: what waits behind its task is dropped, and nobody waits for it."""
        self._stop.detach()
        with contextlib.suppress(queue.Empty):
            while True:
                self._tasks.get_nowait()
        self._tasks.put(None)


def _loop(tasks: queue.SimpleQueue, serve: Callable[[Any], None]) -> None:
    while (task := tasks.get()) is not None:
        serve(task)
        task = None  # else what it holds, an expert on the device perhaps, would stay until the next one comes


def _finish(tasks: queue.SimpleQueue, thread: threading.Thread) -> None:
    tasks.put(None)
    thread.join()
