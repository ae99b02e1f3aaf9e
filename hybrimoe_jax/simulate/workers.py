"""Worker processes that end with whoever started them."""

from __future__ import annotations

import contextlib
import signal
import sys
import types
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children
from multiprocessing.context import SpawnContext, SpawnProcess


class _Worker(SpawnProcess):
    """A fresh process that does not run its starter's program again, and does not hear Ctrl-C.

    A spawned process imports its starter's `__main__`. Here that would be the user's script, or a notebook, which has
    no file; tasks name nothing in it (`decide.by_value`). Ctrl-C reaches the whole group of processes: the one that
    waits for the results answers it.
    """

    def start(self) -> None:
        main = sys.modules["__main__"]
        heard = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            super().start()
        finally:
            sys.modules["__main__"] = main
            signal.pthread_sigmask(signal.SIG_SETMASK, heard)


class _Context(SpawnContext):
    Process = _Worker


@contextlib.contextmanager
def workers(count: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of `count` fresh processes.

    Whatever breaks the block off, Ctrl-C too, drops the tasks that wait and ends those that run.
    """
    others = set(active_children())
    pool = ProcessPoolExecutor(count, mp_context=_Context())
    try:
        yield pool
    except BaseException:
        for process in set(active_children()) - others:
            process.terminate()
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()
