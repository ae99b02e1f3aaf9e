"""Steps whose prompts are multiplied in bfloat16: `EngineConfig.precision`."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from hybrimoe_jax.decide.planner import Planner
from hybrimoe_jax.engine.fused.choice import Switch
from hybrimoe_jax.engine.inputs import StepInput
from hybrimoe_jax.engine.stats import StepStats
from hybrimoe_jax.engine.step import Forward


class RoundedForward(Forward):
    """`inner`, with jax's default precision at bfloat16 while it runs: `models.precision` reads it when it traces."""

    def __init__(self, inner: Forward):
        self.inner = inner

    @property
    def switches(self) -> Sequence[Switch]:
        return self.inner.switches

    def forward(self, step: StepInput, caches: list) -> tuple[np.ndarray, list, StepStats]:
        with jax.default_matmul_precision("bfloat16"):
            return self.inner.forward(step, caches)

    def synchronize(self) -> None:
        self.inner.synchronize()

    def between_steps(self) -> Planner:
        return self.inner.between_steps()

    def fill(self) -> None:
        self.inner.fill()

    def attach(self, trace, timeline) -> None:
        self.inner.attach(trace, timeline)
