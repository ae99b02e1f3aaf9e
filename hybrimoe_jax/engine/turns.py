"""One engine, many callers: each waits for its turn, in the order in which they came. Imports no jax.

A call has the engine to itself from its first step to its last. A stream has it for a step at a time: nobody waits for
whoever reads it.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import threading
from collections.abc import Callable, Generator
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast

from hybrimoe_jax.errors import UserError

T = TypeVar("T")
Y = TypeVar("Y", covariant=True)
S = TypeVar("S", contravariant=True)
R = TypeVar("R", covariant=True)
P = ParamSpec("P")

LOOK_AGAIN_S = 1.0
"""Whoever waits looks by itself so often: an interrupt may come between a turn's end and its handing over."""


class Turns:
    """Who is served. The thread that has the turn may call again; not within a step, which is only half done.

    What ends a turn is one call that no interrupt can come before, so that none leaves the others waiting. All that is
    done in a turn is done in a context that `within` makes.
    """

    def __init__(self, within: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
        self._within = within
        self._queue = collections.deque[Any]()  # of a lock each, which its thread waits for; the first has the turn
        self._owner: int | None = None
        self._in_step = False
        self._process = os.getpid()

    def serve(self, work: Callable[[], T], step: bool = False) -> T:
        """`work()`, when it is this thread's turn. UserError within a step of the same thread."""
        return cast(T, self._serve_in_turn(work, step, wait=True))

    def look(self, work: Callable[[], T]) -> T:
        """`serve`, for what changes nothing: within a step of the same thread, too."""
        return work() if self._owner == threading.get_ident() else self.serve(work)

    def serve_now(self, work: Callable[[], object]) -> None:
        """`work()` if it can be served without waiting, and within no step; else nothing.

        For what the garbage collector runs, in any thread and at any line.
        """
        if not self._in_step and os.getpid() == self._process:
            self._serve_in_turn(work, step=False, wait=False)

    def _serve_in_turn(self, work: Callable[[], T], step: bool, wait: bool) -> T | None:
        if os.getpid() != self._process:
            raise UserError(
                "this process is a fork of the one that made the engine, whose threads are not here; "
                "load it in a process of its own (multiprocessing's spawn)"
            )
        if self._owner == threading.get_ident():
            if self._in_step:
                raise UserError(
                    "the engine is within a step: what runs there (a rule, a signal handler) cannot call it; "
                    "call it between steps"
                )
            return self._serve(work, step)
        ticket = threading.Lock()
        ticket.acquire()
        try:
            self._queue.append(ticket)
            while self._queue[0] is not ticket:
                if not wait:
                    return None
                ticket.acquire(timeout=LOOK_AGAIN_S)
            self._owner = threading.get_ident()
            with self._within():
                return self._serve(work, step)
        finally:
            if self._queue and self._queue[0] is ticket:
                self._owner = None
            if ticket in self._queue:
                self._queue.remove(ticket)
            with contextlib.suppress(IndexError, RuntimeError):  # nobody waits, or looks already
                self._queue[0].release()

    def _serve(self, work: Callable[[], T], step: bool) -> T:
        try:
            self._in_step = step
            return work()
        finally:
            self._in_step = False


class Shared(Generator[Y, S, R]):
    """A generator that any thread may ask, one at a time; to close it waits for the item that is being made."""

    def __init__(self, inner: Generator[Y, S, R]):
        self._inner, self._lock = inner, threading.RLock()

    def send(self, value: S) -> Y:
        with self._lock:
            return self._mine().send(value)

    def throw(self, *error: Any) -> Y:
        with self._lock:
            return self._mine().throw(*error)

    def close(self) -> None:
        with self._lock:
            self._mine().close()

    def _mine(self) -> Generator[Y, S, R]:
        if getattr(self._inner, "gi_running", False):
            raise UserError("this stream is making an item: what runs meanwhile in the same thread cannot ask it")
        return self._inner


class HasTurns(Protocol):
    """What serves its callers in turn."""

    _turns: Turns


E = TypeVar("E", bound=HasTurns)


def in_turn(method: Callable[Concatenate[E, P], T]) -> Callable[Concatenate[E, P], T]:
    """A method that runs when it is its caller's turn."""

    @functools.wraps(method)
    def served(self: E, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._turns.serve(lambda: method(self, *args, **kwargs))

    return served
