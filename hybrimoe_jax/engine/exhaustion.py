"""What is done where the device's memory runs out: slots are given up, once, and the work goes on.

A slot holds a copy of an expert that the host has as well, so that giving it up changes no answer. What is given up
once is enough, or the next failure is an error that says what to lower.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import jax

from hybrimoe_jax.errors import DeviceError

T = TypeVar("T")
SHARE = 4
"""One slot of so many is given up, at least one."""


def reason(error: BaseException) -> str | None:
    """What ran out, in a line, where the device's memory did: by the error itself, or the one that it came from."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(found):
            return str(found).splitlines()[0].partition("RESOURCE_EXHAUSTED: ")[2][:120] or "no memory"
        found = found.__cause__ or found.__context__
    return None


def fewer(total: int) -> int:
    """How many of `total` slots are kept."""
    return total - -(-total // SHARE)


def with_fewer_slots(work: Callable[[], T], give_up: Callable[[str], None]) -> T:
    """`work()`; where the device's memory runs out `give_up(reason)`, then `work()` again.

    DeviceError where it runs out again. `give_up` raises it where nothing is left to give.
    """
    try:
        return work()
    except Exception as error:
        if (why := reason(error)) is None:
            raise
    try:  # not in the block above: its error would keep arrays of the work that failed
        give_up(why)
        return work()
    except Exception as error:
        if (why := reason(error)) is None:
            raise
        raise still(why) from None


def without_slots(work: Callable[[], T]) -> T:
    """`work()`, which puts on the device what must be there; DeviceError where its memory runs out."""
    try:
        return work()
    except Exception as error:
        if (why := reason(error)) is None:
            raise
    raise DeviceError(
        f"the device's memory ran out ({why}) before there were slots: end what else uses it, convert with "
        "--dense-format, take no dense executor, or leave the device out (JAX_PLATFORMS=cpu)"
    )


def still(why: str) -> DeviceError:
    """The error where slots were given up already, or there are none."""
    return DeviceError(
        f"the device's memory ran out ({why}), and no more slots are given up; lower cache_ratio or vram_budget, "
        "max_context, max_batch or prefill_chunk"
    )


def say(why: str, given_up: int, total: int) -> None:
    warnings.warn(
        f"the device's memory ran out ({why}): {given_up} of {total} expert slots are given up; answers stay the same",
        stacklevel=2,
    )
