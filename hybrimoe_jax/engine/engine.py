"""The engine: a checkpoint and an `EngineConfig` in, tokens and statistics out."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hybrimoe_jax import arguments
from hybrimoe_jax.decide.cache_state import CacheState
from hybrimoe_jax.engine import budget, cache_state, device_memory
from hybrimoe_jax.engine.assembly import assemble
from hybrimoe_jax.engine.base import BaseEngine
from hybrimoe_jax.engine.call import Call, Totals
from hybrimoe_jax.engine.checks import device_name
from hybrimoe_jax.engine.config import EngineConfig
from hybrimoe_jax.engine.exhaustion import with_fewer_slots
from hybrimoe_jax.engine.inputs import StepInput
from hybrimoe_jax.engine.jax_settings import own_settings
from hybrimoe_jax.engine.not_finite import first_not_finite
from hybrimoe_jax.engine.recording import EngineTimeline, EngineTrace, Recording
from hybrimoe_jax.engine.slot_map import SlotMap
from hybrimoe_jax.engine.stats import StepStats
from hybrimoe_jax.engine.turns import in_turn
from hybrimoe_jax.errors import DeviceError, UserError, shown
from hybrimoe_jax.machine.costs import ORIGIN, CostModel
from hybrimoe_jax.machine.origin import Origin
from hybrimoe_jax.machine.shapes import shape_of
from hybrimoe_jax.tables import Table


class Engine(BaseEngine):
    """Runs one model under one `EngineConfig`. Calls of several threads are served in turn, in the order they came.

    Args:
      config: a ModelConfig.
      dense: every dense weight by its checkpoint name (numpy).
      store: an ExpertStore.
      options: the EngineConfig.
      tokenizer: text.Tokenizer, needed only for `stop` strings and text prompts.
      eos: token ids that end a sequence.
      frequencies: [MoE layer][expert] activation counts from other text, for static placements.

    Raises UserError where the options cannot be met (a budget too small, a context beyond the model's).
    """

    def __init__(self, config, dense, store, options: EngineConfig, *, tokenizer: Any = None, eos=(), frequencies=None):
        def totals() -> Totals:
            return Totals.of(self._parts.planner, self._forward.switches)

        super().__init__(config, options, tokenizer, eos, totals)
        self.store = store
        with self._settings():
            self._parts = assemble(config, dense, store, options, self.max_context, frequencies)
        self._forward = self._parts.forward
        self._recording, self._sequences = False, 0
        self._routers = cache_state.routers_of(dense)

    @property
    def costs(self):
        """The CostModel that the planner works with (None for the dense executor)."""
        return self._parts.costs

    @property
    def measuring_s(self) -> float:
        """Seconds that measurements took when it was made, without compiling."""
        return self._parts.measuring_s

    @property
    def clock(self):
        """What its times are read from, a `Clock`."""
        return self._parts.clock

    @property
    def planner(self):
        """The Planner (None for the dense executor)."""
        return self._parts.planner

    @property
    def slots(self) -> SlotMap:
        """Which experts are in device memory now; all of them where the executor is dense."""
        layers, experts, planner = len(self.config.moe_layers), self.config.num_experts, self.planner
        if planner is None:
            return SlotMap((frozenset(range(experts)),) * layers, (experts,) * layers, experts)
        return self._turns.look(
            lambda: SlotMap(tuple(map(planner.resident, range(layers))), tuple(planner.slots), experts)
        )

    @in_turn
    def save_profile(self, path: str | Path) -> None:
        """Writes the measured costs; `EngineConfig(profile=path)` reads them back instead of measuring."""
        if self.costs is None:
            raise UserError("the dense executor measures no costs: there is no profile to save")
        if not isinstance(self.costs, CostModel):
            raise UserError(
                f"these costs come from {self.costs.source} and were not measured: there is nothing to save"
            )
        more = {}
        if self.options.profile is None:
            shape = shape_of(self.config, self.config.model_type)
            origin = Origin.here(device_name(self._parts.device, self.options), shape, self._parts.expert_format)
            more = {ORIGIN: origin.describe()}
        self.costs.save(arguments.path("path", path), more)

    @in_turn
    def record(self, trace=None, timeline=None) -> None:
        """Attaches recorders, an `EngineTrace` and an `EngineTimeline`, to the steps that follow (None detaches)."""
        for name, given, kind in (("trace", trace, EngineTrace), ("timeline", timeline, EngineTimeline)):
            if given is not None and not isinstance(given, kind):
                raise UserError(f"{name} {shown(given)} is no {kind.__name__}")
        self._forward.attach(trace, timeline)
        self._recording = trace is not None

    @in_turn
    def save_cache_state(self, path: str | Path) -> None:
        """Writes who is resident and what the cache has learned, for `load_cache_state` of another run.

        Waits for the prefetches under way and gives them their slots. UserError where a rule of one's own holds what a
        file cannot, and for the dense executor.
        """
        cache_state.save(arguments.path("path", path), self._forward, self.config, self._routers)

    @in_turn
    def load_cache_state(self, path: str | Path | CacheState) -> None:
        """Goes on where an engine of the same model, system and slots saved its cache state; answers stay the same.

        UserError for a state of another one, and while a trace is recorded, which would not say how it began.
        """
        if self._recording:
            raise UserError("a cache state is loaded before recording begins: the trace could not be repeated")
        state = path if isinstance(path, CacheState) else arguments.path("path", path)
        cache_state.load(state, self._forward, self.config, self._routers)

    @contextlib.contextmanager
    def recording(self, *, trace: bool = True, timeline: bool = False) -> Iterator[Recording]:
        """Records what runs in the block: routing as a trace, a sequence of its own for each prompt, and a timeline.

        A timeline has each layer run by itself, and watches it: its run's times are for looking at, not for quoting.
        """
        record = Recording(self, arguments.flag("trace", trace), arguments.flag("timeline", timeline))
        self.record(record.engine_trace, record.engine_timeline)
        try:
            yield record
        finally:
            self.record()
            record.finish()

    def _first_not_finite(self, tokens: Sequence[int]) -> str | None:
        return first_not_finite(self._parts.model, self.store, tokens, self.max_context)

    def _step(self, call: Call, step: StepInput, caches: list) -> tuple[np.ndarray, list, StepStats]:
        """One forward pass, once more with fewer slots where the device's memory runs out.

        `caches` then has those of the layers that were done: what a step writes again is the same.
        """
        self._check_open()
        self._calls.serve(call)
        with self._precision():
            return with_fewer_slots(lambda: self._forward.forward(step, caches), lambda why: self._give_up(why, caches))

    def _settings(self) -> contextlib.AbstractContextManager[Any]:
        return own_settings()

    def _precision(self) -> contextlib.AbstractContextManager[None]:
        """jax's default precision while a step runs: `models.precision` reads it when it traces."""
        rounded = self.options.precision == "bfloat16"
        return jax.default_matmul_precision("bfloat16") if rounded else contextlib.nullcontext()

    def _init_cache(self, batch: int, capacity: int) -> list:
        init_cache = self._parts.model.init_cache
        return with_fewer_slots(lambda: init_cache(batch, capacity), lambda why: self._give_up(why, []))

    def _give_up(self, why: str, caches: list) -> None:
        if any(array.is_deleted() for array in jax.tree.leaves(caches)):
            raise DeviceError(f"the device's memory ran out in the middle of a layer ({why}), and its cache is lost")
        self._parts.give_up_slots(why)

    def __repr__(self) -> str:
        """One line: the model, what runs it, how much of it is on the device, whose times these are."""
        state = ", closed" if self._closed else ""
        return f"<Engine: {', '.join(f'{value}' for value in self._about().values())}{state}>"

    def _repr_html_(self) -> str:
        rows = Table({"": name, "engine": value} for name, value in self._about().items())
        return rows._repr_html_() + self.slots._repr_html_()

    def _about(self) -> dict[str, str]:
        config, options, parts, slots = self.config, self.options, self._parts, self.slots
        held = sum(slots.slots)
        times = self._parts.new_stats().times
        return {
            "model": f"{config.model_type} of {len(slots.slots)} MoE layers, {config.num_experts} experts, "
            f"{config.num_experts_per_tok} a token",
            "system": parts.system.name,
            "executor": options.executor,
            "device": f"{held} of {len(slots.slots) * config.num_experts} experts in slots "
            f"({budget.readable(parts.footprint.total)})",
            "experts": f"{parts.expert_format}, {budget.readable(self.store.nbytes)} in host memory",
            "context": f"{self.max_context} tokens",
            "times": times,
        }

    def _end(self) -> None:
        self._parts.close()

    def _start(self, batch: int, capacity: int) -> Call:
        parts = self._parts
        stats = parts.new_stats()
        parts.clock.overshoot(reset=True)
        footprint, stats.host_bytes = parts.footprint, self.store.nbytes
        if self.options.cost_shape is not None and parts.costs is not None:
            stats.host_bytes = self.store.num_layers * self.store.num_experts * parts.costs.expert_bytes
        else:
            footprint = dataclasses.replace(footprint, kv=parts.model.cache_bytes(batch, capacity))
        stats.peak_device_bytes = footprint.total
        call, self._sequences = Call(stats, self._sequences), self._sequences + batch
        self._calls.serve(call)
        return call

    def _finish(self, call: Call) -> None:
        if not self._closed:
            self._forward.synchronize()
        parts, stats = self._parts, self._calls.finish(call)
        stats.overshoot = parts.clock.overshoot()
        measured = device_memory.peak_bytes(parts.device)
        if measured is not None and self.options.cost_shape is None:
            stats.peak_device_bytes = measured
        stats.slots, stats.slots_given_up = parts.slots, parts.slots_given_up
        self._last_stats = stats
