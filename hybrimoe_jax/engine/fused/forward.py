"""Decode steps of one sequence as one program, if that is the faster way, and all others layer by layer."""

from __future__ import annotations

from hybrimoe_jax.decide.planner import Planner
from hybrimoe_jax.engine.fused.choice import Switch, WayChoice
from hybrimoe_jax.engine.fused.decode import FusedDecode
from hybrimoe_jax.engine.inputs import StepInput
from hybrimoe_jax.engine.step import Forward
from hybrimoe_jax.engine.steps.layered import LayeredForward


class FusedForward(Forward):
    """Args: layered: whose planner gives every expert of a one-token step to the CPU. choice: of the way."""

    def __init__(self, fused: FusedDecode, layered: LayeredForward, choice: WayChoice):
        self.fused, self.layered, self.choice = fused, layered, choice
        self._switches: list[Switch] = []
        self._mid_step = False

    def forward(self, step: StepInput, caches: list):
        if self._mid_step:
            self.fused.flush_deferred()
            self.layered.repair()
        self._mid_step = True  # until the step is whole: an interrupt may come at any line
        if self._fits(step):
            result = self._decode(step, caches)
        else:
            self.fused.flush_deferred()
            result = self.layered.forward(step, caches)
        self._mid_step = False
        return result

    @property
    def switches(self) -> list[Switch]:
        return self._switches

    def _decode(self, step: StepInput, caches: list):
        """A step that may go either way."""
        way = self.choice.fused
        if way:
            result = self.fused.step(step, caches, self.layered.planner, self.layered.clock)
        else:
            self.synchronize()  # what was started ahead is wanted by none, and would take the cores
            result = self.layered.forward(step, caches)
        record = result[2]
        record.fused = way
        switch = self.choice.note(record.seconds - record.compile_s)
        if switch is not None:
            self._switches.append(switch)
        return result

    def _fits(self, step: StepInput) -> bool:
        """Recorders want the layers one by one; a prefetch still under way must land first."""
        layered = self.layered
        if layered.trace is not None or layered.timeline is not None or layered.link.busy:
            return False
        return step.ids.size == 1 and step.last is not None and not layered.planner.streams(step.phase)

    def between_steps(self) -> Planner:
        self.synchronize()
        if self._mid_step:
            self.layered.repair()
            self._mid_step = False
        return self.layered.between_steps()

    def fill(self) -> None:
        self.layered.fill()

    def synchronize(self) -> None:
        whole, self._mid_step = not self._mid_step, True  # until it is planned: an interrupt may come at any line
        try:
            self.fused.flush_deferred()
        finally:
            self.fused.synchronize()
        self._mid_step = not whole

    def attach(self, trace, timeline) -> None:
        self.layered.attach(trace, timeline)
