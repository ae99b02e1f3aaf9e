"""Worker processes that end with whoever started them."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context


@contextlib.contextmanager
def workers(count: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of `count` fresh processes. Whatever breaks the block off, Ctrl-C too, drops the tasks that wait and ends those that run."""
    pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_leave_interrupts)
    try:
        yield pool
    except BaseException:
        processes = list((pool._processes or {}).values())  # the pool has no public way to end them before Python 3.14
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        raise
    pool.shutdown()


def _leave_interrupts() -> None:
    """Ctrl-C reaches the whole group: the process that waits for the results answers it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
