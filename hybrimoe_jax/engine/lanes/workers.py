"""Threads that serve a queue.

They are stopped and joined before the interpreter goes: a daemon thread that is inside jax at that moment would be
unwound through C++ frames, which aborts the process. Imports no jax.
"""

from __future__ import annotations

import atexit
import functools
import inspect
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any

from hybrimoe_jax.errors import DeviceError

PATIENCE = 50_000
"""A task that takes so many times what the costs say hangs. Seconds for a large expert, and no less than what a busy
machine keeps a thread waiting for a small one."""
SLICES = 50
Call = Callable[..., Any]
_RUNNING: dict[_Tasks, threading.Thread] = {}
"""Threads that the program's end waits for."""


def ended(done: threading.Event, patience_s: float | None) -> bool:
    """Waits for a task's end, `patience_s` at most (None: as long as it takes); whether it came.

    The time is waited for in slices, so that a process that was stopped meanwhile, or had no core, counts as having
    waited for one of them.
    """
    if patience_s is None:
        return done.wait()
    return any(done.wait(patience_s / SLICES) for _ in range(SLICES))


def tell_lost(task: Any, error: BaseException) -> None:
    """Ends a task that has an event `done` and room for its `error`."""
    done = getattr(task, "done", None)
    if done is not None and not done.is_set():
        task.error = error
        done.set()


class Worker:
    """One thread that calls `serve(task)` for each task in turn, until `stop` or the end of the program.

    `serve` and `lost` may be methods of whoever owns the worker: it is held only while a task is served. Once it is
    gone the thread ends, so that an engine that nobody closed leaves nothing behind.

    A thread may die: `serve` raises, or someone raises in it. Then `lost(task, error)` is called for every task that it
    was given and has not served, so that nobody waits for them, and the next task has a new thread.
    """

    def __init__(self, serve: Callable[[Any], None], name: str, lost: Callable[[Any, BaseException], None] = tell_lost):
        self._serve, self._name, self._lost = _weakly(serve), name, _weakly(lost)
        self._begin()

    def _begin(self) -> None:
        self._tasks = _Tasks()
        arguments = (self._tasks, self._serve, self._lost, self._name)
        self._thread = threading.Thread(target=_loop, args=arguments, name=self._name, daemon=True)
        _join_at_exit()
        self._thread.start()
        _RUNNING[self._tasks] = self._thread
        self._end = weakref.finalize(self, self._tasks.queue.put, None)  # by the garbage collector: it must not wait
        self._end.atexit = False

    def put(self, task: Any) -> None:
        while not self._tasks.put(task):
            self._begin()

    def stop(self) -> None:
        """Returns when the tasks put before have been served. Calling it again does nothing."""
        if self._end.alive:
            self._end()
            self._thread.join()

    def abandon(self) -> None:
        """For a thread that does not come back: what waits behind its task is dropped, and nobody waits for it.

        The next task has a new thread.
        """
        self._end.detach()
        _RUNNING.pop(self._tasks, None)
        self._tasks.close()


class _Tasks:
    """What a thread was given: `unserved`, by identity, is what it has not ended."""

    def __init__(self):
        self.queue: queue.SimpleQueue = queue.SimpleQueue()
        self.unserved: dict[int, Any] = {}
        self._lock, self._closed = threading.Lock(), False

    def put(self, task: Any) -> bool:
        """Whether there is a thread to serve it."""
        with self._lock:
            if not self._closed:
                self.unserved[id(task)] = task
                self.queue.put(task)
            return not self._closed

    def close(self) -> list[Any]:
        """Takes no more tasks, and the thread ends before its next one. What was left unserved."""
        with self._lock:
            self._closed = True
            left, self.unserved = list(self.unserved.values()), {}
            while not self.queue.empty():
                self.queue.get_nowait()
            self.queue.put(None)
        return left


def _weakly(call: Call) -> Callable[[], Call | None]:
    """A method that does not keep its object, as long as that is there; a function as it is."""
    return weakref.WeakMethod(call) if inspect.ismethod(call) else lambda: call


def _loop(tasks: _Tasks, serve: Callable[[], Call | None], lost: Callable[[], Call | None], name: str) -> None:
    died = None
    try:
        while (task := tasks.queue.get()) is not None and (call := serve()) is not None:
            call(task)
            tasks.unserved.pop(id(task), None)
            task = call = None  # else what they hold, an expert on the device perhaps, would stay until the next one
    except BaseException as error:
        died = error
    left = tasks.close()
    if died is not None:
        for task in left:
            error = DeviceError(f"the thread {name} has died ({type(died).__name__}: {died})")
            error.__cause__ = died
            (lost() or tell_lost)(task, error)
    _RUNNING.pop(tasks, None)


@functools.cache
def _join_at_exit() -> None:
    atexit.register(_join)


def _join() -> None:
    for tasks, thread in list(_RUNNING.items()):
        tasks.queue.put(None)
        thread.join()
