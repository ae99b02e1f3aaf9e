"""Worker processes that end with whoever started them."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import types
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children, parent_process
from multiprocessing.context import SpawnContext, SpawnProcess


class _Worker(SpawnProcess):
    """A fresh process that does not run its starter's program again, and does not hear Ctrl-C.

    A spawned process imports its starter's `__main__`. Here that would be the user's script, or a notebook, which has
    no file; tasks name nothing in it (`decide.by_value`). Ctrl-C reaches the whole group of processes: the one that
    waits for the results answers it.
    """

    def start(self) -> None:
        main, chosen = sys.modules["__main__"], os.environ.get(BLAS_THREADS)
        heard = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        sys.modules["__main__"] = types.ModuleType("__main__")
        os.environ.setdefault(BLAS_THREADS, "1")
        try:
            super().start()
        finally:
            if chosen is None:
                del os.environ[BLAS_THREADS]
            sys.modules["__main__"] = main
            signal.pthread_sigmask(signal.SIG_SETMASK, heard)


class _Context(SpawnContext):
    Process = _Worker


BLAS_THREADS = "OPENBLAS_NUM_THREADS"
"""One each, unless the user chose: small products of several threads wait for a core that another worker has. (Prompts
of 1,024 tokens took 13 times the CPU time on a busy machine.)"""


def _end_with_parent() -> None:
    """A worker whose starter was killed would wait for tasks for ever, and keep its starter's output open."""
    starter = parent_process()
    assert starter is not None

    def watch() -> None:
        starter.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def workers(count: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of `count` fresh processes, in each of which NumPy multiplies on one thread.

    Whatever breaks the block off, Ctrl-C too, drops the tasks that wait and ends those that run.
    """
    others = set(active_children())
    pool = ProcessPoolExecutor(count, mp_context=_Context(), initializer=_end_with_parent)
    try:
        yield pool
    except BaseException:
        for process in set(active_children()) - others:
            process.terminate()
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()
