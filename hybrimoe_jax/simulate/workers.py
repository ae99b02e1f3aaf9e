"""Worker processes that end with whoever started them."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children, get_context


@contextlib.contextmanager
def workers(count: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of `count` fresh processes.

    Whatever breaks the block off, Ctrl-C too, drops the tasks that wait and ends those that run. Ctrl-C
    reaches the whole group of processes. The workers do not hear it: the process that waits for the results answers it.
    """
    others = set(active_children())
    pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"))
    try:
        heard = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            pool.submit(int)  # the first task starts all workers, which inherit what is blocked
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, heard)
        yield pool
    except BaseException:
        for process in set(active_children()) - others:
            process.terminate()
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()
