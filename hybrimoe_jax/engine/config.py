"""Runtime choices: one small frozen dataclass, every field a flag of `python -m hybrimoe_jax.generate`.

Imports no jax.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

from hybrimoe_jax import arguments
from hybrimoe_jax.decide.prefetch.predictors import predictor_rule
from hybrimoe_jax.decide.systems import PREFETCH_MODES, SCOPES, System, check_lookahead, get_system
from hybrimoe_jax.errors import UserError, shown
from hybrimoe_jax.machine.paced import PacedDevice, check_device, parse_device
from hybrimoe_jax.machine.shapes import parse_cost_shape

EXECUTORS = ("overlapped", "callback", "dense")
CLOCKS = ("wall", "virtual")
KERNELS = ("auto", "reference", "onednn", "native")
DEVICE_KERNELS = ("auto", "xla", "cuda")
AUTO = "auto"
PRECISIONS = ("float32", "bfloat16")
HOST_MEMORY = ("auto", "plain", "mapped", "pinned")
SLOTS = ("auto", "separate", "stacked")
CHOICES = {
    "executor": EXECUTORS,
    "host_kernel": KERNELS,
    "device_kernel": DEVICE_KERNELS,
    "host_memory": HOST_MEMORY,
    "slots": SLOTS,
    "clock": CLOCKS,
    "precision": PRECISIONS,
    "prefetch": PREFETCH_MODES,
    "cache_scope": SCOPES,
}
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@arguments.named_fields
@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class EngineConfig:
    """How the engine places, fetches and computes experts. None means: what the system or the machine suggests.

    Attributes:
      system: a named bundle of policies (`hybrimoe_jax.decide.systems`), or one of yours (`decide.systems.system`).
      cache_ratio: each MoE layer gets floor(cache_ratio * experts) slots in device memory; 0.25 if neither it nor a
        budget is set.
      vram_budget: device bytes (int or "4GiB") for dense weights, KV cache, staging, workspace and slots; instead of
        cache_ratio. "auto": what is free on a GPU. jax's allocator keeps to it where the engine is loaded before any
        other use of jax.
      cache_scope: replaces the system's: "layer", each layer has slots of its own, or "pooled", all layers share them.
      cache, scheduler, prefetch, lookahead, predictor: replace one part of the system (`prefetch`: "impact",
        "next-layer" or "none"; `lookahead`: layers, or "adaptive": as few as hide a transfer, at most 6). Cache,
        scheduler and predictor are names, classes, or classes with parameters (`decide.registry`); a predictor may
        also be "recorded:TRACE".
      stream_prefill: whether chunks of prompts run on the device, whole layers streamed through two buffers that a
        vram_budget reserves;
        None: as the system has it (freetoken does).
      executor: "overlapped" (fast), "callback" (one jitted call a layer with `jax.pure_callback`), "dense" (oracle).
      host_kernel: "reference" (numpy), "onednn", "native", or "auto" (the best of them that is installed).
      device_kernel: what computes quantised experts on the device for up to 8 tokens at once: "cuda", kernels of our
        own for an NVIDIA GPU (`models.packed_cuda`); "xla"; or "auto": cuda on a GPU that computes a small expert with
        it as XLA does. On the CPU backend "xla" leaves them to the native kernels.
      host_memory: of the experts on the host, for copies to the device: "plain", "mapped" (registered with the device),
        "pinned" (in its own kind of host memory), or "auto": what the profile found the fastest, else mapped on a GPU.
        A device that refuses gives one warning, and memory stays plain.
      slots: how slots lie in device memory: "separate", a buffer each, "stacked", one buffer in which programs find the
        residents by themselves, or "auto": stacked on a GPU and on a paced device, separate elsewhere and with the
        callback executor.
      precision: of the products of prompts on a GPU, from 16 tokens on: "float32", or "bfloat16", which rounds both
        operands as most engines do and takes a sixth of the arithmetic. The CPU backend refuses it.
      threads: cores for XLA and host experts together; all of them if None. XLA's part is set once, when jax starts.
      max_context: longest sequence, prompt and reply together; at most the model's own limit.
      max_batch: sequences whose KV cache a vram_budget reserves.
      prefill_chunk: tokens of a prompt computed at once.
      seed: of sampling.
      profile: costs to plan with instead of the warm-up at load: a file that `generate --profile` wrote, or a
        machine profile (`machine.profile`) by name or file.
      clock: "wall", or "virtual": times are those of the profile's machine and not of this one; the answers are the
        same.
      device: "auto", jax's own, or "paced:PROFILE[:SLOWDOWN]": XLA's CPU backend, slowed until its programs, its
        transfers and the host's experts take as long as on the profile's machine, times the slowdown
        (`machine.paced`). The clock is the wall; the answers are the same.
      cost_shape: "NAME[:FORMAT]", a full-size model (`machine.shapes`) and its experts' format ("int4-g64" if none is
        given): the virtual clock, or the paced device, takes that model's costs, layer for layer and expert for
        expert, and the statistics count its bytes. The model that runs, its layers and its tokens stay as they are.
      start_cache: where compiled programs and measurements are kept for the next start: "off", a folder, or "default",
        the platform's cache folder (or what HYBRIMOE_START_CACHE says). Anything but "off" has jax keep programs for
        the whole process. The command's default is "default".
      measure_again: measure at load whatever is kept.
      lazy: read experts from disk on first use instead of at load.
      verify: check the hash of all that is read, not its checksum alone.
      debug: check on every step that each slot holds the expert it should (slow).
    """

    system: str | System = "hybrimoe"
    cache_ratio: float | None = None
    vram_budget: int | str | None = None
    cache: Any = None
    cache_scope: str | None = None
    scheduler: Any = None
    prefetch: str | None = None
    lookahead: int | str | None = None
    predictor: Any = None
    stream_prefill: bool | None = None
    executor: str = "overlapped"
    host_kernel: str = "auto"
    device_kernel: str = "auto"
    host_memory: str = "auto"
    slots: str = "auto"
    precision: str = "float32"
    threads: int | None = None
    max_context: int | None = None
    max_batch: int = 1
    prefill_chunk: int = 512
    seed: int = 0
    profile: Any = None
    clock: str = "wall"
    device: str = "auto"
    cost_shape: str | None = None
    start_cache: str = "off"
    measure_again: bool = False
    lazy: bool = False
    verify: bool = False
    debug: bool = False

    def __post_init__(self):
        for name, check in CHECKS.items():
            if getattr(self, name) is not None or name not in OPTIONAL:
                object.__setattr__(self, name, check(name, getattr(self, name)))
        if self.device_kernel == "cuda" and self.executor == "dense":
            raise UserError(f"the dense executor is the reference: it takes no device_kernel {self.device_kernel}")
        if self.clock == "virtual" and (self.profile is None or self.executor == "dense"):
            raise UserError("the virtual clock needs a profile, whose machine it is, and an executor other than dense")
        if check_device(self.device) is not None:
            self._check_paced()
        if self.slots == "stacked" and self.executor == "callback":
            raise UserError("the callback executor hands experts over one by one: it takes no stacked slots")
        if self.cost_shape is not None:
            self._check_cost_shape(self.cost_shape)
        # unknown parts of a system are refused here, before anything is loaded
        predictor_rule(get_system(self.system).predictor if self.predictor is None else self.predictor, live=True)
        system = self.chosen_system
        for part in ("cache", "scheduler", "predictor"):
            if getattr(self, part) is not None:
                object.__setattr__(self, part, getattr(system, part))
        self._check_sizes()

    @property
    def chosen_system(self) -> System:
        """The system with its parts replaced."""
        return get_system(self.system).override(
            cache=self.cache,
            scheduler=self.scheduler,
            prefetch=self.prefetch,
            lookahead=self.lookahead,
            predictor=self.predictor,
            scope=self.cache_scope,
            stream_prefill=self.stream_prefill,
        )

    def __repr__(self) -> str:
        """What differs from the defaults."""
        chosen = (field for field in dataclasses.fields(self) if getattr(self, field.name) != field.default)
        return f"EngineConfig({', '.join(f'{field.name}={getattr(self, field.name)!r}' for field in chosen)})"

    def _check_sizes(self) -> None:
        if self.cache_ratio is not None and self.vram_budget is not None:
            raise UserError("give cache_ratio or vram_budget, not both: the budget decides the ratio")
        if self.cache_ratio is not None and not 0 <= self.cache_ratio <= 1:
            raise UserError(f"cache_ratio {self.cache_ratio} is outside 0..1")
        self.budget_bytes  # noqa: B018 - a malformed size is refused here, not at load

    @property
    def paced(self) -> PacedDevice | None:
        """The paced device; None where the device is jax's own."""
        return parse_device(self.device)

    def _check_paced(self) -> None:
        if self.executor != "overlapped":
            raise UserError(
                f"device {self.device} wants the overlapped executor, whose work is done side by side; not "
                f"{self.executor}"
            )
        if self.clock == "virtual":
            raise UserError(
                f"device {self.device} is watched by the wall clock: leave out the device, or clock virtual"
            )
        if self.profile is not None:
            raise UserError(f"device {self.device} names the profile to plan with: leave out the other one")

    def _check_cost_shape(self, cost_shape: str) -> None:
        if self.clock != "virtual" and self.paced is None:
            raise UserError("cost_shape needs the virtual clock or a paced device: else things take the time they take")
        if self.vram_budget is not None:
            raise UserError("cost_shape takes no vram_budget, which is for the model that runs: give cache_ratio")
        parse_cost_shape(cost_shape)

    @property
    def budget_bytes(self) -> int | None:
        """None where there is no budget, and for "auto", which only the device knows."""
        return None if self.vram_budget in (None, AUTO) else parse_bytes(self.vram_budget, "vram_budget")


def parse_bytes(size: int | str, what: str) -> int:
    """Bytes of 4096, "4096", "1.5GiB" or "800MB"; UserError for anything else."""
    if isinstance(size, str):
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", size)
        if not match or match[2].lower() not in _UNITS:
            raise UserError(f'{what} {shown(size)} is not a size; write bytes or e.g. "4GiB", "800MB"')
        value = float(match[1]) * _UNITS[match[2].lower()]
    else:
        value = arguments.number(what, size)
    if not 1 <= value < 2**63:
        raise UserError(f"{what} {str(size)[:40]} must be at least a byte and less than 8 EiB")
    return int(value)


def _folder_or_word(name: str, value: Any) -> str:
    if isinstance(value, str) and not value:
        raise UserError(f'{name} is empty: give a folder, "default" or "off"')
    return arguments.path(name, value)


def _profile(name: str, value: Any) -> Any:
    """A name, a file, or costs as an object."""
    return value if hasattr(value, "expert_bytes") else arguments.path(name, value)


def _size(name: str, value: Any) -> int | str:
    return arguments.text(name, value) if isinstance(value, str) else int(arguments.number(name, value))


_at_least_1 = functools.partial(arguments.whole, least=1)
CHECKS: dict[str, Callable[[str, Any], Any]] = {
    **{name: functools.partial(arguments.choice, known=known) for name, known in CHOICES.items()},
    **dict.fromkeys(("max_context", "max_batch", "prefill_chunk"), _at_least_1),
    **dict.fromkeys(("stream_prefill", "measure_again", "lazy", "verify", "debug"), arguments.flag),
    "threads": arguments.workers,
    "seed": functools.partial(arguments.whole, least=0),
    "cache_ratio": arguments.number,
    "vram_budget": _size,
    "lookahead": lambda _, value: check_lookahead(value),
    "profile": _profile,
    "start_cache": _folder_or_word,
    "device": arguments.text,
    "cost_shape": arguments.text,
}
"""What each field may be, by its name."""
OPTIONAL = {field.name for field in dataclasses.fields(EngineConfig) if field.default is None}
