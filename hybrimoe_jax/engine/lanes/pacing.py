"""How long each program of a paced device lasts: what a program is handed besides its own operands.

The device is XLA's CPU backend; `host_kernels.native.pace` has its programs last as long as a profile says. `NoPacing`
is every other device's: programs get None and trace nothing. Importing this module imports no jax.

Shapes: N rows of a program, S slots.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import time
from collections.abc import Callable, Hashable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.host_kernels.native.library import library

if TYPE_CHECKING:
    import jax

    from hybrimoe_jax.machine.costs import CostModel
    from hybrimoe_jax.machine.profile import MachineCosts

MOST_KEPT = 4096


@dataclasses.dataclass
class Lateness:
    """How much later than they should things of one lane ended: how many, and seconds together and at most."""

    count: int = 0
    sum_s: float = 0.0
    most_s: float = 0.0

    def reset(self) -> None:
        self.count, self.sum_s, self.most_s = 0, 0.0, 0.0

    def note(self, seconds: float) -> None:
        self.count += 1
        self.sum_s += seconds
        self.most_s = max(self.most_s, seconds)


def sleep_until(until: float) -> float:
    """Returns at `until` on `time.perf_counter`, or at once; how many seconds later it is.

    With the native library it waits for the last 0.1 ms awake, without the interpreter.
    """
    native = _native_sleep()
    if native is not None:
        native(ctypes.c_double(until))
    while (left := until - time.perf_counter()) > 0:
        time.sleep(left)
    return -left


@functools.cache
def _native_sleep() -> Callable[[ctypes.c_double], None] | None:
    try:
        return library().pace_sleep_until
    except (UserError, AttributeError):  # it was built without XLA's headers, or not at all
        return None


class NoPacing:
    """Programs take the time they take."""

    def front(self, tokens: int, context: int, looked: bool) -> Any:
        """Of a layer's attention and router, with the coming layers' routers where they are `looked` at."""
        return None

    def block(self, tokens: int, rows: int | None = None) -> Any:
        """Of a program that runs the shared experts and residents that it finds itself; see `block_seconds`.

        `rows`: how many the program has, padding included, so that it is compiled once for all `tokens` below.
        """
        return None

    def experts(self, loads: Iterable[int]) -> Any:
        """Of a program that runs experts of these loads."""
        return None

    def step(self, tokens: int) -> Any:
        """Of what a step does outside its MoE layers."""
        return None


NO_PACING = NoPacing()


class Pacing(NoPacing):
    """Each operand is of one call, made as it is asked for: see `host_kernels.native.pace`.

    Args: costs: seconds of everything, as they are to last.
    """

    def __init__(self, costs: CostModel | MachineCosts):
        self.costs = costs
        self._kept: dict[Hashable, np.ndarray] = {}

    def front(self, tokens: int, context: int, looked: bool) -> np.ndarray:
        """float32 [2 + 1]: its seconds."""
        costs, key = self.costs, ("front", tokens, context, looked)
        return self._operand(key, lambda: [costs.layer(tokens, context) + (costs.look if looked else 0.0)])

    def block(self, tokens: int, rows: int | None = None) -> np.ndarray:
        """float32 [2 + 1 + rows]: seconds of the shared experts, then of an expert by its load from 1 on."""
        costs, rows = self.costs, max(tokens, rows or 0)
        loads = range(1, rows + 1)
        return self._operand(
            ("block", tokens, rows), lambda: [costs.shared(tokens), *(costs.device(min(n, tokens)) for n in loads)]
        )

    def experts(self, loads: Iterable[int]) -> np.ndarray:
        """float32 [2 + 1]: their seconds together."""
        key = tuple(sorted(loads))
        return self._operand(("experts", key), lambda: [sum(map(self.costs.device, key))])

    def step(self, tokens: int) -> np.ndarray:
        """float32 [2 + 1]: its seconds."""
        return self._operand(("step", tokens), lambda: [self.costs.step(tokens)])

    def _operand(self, key: Hashable, seconds: Callable[[], list[float]]) -> np.ndarray:
        from hybrimoe_jax.host_kernels.native.pace import dispatched

        found = self._kept.get(key)
        if found is None:
            if len(self._kept) > MOST_KEPT:
                self._kept.clear()
            found = self._kept[key] = np.array(seconds(), np.float32)
        return dispatched(found)


def block_seconds(pace: jax.Array | None, loads: jax.Array) -> jax.Array | None:
    """Seconds of the shared experts and of the residents that a program runs, for `pace.end`; None without a pace.

    Args: pace: what `block` gave. loads: int [S], each expert's load; 0 where it is not run.
    """
    if pace is None:
        return None
    import jax.numpy as jnp

    from hybrimoe_jax.host_kernels.native.pace import ABOUT

    return pace[ABOUT] + jnp.sum(jnp.where(loads > 0, pace[ABOUT + loads], 0.0))
