"""Which backend the programs being traced are for: the process's own, or one that is only compiled for."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator

import jax

_traced_for: contextvars.ContextVar[str | None] = contextvars.ContextVar("backend being traced for", default=None)
_own = functools.cache(jax.default_backend)


def backend() -> str:
    """ "cpu", "gpu" or "tpu"."""
    return _traced_for.get() or _own()


@contextlib.contextmanager
def traced_for(name: str) -> Iterator[None]:
    """What is traced inside is for this backend, for a program that is compiled where no such device is.

    A function that was traced before for the same arguments is not traced again.
    """
    token = _traced_for.set(name)
    try:
        yield
    finally:
        _traced_for.reset(token)
