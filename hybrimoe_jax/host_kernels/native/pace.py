"""A device's pace on the CPU backend: programs that last as long as they are told.

`begin` notes when a program starts; `end` sleeps until it has lasted its seconds. Programs queue as on a device: one
starts when it was dispatched or when the device is free, and not when a thread was woken for it. So dispatching counts,
as it does where costs are measured, and a program's own work. Both give back what they are given. Whatever of the
program depends on what `begin` gave, and comes before what `end` takes, runs between the two.

A pace is float32 [2 + n], a new array for each call (`dispatched`): when the call was made, as the two words of a
double, then seconds.

No side effect is declared, so a result that nobody reads is not paced. With one, jax dispatches the program from
Python: 0.5 ms a call more (jax 0.10.2, an x86-64 server).

A sleeping program holds a thread of XLA's pool: with a pool of one, a second program waits for it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.host_kernels.native import library
from hybrimoe_jax.host_kernels.native.ffi import register

BEGIN, END = "hybrimoe_pace_begin", "hybrimoe_pace_end"
WEIGHT = 1024
ABOUT = 2
"""Words of a pace before its seconds."""


@functools.cache
def available() -> bool:
    """Whether the library has the handlers: it was built with XLA's headers, from these sources."""
    try:
        register(BEGIN, "pace_ffi_begin")
        register(END, "pace_ffi_end")
    except (UserError, AttributeError, RuntimeError):
        return False
    return True


def dispatched(seconds: np.ndarray) -> np.ndarray:
    """The pace of a program that is called now. `seconds`: float32 [n], which it may last."""
    pace = np.empty(ABOUT + len(seconds), np.float32)
    pace[:ABOUT].view(np.float64)[0] = time.perf_counter()
    pace[ABOUT:] = seconds
    return pace


def begin(x: jax.Array, pace: jax.Array | None) -> jax.Array:
    """x, with the program's start noted before anything that depends on it. Nothing is traced where `pace` is None."""
    return x if pace is None else _call(BEGIN, x, pace)


def end(y: jax.Array, pace: jax.Array | None, seconds: jax.Array | None = None) -> jax.Array:
    """y, once the program has lasted the first of the pace's seconds, or `seconds` (a scalar) where they are given.

    Nothing is traced where `pace` is None.
    """
    if pace is None:
        return y
    lasts = pace[ABOUT] if seconds is None else seconds.reshape(())
    return _call(END, y, _weighty(lasts.astype(jnp.float32)).reshape(1))


def _weighty(seconds: jax.Array) -> jax.Array:
    """The same number of at least 0, with a thousand operations on it.

    XLA's CPU client runs a program of fewer than that on the thread that dispatches it, which would then sleep
    (jaxlib 0.10); and a custom call counts as none.
    """
    steps = seconds + jnp.arange(WEIGHT, dtype=jnp.float32)
    return jnp.maximum(seconds, -jnp.sum(steps * steps))


def _call(name: str, x: jax.Array, *operands: jax.Array) -> jax.Array:
    if not available():
        raise UserError(
            "a paced device needs the native kernels for jitted programs, which this installation lacks (no C++ "
            "compiler, or an older jaxlib)"
        )
    result = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.ffi.ffi_call(name, result, input_output_aliases={0: 0})(x, *operands)


@dataclasses.dataclass
class Overshoot:
    """How well programs kept their pace; seconds.

    Attributes:
      count: how many slept, sum_s: how much too long they did together, most_s: the longest of these.
      overrun: how many took longer than they were told, overran_s: how much longer together.
    """

    count: int
    sum_s: float
    most_s: float
    overrun: int
    overran_s: float


def overshoot(reset: bool = False) -> Overshoot:
    """Of all paced programs of this process since it was last reset."""
    numbers = (ctypes.c_double * 5)()
    library.library().pace_report(numbers, ctypes.c_int64(reset))
    programs, late, latest, overrun, overran = numbers
    return Overshoot(int(programs), late, latest, int(overrun), overran)
