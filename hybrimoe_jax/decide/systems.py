"""Systems: named bundles of placement, cache policy, scheduler and prefetcher, as published engines choose them.

  hybrimoe       MRS cache, three-lane scheduler, impact-driven prefetch over three layers (HybriMoE, arXiv 2504.05897)
  ktransformers  static placement by frequency, the CPU computes what is not resident
  adapmoe        device only: LRU cache, misses are fetched, the next layer's predicted misses are prefetched
  llamacpp       whole layers are resident (the last ones, as `--n-gpu-layers` has it), the CPU computes the others
  fiddler        the most popular experts of all layers together stay; a miss goes where it alone is done first, CPU or
                 link and device
  powerinfer     the same placement, the CPU computes what is not resident (PowerInfer's hot and cold, by expert instead
                 of by neuron)
  freetoken      slots that all layers share, LRU; misses shared between link and CPU by bandwidth; no prefetch;
                 prompts: whole layers are streamed through two buffers and the device runs everything (see
                 `layer_stream`)
  on-demand      device only: an LRU cache, every miss is fetched and kept, no prefetch (Mixtral-offloading without its
                 speculation)
  device-only    device only, no cache management: a static resident set, everything else is streamed each time and not
                 kept (layer offloading as in Accelerate or DeepSpeed inference, expert by expert)
  cpu-only       no slots: the CPU computes every routed expert

Each part can be replaced: `get_system("hybrimoe").override(cache="lru")`.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from hybrimoe_jax import arguments
from hybrimoe_jax.decide.cache import policy_rule
from hybrimoe_jax.decide.prefetch.predictors import RECORDED, predictor_rule
from hybrimoe_jax.decide.registry import Rule
from hybrimoe_jax.decide.schedule import RULES, get_scheduler
from hybrimoe_jax.errors import UserError, shown

PREFETCH_MODES = ("none", "next-layer", "impact")
SCOPES = ("layer", "pooled")
PLACEMENTS = ("uniform", "popular", "whole-layers", "none")
GUARDS = ("value", "expected", "none")
MAX_DEPTH = 6
"""Layers that `lookahead="adaptive"` looks ahead at most."""
MOST_LOOKAHEAD = 8
"""Layers that a user may ask for."""


def check_lookahead(lookahead: Any) -> Literal["adaptive"] | int:
    """A number of layers within range, or "adaptive"; UserError for anything else."""
    if isinstance(lookahead, str) and lookahead == "adaptive":
        return "adaptive"
    if isinstance(lookahead, str):
        raise UserError(f'lookahead {shown(lookahead)} must be "adaptive" or a number of layers, at least 0')
    layers = arguments.whole("lookahead", lookahead, most=None)
    if not 0 <= layers <= MOST_LOOKAHEAD:
        raise UserError(f"lookahead {shown(layers)} is outside 0..{MOST_LOOKAHEAD}")
    return layers


RULE_PARTS: dict[str, Callable[[Any], Rule]] = {
    "cache": policy_rule,
    "scheduler": RULES.resolve,
    "predictor": predictor_rule,
}
"""What makes a `Rule` of a part that is one."""


@dataclasses.dataclass(frozen=True)
class System:
    """What a system decides by. UserError for an unknown part.

    Attributes:
      name: what it is called; overrides keep it.
      cache, scheduler, predictor: given as a name, a class or what a class gives (see `registry`); kept as a `Rule`,
        which is a name that knows its class. A predictor may also be "recorded:TRACE".
      prefetch: "none"; "next-layer": the next layer's predicted misses by score; "impact": by simulated gain, see
        `prefetch`.
      lookahead: layers ahead that are predicted (0 without prefetch, 1 for next-layer); "adaptive": as few as hide a
        transfer, at most MAX_DEPTH.
      placement: how slots are shared out: "uniform" (the same number in each layer), "popular" (to the most frequent
        experts of all layers together; uniform where frequencies are unknown), "whole-layers" or "none".
      guard: which residents a prefetch may not evict because they are hotter: those whose value is "expected" to be
        larger than the candidate's once the predicted step has come, those whose "value" is larger already now (strict:
        where every miss is fetched, all residents are hotter than all candidates, and next to nothing is prefetched),
        or "none".
      scope: "layer": each layer has slots of its own; "pooled": all layers share them, see `pool`.
      stream_prefill: chunks of prompts run on the device, whole layers being streamed through two buffers, see
        `layer_stream`; the scheduler and the prefetcher then decide in decoding only.
    """

    name: str
    cache: Any
    scheduler: Any
    prefetch: Literal["none", "next-layer", "impact"] = "none"
    lookahead: int | Literal["adaptive"] = 0
    placement: Literal["uniform", "popular", "whole-layers", "none"] = "uniform"
    guard: Literal["value", "expected", "none"] = "expected"
    predictor: Any = "router-reuse"
    scope: Literal["layer", "pooled"] = "layer"
    stream_prefill: bool = False

    def __post_init__(self) -> None:
        for part, resolve in RULE_PARTS.items():
            object.__setattr__(self, part, resolve(getattr(self, part)))
        for field, what, known in (
            ("prefetch", "prefetch", PREFETCH_MODES),
            ("guard", "guard", GUARDS),
            ("scope", "cache scope", SCOPES),
            ("placement", "placement", PLACEMENTS),
        ):
            arguments.choice(what, getattr(self, field), known)
        arguments.text("a system's name", self.name)
        object.__setattr__(self, "stream_prefill", arguments.flag("stream_prefill", self.stream_prefill))
        object.__setattr__(self, "lookahead", check_lookahead(self.lookahead))
        if self.prefetch == "none":
            object.__setattr__(self, "lookahead", 0)
        elif self.prefetch == "next-layer":
            object.__setattr__(self, "lookahead", min(self.max_distance, 1))

    @property
    def max_distance(self) -> int:
        """Layers ahead that are predicted at most."""
        return MAX_DEPTH if self.lookahead == "adaptive" else self.lookahead

    @property
    def recording(self) -> str | None:
        """The trace that the predictor is counted on, if it is `recorded:TRACE`."""
        name: Rule = self.predictor
        return name.removeprefix(RECORDED) if name.startswith(RECORDED) else None

    @property
    def uses_cpu(self) -> bool:
        """Whether the CPU may be given routed experts."""
        return get_scheduler(self.scheduler).uses_cpu

    @property
    def fetches(self) -> bool:
        """Whether experts ever cross the link after the start."""
        return get_scheduler(self.scheduler).uses_link or self.max_distance > 0 or self.stream_prefill

    def slots_per_layer(
        self,
        cache_ratio: float,
        num_layers: int,
        num_experts: int,
        frequencies: Sequence[Sequence[float]] | None = None,
    ) -> list[int]:
        """Slots of each MoE layer: floor(ratio * experts), or whole layers within the ratio, the last ones first."""
        if not 0 <= cache_ratio <= 1:
            raise UserError(f"cache ratio {cache_ratio} is outside 0..1")
        if self.placement == "whole-layers":
            return self.slots_for_total(_floor(cache_ratio * num_layers) * num_experts, num_layers, num_experts)
        return self.slots_for_total(
            _floor(cache_ratio * num_experts) * num_layers, num_layers, num_experts, frequencies
        )

    def slots_for_total(
        self, total: int, num_layers: int, num_experts: int, frequencies: Sequence[Sequence[float]] | None = None
    ) -> list[int]:
        """The same for a number of slots in all, for example what a byte budget leaves room for."""
        if total < 0:
            raise UserError(f"{total} slots: the number must be at least 0")
        if self.placement == "none":
            return [0] * num_layers
        if self.placement == "whole-layers":
            whole = min(total // num_experts, num_layers)
            return [0] * (num_layers - whole) + [num_experts] * whole
        if self.placement == "popular" and frequencies is not None:
            order = sorted(
                (
                    (-count, layer, expert)
                    for layer, counts in enumerate(frequencies)
                    for expert, count in enumerate(counts)
                )
            )
            slots = [0] * num_layers
            for _, layer, _ in order[:total]:
                slots[layer] += 1
            return slots
        if self.scope == "pooled" and num_layers:
            total = min(total, num_layers * num_experts)
            return [total // num_layers + (layer < total % num_layers) for layer in range(num_layers)]
        return [min(total // num_layers, num_experts)] * num_layers

    def override(
        self,
        *,
        cache: Any = None,
        scheduler: Any = None,
        prefetch: str | None = None,
        lookahead: int | str | None = None,
        guard: str | None = None,
        predictor: Any = None,
        scope: str | None = None,
        stream_prefill: bool | None = None,
    ) -> System:
        """This system with the given parts replaced; None keeps a part.

        A prefetcher without a lookahead gets its usual one (3 layers by impact, as the paper; 1 for next-layer);
        lookahead 0 turns prefetch off.
        """
        if prefetch is not None:
            arguments.choice("prefetch", prefetch, PREFETCH_MODES)
        if prefetch not in (None, "none") and not self.lookahead and lookahead is None:
            lookahead = 3  # of which next-layer takes 1
        parts: dict[str, Any] = {"cache": cache, "scheduler": scheduler, "prefetch": prefetch, "lookahead": lookahead}
        parts |= {"guard": guard, "predictor": predictor, "scope": scope, "stream_prefill": stream_prefill}
        return dataclasses.replace(self, **{part: value for part, value in parts.items() if value is not None})


def _floor(slots: float) -> int:
    """Floor that forgives binary fractions: 0.29 of 100 is 29."""
    return math.floor(slots + 1e-9)


SYSTEMS: dict[str, System] = {
    system.name: system
    for system in (
        System("hybrimoe", "mrs", "paper", prefetch="impact", lookahead=3),
        System("ktransformers", "static", "cpu-misses"),
        System("adapmoe", "lru", "device-only", prefetch="next-layer", lookahead=1, guard="none"),
        System("llamacpp", "static", "cpu-misses", placement="whole-layers"),
        System("fiddler", "static", "cheaper", placement="popular"),
        System("powerinfer", "static", "cpu-misses", placement="popular"),
        System("freetoken", "lru", "bandwidth-split", scope="pooled", stream_prefill=True),
        System("on-demand", "lru", "device-only"),
        System("device-only", "static", "device-only"),
        System("cpu-only", "static", "cpu-misses", placement="none"),
    )
}
"""The systems by name."""


def get_system(name: str | System) -> System:
    """The system called `name`, or the one that is given; UserError listing the names."""
    if isinstance(name, System):
        return name
    if not isinstance(name, str) or name not in SYSTEMS:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UserError(f"system {shown(name)} is unknown (known: {', '.join(SYSTEMS)})")
    return SYSTEMS[name]


SIMULATED = ("oracle", "belady")
"""Systems that know the steps to come, of the simulator alone (`simulate.bound`)."""


def system(name: str, base: str | System = "hybrimoe", **parts: Any) -> System:
    """A system of one's own, for wherever a system's name is taken.

    Args:
      name: what it is called in results; none of `SYSTEMS`.
      base: the system whose parts it has where `parts` replace none, see `System.override`.

    As in `system("mine", cache=Mine(decay=0.9), scheduler="mine:Half")`.
    """
    if not arguments.text("system", name).strip():
        raise UserError("system: give yours a name")
    if name in (*SYSTEMS, *SIMULATED):
        raise UserError(f"system {shown(name)} is there already; call yours by another name")
    arguments.names(f"system {shown(name)}", parts, list(inspect.signature(System.override).parameters)[1:], "part ")
    return dataclasses.replace(get_system(base).override(**parts), name=name)
