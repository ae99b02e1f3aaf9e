"""What a forward pass gives, and the oracle that all others are checked against.

The oracle is the dense model, every expert on the device.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from hybrimoe_jax.engine.inputs import StepInput
from hybrimoe_jax.engine.lanes.clock import Clock
from hybrimoe_jax.engine.stats import Lanes, StepStats
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.models.moe import DenseExperts
from hybrimoe_jax.models.parameters import merge

if TYPE_CHECKING:
    from hybrimoe_jax.decide.planner import Planner
    from hybrimoe_jax.engine.fused.choice import Switch


@dataclasses.dataclass
class Pass:
    """A step under way. The residual stream is `h` + `device_part` + `host_part`, see `programs`.

    Attributes:
      tokens: real ones, without padding. routers: how many coming layers' routers the planner wants.
      moved: experts that landed for the layer under way. streamed: experts that started with their whole layer since it
        began.
      may_be_early: residents may be dispatched before the routing is read; early: they are, in the layer under way.
      moe_layer: the one under way. lanes: of the latest one.
    """

    step: StepInput
    valid: np.ndarray
    span: int
    context: int
    routers: int
    positions: jax.Array
    h: jax.Array
    device_part: jax.Array
    host_part: jax.Array | np.ndarray
    caches: list
    stats: StepStats
    started: float
    compiled: float
    streamed: int = 0
    may_be_early: bool = False
    early: bool = False
    moe_layer: int = -1
    began: float = 0.0
    moved: int = 0
    lanes: Lanes | None = None

    @property
    def tokens(self) -> int:
        return len(self.valid)


class Forward(abc.ABC):
    """A way to compute logits.

    `forward` returns float32 numpy [B, V] (or [B, T, V]), the new caches and the step's record. For a greedy step it
    may return the likeliest tokens instead, int32 [B]. `switches`: changes of the way in which decode steps run, so
    far.
    """

    @property
    def switches(self) -> Sequence[Switch]:
        return ()

    @abc.abstractmethod
    def forward(self, step: StepInput, caches: list) -> tuple[np.ndarray, list, StepStats]: ...

    @abc.abstractmethod
    def synchronize(self) -> None:
        """Returns when nothing that its steps started is computed any more, and all is planned and counted.

        Called after a run, whose last step may have been broken off.
        """

    @abc.abstractmethod
    def between_steps(self) -> Planner:
        """Brings all to where nothing is under way and the slots hold what the planner says; the planner.

        UserError where there is none.
        """

    @abc.abstractmethod
    def fill(self) -> None:
        """Loads every expert that the planner calls resident into empty slots."""

    @abc.abstractmethod
    def attach(self, trace, timeline) -> None:
        """Recorders for the steps that follow, or None. UserError where it has nothing to tell them."""


class DenseForward(Forward):
    """The oracle: the whole Flax model in one executable, every expert on the device."""

    def __init__(self, model, dense, weights, clock: Clock):
        self._graphdef, self._params, self._weights, self.clock = model, dense, weights, clock

    def forward(self, step, caches):
        start, compiled = self.clock.now(), self.clock.compile_seconds()
        logits, caches = _dense_step(
            self._graphdef, self._params, self._weights, step.ids, caches, step.positions, step.last
        )
        logits = np.asarray(logits)
        seconds, compile_s = self.clock.now() - start, self.clock.compile_seconds() - compiled
        return logits, caches, StepStats(step.phase, len(step.valid), seconds, compile_s, [])

    def synchronize(self) -> None:
        """Its steps end before they return."""

    def between_steps(self) -> Planner:
        raise UserError("the dense executor has every expert on the device: it keeps no cache state")

    def fill(self) -> None:
        """Its experts are there."""

    def attach(self, trace, timeline) -> None:
        if trace is not None or timeline is not None:
            raise UserError("the dense executor routes inside one executable: it gives no trace and no timeline")


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def _dense_step(graphdef, params, weights, ids, caches, positions, last):
    model = merge(graphdef, params)
    logits, caches = model(ids, caches, positions, DenseExperts(weights))
    return (logits if last is None else logits[jnp.arange(ids.shape[0]), last]), caches
