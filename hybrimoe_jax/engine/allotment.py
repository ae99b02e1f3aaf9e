"""How much of the device's memory is taken whatever the cache holds, and how many slots the rest is."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax

from hybrimoe_jax.decide.layer_stream import BUFFERED_LAYERS
from hybrimoe_jax.decide.systems import System
from hybrimoe_jax.engine import budget
from hybrimoe_jax.engine.config import EngineConfig
from hybrimoe_jax.engine.device_model import DeviceModel
from hybrimoe_jax.engine.generation import LOGIT_ROWS
from hybrimoe_jax.engine.lanes.slots import empty_expert
from hybrimoe_jax.engine.workspace import StepPrograms, StepShape, workspace_bytes
from hybrimoe_jax.formats.packing import ExpertLayout

STAGING = 2
"""Staging slots: one fills while the other is read."""
IN_FLIGHT = 2
"""Prefetches on their way at once; each holds one expert's bytes on the device until it is committed."""


@dataclasses.dataclass(frozen=True)
class Allotment:
    """Device memory of a model under an `EngineConfig`.

    Attributes: layout, expert_bytes, dtype: of an expert's slot.
    """

    model: DeviceModel
    layout: ExpertLayout | None
    options: EngineConfig
    system: System
    expert_bytes: int
    dtype: Any
    max_context: int

    @functools.cached_property
    def fixed(self) -> budget.Footprint:
        """Bytes of all but the slots."""
        options, lookahead = self.options, self.system.max_distance
        buffers = BUFFERED_LAYERS * self.model.config.num_experts if self.system.stream_prefill else 0
        staging = self.expert_bytes * (2 * STAGING + (IN_FLIGHT if lookahead else 0) + buffers)
        workspace = 0 if options.budget_bytes is None else self._workspace(lookahead)
        if options.cost_shape is not None:  # of that model, what is the same however many layers there are
            return budget.Footprint(dense=0, kv=0, staging=staging, workspace=0)
        cache = self.model.cache_bytes(options.max_batch, self.max_context)
        return budget.Footprint(dense=self.model.nbytes, kv=cache, staging=staging, workspace=workspace)

    def slots(self, frequencies: Sequence[Sequence[float]] | None) -> list[int]:
        """Of each MoE layer. UserError where a budget has no room for what is fixed."""
        options, layers, experts = self.options, len(self.model.moe_layers), self.model.config.num_experts
        if options.budget_bytes is not None:
            total = budget.slots_within(options.budget_bytes, self.fixed, self.expert_bytes, layers * experts)
            return self.system.slots_for_total(total, layers, experts, frequencies)
        ratio = 0.25 if options.cache_ratio is None else options.cache_ratio
        return self.system.slots_per_layer(ratio, layers, experts, frequencies)

    def _workspace(self, lookahead: int) -> int:
        """Bytes of the largest steps that the options allow, by what the compiler says of their programs."""
        options, config = self.options, self.model.config
        shapes = (2 * config.moe_width, config.hidden_size), (config.hidden_size, config.moe_width)
        slot = jax.eval_shape(lambda: empty_expert(shapes, self.dtype, self.layout))
        steps = StepPrograms(self.model, slot, options.executor, self.model.device_kernel)
        chunk = min(options.prefill_chunk, self.max_context)
        sizes = [StepShape(options.max_batch, tokens, self.max_context, lookahead) for tokens in {chunk, 1}]
        every = [program for size in sizes for program in steps.of(size)]
        return workspace_bytes([*every, steps.all_logits(min(chunk, LOGIT_ROWS))])
