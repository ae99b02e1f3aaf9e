"""`TorchOffload`: mixture-of-experts inference with offloading in PyTorch, to compare with.

The same converted checkpoint, the same planner, caches, schedulers and predictors (`decide`, which has no jax), the
same statistics. Importing this module imports no torch.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hybrimoe_jax import arguments
from hybrimoe_jax.decide.systems import System
from hybrimoe_jax.encoding import say
from hybrimoe_jax.engine.base import BaseEngine
from hybrimoe_jax.engine.call import Call, Totals
from hybrimoe_jax.engine.config import EngineConfig
from hybrimoe_jax.engine.inputs import StepInput
from hybrimoe_jax.engine.lanes.threads import available_cores
from hybrimoe_jax.engine.stats import RunStats, StepStats
from hybrimoe_jax.errors import UserError, shown

MODES = {"on-demand": "on-demand", "lru": "adapmoe", "static": "ktransformers", "hybrid": "hybrimoe"}
"""Modes by the system whose decisions they are; any other system's name, or a `System`, is a mode too."""
DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("float32", "bfloat16")
ABLATIONS = ("kernels", "forms", "pinned")
INSTALL = 'pip install "hybrimoe-jax[baseline]"'

_said: set[str] = set()
"""Notes that were shown in this process."""


def require_torch() -> Any:
    """The torch module; UserError with the command that installs it."""
    try:
        return importlib.import_module("torch")
    except ImportError:
        raise UserError(
            f"the PyTorch baseline needs torch, which is not installed: {INSTALL} (on a machine "
            "without a GPU PyTorch's build for CPUs first)"
        ) from None


class TorchOffload(BaseEngine):
    """Runs one model in PyTorch, its experts in host memory and, as slots allow, on the device.

    Args:
      checkpoint: a folder written by `python -m hybrimoe_jax.convert`, or an open one; the bundled model if None.
      mode: "on-demand" (every missing expert is fetched into an LRU cache), "lru" (that, and the next layer's experts
        are prefetched), "static" (a fixed resident set by the checkpoint's frequencies; the CPU computes the rest, as
        kTransformers), "hybrid" (our planner, whole), or any system of ours.
      cache_ratio, vram_budget, cache, scheduler, predictor, prefetch, lookahead, threads, max_context, max_batch,
        prefill_chunk, seed, profile, clock, cost_shape, verify, debug: as of `EngineConfig`.
      device: "auto" (a GPU where torch has one, else the CPU), "cpu", "cuda", or "paced:PROFILE[:SLOWDOWN]".
      precision: "float32": answers are the dense model's. "bfloat16": activations are rounded, as torch deployments do,
        and its fast kernels for bfloat16, int8 and int4 weights compute.
      without: what to leave out, to see what it brings: "kernels" (int4 ones), "forms" (of computing experts), "pinned"
        (host memory); prefetch="none" leaves out prefetching.

    Attributes: `notes`: what a reader of its figures must know; shown once on standard error. `given`: the arguments.
    `checkpoint`: the open one, whose experts all engines of it share.

    Raises UserError where torch is not installed and where the options cannot be met.
    """

    def __init__(
        self,
        checkpoint: Any = None,
        mode: str | System = "hybrid",
        *,
        device: str = "auto",
        precision: str = "float32",
        without: Sequence[str] = (),
        **options: Any,
    ):
        torch = require_torch()
        arguments.choice("precision", precision, PRECISIONS)
        without = [arguments.choice("without", what, ABLATIONS) for what in arguments.several("without", without, str)]
        device = arguments.text("device", device)
        arguments.names("the PyTorch engine", options, sorted(OPTIONS), "option ")
        self.given = {"mode": mode, "device": device, "precision": precision, "without": without, **options}
        system = MODES.get(mode, mode) if isinstance(mode, str) else mode
        paced = device.startswith("paced")
        chosen = EngineConfig(system=system, device=device if paced else "auto", **options)  # pyright: ignore
        self._device = torch.device("cpu" if paced else torch_device(torch, device))
        self.precision, self._torch = precision, torch
        from hybrimoe_jax.baselines.torch_assembly import assemble, system_of
        from hybrimoe_jax.checkpoint.reader import open_checkpoint
        from hybrimoe_jax.engine.load import bundled_model, checked_place
        from hybrimoe_jax.text.replies import eos_ids, warn_of_what_is_left_out

        system_of(chosen)
        checkpoint = checked_place(checkpoint)
        if checkpoint is None or isinstance(checkpoint, (str, Path)):
            checkpoint = open_checkpoint(bundled_model() if checkpoint is None else checkpoint)
        eos = eos_ids(checkpoint.generation_config, checkpoint.tokenizer, checkpoint.config)
        super().__init__(checkpoint.config, chosen, checkpoint.tokenizer, eos, lambda: Totals.of(self.planner))
        warn_of_what_is_left_out(checkpoint.generation_config, eos, self.config.vocab_size)
        self.checkpoint, self.format = checkpoint, checkpoint.format
        self.threads = self.options.threads or available_cores()
        torch.set_num_threads(self.threads)
        self._parts = assemble(checkpoint, self.options, self._device, precision, self.max_context, frozenset(without))
        self.notes = self._parts.notes
        for note in self.notes:
            if note not in _said:
                _said.add(note)
                say(f"PyTorch baseline: {note}")

    @property
    def planner(self):
        """The Planner."""
        return self._parts.forward.planner

    @property
    def costs(self):
        """What the planner works with: measured at load, or a profile's."""
        return self._parts.costs

    @property
    def experts(self):
        """What computes experts: `forms` by load, and what was `measured` of each."""
        return self._parts.experts

    def _end(self) -> None:
        self._parts.close()

    def _first_not_finite(self, tokens: Sequence[int]) -> str | None:
        from hybrimoe_jax.baselines.torch_not_finite import first_not_finite

        forward = self._parts.forward
        return first_not_finite(self._parts.model, forward.host_banks, forward.experts, tokens, self.max_context)

    def _step(self, call: Call, step: StepInput, caches: list) -> tuple[np.ndarray, list, StepStats]:
        self._check_open()
        self._calls.serve(call)
        return self._parts.forward.forward(step, caches)

    def _init_cache(self, batch: int, capacity: int) -> list:
        return self._parts.model.init_cache(batch, capacity)

    def _start(self, batch: int, capacity: int) -> Call:
        parts, options, paced = self._parts, self.options, self.options.paced
        self._torch.set_num_threads(self.threads)
        parts.overshoot(reset=True)
        experts = self.config.num_experts * len(parts.slots)
        footprint = parts.footprint
        if options.cost_shape is None:
            footprint = dataclasses.replace(footprint, kv=parts.model.cache_bytes(batch, capacity))
        stats = RunStats(
            system=parts.system.name,
            executor="torch",
            cache_ratio=sum(parts.slots) / experts,
            clock=options.clock,
            cost_shape=options.cost_shape,
            device=self._device.type if paced is None else "paced",
            profile=None if paced is None else paced.profile,
            slowdown=None if paced is None else paced.slowdown,
            host_kernel={"name": f"torch {self._torch.__version__}", **parts.experts.describe()},
            device_kernel=f"torch {self._torch.__version__}",
            cores={"total": self.threads, "device": self.threads, "host": self.threads},
            costs=parts.costs.describe(),
            slots=list(parts.slots),
            expert_format=self.format if self._parts.experts.kind.int4 else self.precision,
            peak_device_bytes=footprint.total,
            host_bytes=parts.host_bytes,
        )
        call = Call(stats)
        self._calls.serve(call)
        return call

    def _finish(self, call: Call) -> None:
        stats = self._calls.finish(call)
        stats.overshoot = self._parts.overshoot()
        if self._device.type == "cuda":
            stats.peak_device_bytes = self._torch.cuda.max_memory_allocated()
        self._last_stats = stats


OPTIONS = {
    *("cache_ratio", "vram_budget", "cache", "scheduler", "predictor", "prefetch", "lookahead", "cache_scope"),
    *("threads", "max_context", "max_batch", "prefill_chunk", "seed", "profile", "clock", "cost_shape"),
    *("verify", "debug", "stream_prefill"),
}
"""Those of `EngineConfig` that this engine has."""


def torch_device(torch: Any, device: str) -> str:
    """What torch calls it; UserError for one that is not there."""
    if device not in DEVICES:
        raise UserError(f'device {shown(device)} is unknown; say {", ".join(DEVICES)} or "paced:PROFILE[:SLOWDOWN]"')
    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise UserError("device cuda: torch finds no GPU; say cpu, or paced:PROFILE")
    return "cuda" if there and device != "cpu" else "cpu"
