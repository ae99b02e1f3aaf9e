"""The engine: a checkpoint and an `EngineConfig` in, tokens and statistics out."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hybrimoe_jax.engine import budget, device_memory
from hybrimoe_jax.engine.assembly import assemble
from hybrimoe_jax.engine.checks import device_name
from hybrimoe_jax.engine.config import EngineConfig
from hybrimoe_jax.engine.exhaustion import with_fewer_slots
from hybrimoe_jax.engine.generation import Emitted, Generation, capacity_for, generate_steps, prefill_chunks
from hybrimoe_jax.engine.inputs import StepInput
from hybrimoe_jax.engine.parts import LOGIT_ROWS
from hybrimoe_jax.engine.request import check_prompts, context_limit
from hybrimoe_jax.engine.sampling import Sampling
from hybrimoe_jax.engine.stats import PrefetchStats, RunStats, StepStats
from hybrimoe_jax.errors import DeviceError, UserError
from hybrimoe_jax.machine.costs import ORIGIN, CostModel
from hybrimoe_jax.machine.origin import Origin
from hybrimoe_jax.machine.shapes import shape_of

Steps = Generator[Emitted, int | Sequence[int] | None, RunStats]


class Engine:
    """Runs one model under one `EngineConfig`. Not thread-safe: the thread that calls it owns the device's slots.

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
        self.config, self.options, self.tokenizer, self.eos = config, options, tokenizer, tuple(eos)
        self.store = store
        self.max_context = context_limit(options, config)
        self._parts = assemble(config, dense, store, options, self.max_context, frequencies)
        self._forward = self._parts.forward
        self._last_stats: RunStats | None = None
        self._closed = False

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
    def stats(self) -> RunStats | None:
        """Of the latest call."""
        return self._last_stats

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
        self.costs.save(path, more)

    def record(self, trace=None, timeline=None) -> None:
        """Attaches recorders to the steps that follow (None detaches).

        An `EngineTrace`; an `EngineTimeline`, or under the virtual clock a `trace.timeline.Timeline`.
        """
        self._forward.attach(trace, timeline)

    def logits(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Logits of every position: [T] token ids -> float32 [T, V]."""
        ids = np.asarray(ids, np.int64).ravel().tolist()
        check_prompts([ids], 0, self.config.vocab_size, self.max_context)
        capacity = capacity_for([ids], 0, self.max_context)
        self._check_ready(1, capacity)
        stats, out = self._start(1, capacity), []
        caches = self._init_cache(1, capacity)
        for chunk, positions, _ in prefill_chunks([ids], min(self.options.prefill_chunk, LOGIT_ROWS), capacity):
            step = StepInput(chunk, positions, capacity, "prefill", None)
            logits, caches, record = self._step(step, caches)
            stats.steps.append(record)
            out.append(logits[0, : np.count_nonzero(positions[0] < capacity)])
        self._finish(stats)
        return np.concatenate(out)

    def steps(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int = 64, seed: int | None = None, **sampling
    ) -> Steps:
        """The step-by-step form of `generate`: yields after every step; `.send(rows)` stops rows early."""
        chosen = Sampling(**sampling, seed=self.options.seed if seed is None else seed)
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens {max_new_tokens} must be at least 1")
        prompts = [list(map(int, prompt)) for prompt in prompts]
        check_prompts(prompts, max_new_tokens, self.config.vocab_size, self.max_context)
        capacity = capacity_for(prompts, max_new_tokens, self.max_context)
        self._check_ready(len(prompts), capacity)
        return self._run(prompts, capacity, max_new_tokens, chosen)

    def _run(self, prompts, capacity: int, max_new_tokens: int, sampling: Sampling) -> Steps:
        stats = self._start(len(prompts), capacity)
        inner = generate_steps(
            self._step,
            self._init_cache,
            prompts,
            new_tokens=max_new_tokens,
            sampling=sampling,
            eos=self.eos,
            chunk=self.options.prefill_chunk,
            max_context=self.max_context,
        )
        stopped = None
        try:
            while True:
                emitted = inner.send(stopped)
                stats.steps.append(emitted.stats)
                stats.new_tokens += len(emitted.tokens)
                stopped = yield emitted
        except StopIteration:
            pass
        finally:
            if not sys.is_finalizing():  # left suspended at the interpreter's end, when jax is no longer there
                self._finish(stats)
        return stats

    def generate(self, prompts: Sequence[Sequence[int]], *, stop: Sequence[str] = (), **options) -> Generation:
        """New tokens for each prompt of token ids.

        Args:
          stop: strings that end a text, which needs a tokenizer; the tokens of the text up to the one that completed a
            stop string are returned.
          options: `max_new_tokens` (64), `seed` (the EngineConfig's), and how tokens are chosen: `temperature` (0:
            greedy), `top_k` (0: all) and `top_p` (1: all) of `Sampling`.
        """
        if stop and self.tokenizer is None:
            raise UserError("stop strings need a tokenizer, and this checkpoint has none")
        tokens: list[list[int]] = [[] for _ in prompts]
        reasons = ["length"] * len(prompts)
        run = self.steps(prompts, **options)
        stopped = None
        while True:
            try:
                emitted = run.send(stopped)
            except StopIteration as end:
                return Generation(tokens, reasons, end.value)
            stopped = []
            for row, token in emitted.tokens:
                tokens[row].append(token)
                reasons[row] = emitted.finished.get(row, reasons[row])
                if stop and any(word in self.tokenizer.decode(tokens[row]) for word in stop):
                    reasons[row] = "stop"
                    stopped.append(row)

    def _step(self, step: StepInput, caches: list) -> tuple[np.ndarray, list, StepStats]:
        """One forward pass, once more with fewer slots where the device's memory runs out.

        `caches` then has those of the layers that were done: what a step writes again is the same.
        """
        return with_fewer_slots(lambda: self._forward.forward(step, caches), lambda why: self._give_up(why, caches))

    def _init_cache(self, batch: int, capacity: int) -> list:
        init_cache = self._parts.model.init_cache
        return with_fewer_slots(lambda: init_cache(batch, capacity), lambda why: self._give_up(why, []))

    def _give_up(self, why: str, caches: list) -> None:
        if any(array.is_deleted() for array in jax.tree.leaves(caches)):
            raise DeviceError(f"the device's memory ran out in the middle of a layer ({why}), and its cache is lost")
        self._parts.give_up_slots(why)

    def close(self) -> None:
        """Stops the worker threads; the engine cannot be used afterwards."""
        self._closed = True
        self._parts.close()

    def _check_ready(self, batch: int, capacity: int) -> None:
        if self._closed:
            raise UserError("the engine is closed: its worker threads have ended; load it again")
        reserved = self._parts.footprint
        needed = self._parts.model.cache_bytes(batch, capacity)
        if self.options.vram_budget is not None and (needed > reserved.kv or batch > self.options.max_batch):
            raise UserError(
                f"{batch} sequences of up to {capacity} tokens need {budget.readable(needed)} of cache, but "
                f"vram_budget reserved {budget.readable(reserved.kv)} for {self.options.max_batch} of "
                f"{self.max_context}; raise max_batch"
            )

    def _start(self, batch: int, capacity: int) -> RunStats:
        parts = self._parts
        stats = parts.new_stats()
        parts.clock.overshoot(reset=True)
        self._counters, self._predicted = parts.counters(), parts.predicted()
        self._switches = len(self._forward.switches)
        footprint, stats.host_bytes = parts.footprint, self.store.nbytes
        if self.options.cost_shape is not None and parts.costs is not None:
            stats.host_bytes = self.store.num_layers * self.store.num_experts * parts.costs.expert_bytes
        else:
            footprint = dataclasses.replace(footprint, kv=parts.model.cache_bytes(batch, capacity))
        stats.peak_device_bytes = footprint.total
        return stats

    def _finish(self, stats: RunStats) -> None:
        self._forward.synchronize()
        parts = self._parts
        stats.overshoot = parts.clock.overshoot()
        stats.switches = [switch._asdict() for switch in self._forward.switches[self._switches :]]
        before, after = self._counters, parts.counters()
        stats.prefetch = PrefetchStats(
            *(
                getattr(after, f"prefetch_{name.name}") - getattr(before, f"prefetch_{name.name}")
                for name in dataclasses.fields(PrefetchStats)
                if name.name != "accuracy"
            ),
            accuracy={
                str(distance): (hits - hits_before) / (tries - tries_before)
                for distance, ((tries_before, hits_before), (tries, hits)) in enumerate(
                    zip(self._predicted, parts.predicted()), 1
                )
                if tries > tries_before
            },
        )
        measured = device_memory.peak_bytes(parts.device)
        if measured is not None and self.options.cost_shape is None:
            stats.peak_device_bytes = measured
        stats.slots, stats.slots_given_up = parts.slots, parts.slots_given_up
        self._last_stats = stats
