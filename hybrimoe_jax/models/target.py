"""The device that programs run on, and the backend that those being traced are for: its own, or another's."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
from collections.abc import Iterator
from typing import Any

import jax

from hybrimoe_jax.errors import UserError, said, shown

_traced_for: contextvars.ContextVar[str | None] = contextvars.ContextVar("backend being traced for", default=None)


@functools.cache
def default_device() -> Any:
    """The first device of jax; the first call starts jax. UserError where it has none."""
    try:
        return jax.devices()[0]
    except (RuntimeError, AssertionError) as error:  # the latter for a platform without its plugin
        chosen = os.environ.get("JAX_PLATFORMS")
        why = (f"JAX_PLATFORMS is {shown(chosen)}, " if chosen else "") + said(error)
    raise UserError(f"jax starts no device here ({why}); JAX_PLATFORMS=cpu works everywhere")


def backend() -> str:
    """One of "cpu", "gpu" and "tpu"."""
    return _traced_for.get() or default_device().platform


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
