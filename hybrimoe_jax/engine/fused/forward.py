"""Decode steps of one sequence as one program, all others layer by layer."""

from __future__ import annotations

from hybrimoe_jax.engine.fused.decode import FusedDecode
from hybrimoe_jax.engine.step import Forward, StepInput
from hybrimoe_jax.engine.steps.layered import LayeredForward


class FusedForward(Forward):
    """Args: layered: whose planner gives every expert of a one-token step to the CPU."""

    def __init__(self, fused: FusedDecode, layered: LayeredForward):
        self.fused, self.layered = fused, layered
        self._mid_step = False

    def forward(self, step: StepInput, caches: list):
        if self._mid_step:
            self.fused.flush_deferred()
            self.layered.repair()
        self._mid_step = True  # until the step is whole: an interrupt may come at any line
        if self._fits(step):
            result = self.fused.step(step, caches, self.layered.planner, self.layered.clock)
        else:
            self.fused.flush_deferred()
            result = self.layered.forward(step, caches)
        self._mid_step = False
        return result

    def _fits(self, step: StepInput) -> bool:
        """Recorders want the layers one by one; a prefetch still under way must land first."""
        layered = self.layered
        if layered.trace is not None or layered.timeline is not None or layered.link.busy:
            return False
        return step.ids.size == 1 and step.last is not None and not layered.planner.streams(step.phase)

    def synchronize(self) -> None:
        self.fused.flush_deferred()
        self.fused.synchronize()

    def attach(self, trace, timeline) -> None:
        self.layered.attach(trace, timeline)
