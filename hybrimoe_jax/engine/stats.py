"""What happened, as plain dataclasses: per layer, per step, per call. Collected by the engine; imports no jax.

Definitions: hit rate = activated (expert, MoE layer, step) found resident when the step was planned, over all
activated; a prefetch is useful if its target step used it after it had landed in time, late if that step had to wait
for it, wasted otherwise. Lane times are measured on the engine's clock: `cpu` is the time host workers computed
experts, `link` from the issue of a transfer until it was seen landed, `device` from the dispatch of a layer's
experts until the engine saw them finished, so the last two are upper bounds.
"""

from __future__ import annotations

import dataclasses
import html
import statistics
from typing import TYPE_CHECKING, Any

from hybrimoe_jax import tables

if TYPE_CHECKING:
    from hybrimoe_jax.engine.stats_plots import StatsPlots


@dataclasses.dataclass
class Lanes:
    """Busy seconds of each lane."""

    cpu: float = 0.0
    device: float = 0.0
    link: float = 0.0


@dataclasses.dataclass
class LayerStats:
    """One MoE layer in one step. Tuples hold experts, in the order in which they ran.

    Attributes:
      layer: counted over MoE layers, from 0.
      loads: tokens of each activated expert.
      hits, misses: activated experts found resident when the step was planned, and not.
      cpu, device: who computed them.
      fetched: experts that crossed the link because this step needed them on the device.
      bytes_h2d: bytes of experts moved to the device, prefetches and whole layers included.
      seconds: the layer's time, its attention and router included.
      lanes: busy seconds within it.
      prefetch_useful, prefetch_late, prefetch_wasted: this layer's prefetched experts, judged.
      layer_streamed: experts whose transfer with their whole layer began here; `bytes_h2d` has them.
    """

    layer: int
    loads: dict[int, int]
    hits: int
    misses: int
    cpu: tuple[int, ...]
    device: tuple[int, ...]
    fetched: tuple[int, ...]
    bytes_h2d: int
    seconds: float
    lanes: Lanes
    prefetch_useful: tuple[int, ...] = ()
    prefetch_late: tuple[int, ...] = ()
    prefetch_wasted: tuple[int, ...] = ()
    layer_streamed: int = 0


@dataclasses.dataclass
class StepStats:
    """One forward pass over a chunk of a prompt ("prefill") or one new token a row ("decode").

    Attributes:
      phase: "prefill" or "decode".
      tokens: real ones, without padding.
      seconds: its time, compilation included.
      compile_s: of that, tracing and compiling.
      fused: whether it ran as one program.
      layers: one record a MoE layer. Those of a fused decode step whose next token is drawn are filled in when the next
        step runs, or the run ends.
    """

    phase: str
    tokens: int
    seconds: float
    compile_s: float
    layers: list[LayerStats]
    fused: bool = False

    def total(self, name: str) -> float:
        return sum(getattr(layer, name) for layer in self.layers)


@dataclasses.dataclass
class PrefetchStats:
    """Prefetches by what became of them.

    Attributes:
      issued: how many were started.
      useful, late, wasted: how many were used after landing in time, used but waited for, neither.
      useful_s, late_s, wasted_s: seconds that those transfers held the link, counted when they end.
      wait_s: how long layers waited for late ones.
      accuracy: by distance, the share of predicted experts that were activated.
    """

    issued: int = 0
    useful: int = 0
    late: int = 0
    wasted: int = 0
    useful_s: float = 0.0
    late_s: float = 0.0
    wasted_s: float = 0.0
    wait_s: float = 0.0
    accuracy: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class RunStats:
    """Everything about one `generate` call. Times in seconds on `clock`; compilation is reported apart.

    Attributes:
      system, executor: what ran.
      cache_ratio, slots: the ratio that the slots amount to; slots of each MoE layer.
      slots_given_up: since the device's memory ran out.
      clock: "wall", or "virtual": times of the profile's machine, computed.
      host_kernel, device_kernel: what computed experts on the CPU and on the device.
      cores: given to XLA ("device") and to the host experts ("host").
      costs: the cost model that the planner used.
      expert_format: the weight format of routed experts on the device.
      cost_shape: the model whose times and bytes these are, if not the one that ran; its device bytes are those of
        slots and staging alone.
      device: the device's platform, or "paced": this machine slowed to `profile`, with every duration `slowdown` times
        as long.
      overshoot: of a paced device, by lane, how much later than they should its programs, transfers and host experts
        ended: `count` of them, `sum_s` seconds together, `most_s` at most; of its programs also `overrun`, how many
        took longer than they should, and `overran_s`, how much together.
      steps: a record of each step.
      prefetch: what became of prefetches.
      peak_device_bytes: dense weights, cache, staging and slots, under a budget the workspace too; on a GPU what its
        allocator reports.
      host_bytes: all routed experts in host memory.
      new_tokens: made in this call.
      switches: changes between decoding as one program and layer by layer, since steps had become slow: `to_fused`, and
        the seconds of a step that each way took, `fused_s` and `layered_s`.
    """

    system: str
    executor: str
    cache_ratio: float
    clock: str
    host_kernel: dict
    device_kernel: str
    cores: dict[str, int]
    costs: dict
    slots: list[int]
    expert_format: str = ""
    cost_shape: str | None = None
    device: str = ""
    profile: str | None = None
    slowdown: float | None = None
    overshoot: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    slots_given_up: int = 0
    steps: list[StepStats] = dataclasses.field(default_factory=list)
    prefetch: PrefetchStats = dataclasses.field(default_factory=PrefetchStats)
    peak_device_bytes: int = 0
    host_bytes: int = 0
    new_tokens: int = 0
    switches: list[dict] = dataclasses.field(default_factory=list)

    def _phase(self, phase: str) -> list[StepStats]:
        return [step for step in self.steps if step.phase == phase]

    @property
    def ttft_s(self) -> float | None:
        """Time to first token: all prefill steps, without compilation."""
        steps = self._phase("prefill")
        return sum(s.seconds - s.compile_s for s in steps) if steps else None

    def tbt_ms(self) -> dict[str, float] | None:
        """Time between tokens over the decode steps that compiled nothing: median and 90th percentile, milliseconds.

        Steps that ran in one call (see `engine.fused`) have an equal share of it each.
        """
        times = sorted(1e3 * s.seconds for s in self._phase("decode") if not s.compile_s)
        if not times:
            return None
        return {"median": statistics.median(times), "p90": times[min(len(times) - 1, int(0.9 * len(times)))]}

    @property
    def compile_s(self) -> float:
        """Seconds of tracing and compiling in these steps."""
        return sum(step.compile_s for step in self.steps)

    def total(self, name: str) -> float:
        """The sum of a number of `LayerStats` over all layers and steps."""
        return sum(step.total(name) for step in self.steps)

    @property
    def hit_rate(self) -> float | None:
        """`hits / (hits + misses)`; None where no expert was activated."""
        hits, misses = self.total("hits"), self.total("misses")
        return hits / (hits + misses) if hits + misses else None

    def lanes(self) -> Lanes:
        """Busy seconds over all layers and steps."""
        lanes = [layer.lanes for step in self.steps for layer in step.layers]
        return Lanes(sum(one.cpu for one in lanes), sum(one.device for one in lanes), sum(one.link for one in lanes))

    @property
    def note(self) -> str | None:
        """Why policies look alike, where they must."""
        moved = self.total("bytes_h2d") or any(layer.device for step in self.steps for layer in step.layers)
        if self.device != "cpu" or self.clock != "wall" or self.hit_rate is None or moved:
            return None
        return (
            "Nothing moved: this machine has no device but its CPU, so all policies look alike; to see them differ: "
            "--clock virtual --profile a6000-paper"
        )

    def in_short(self) -> str:
        """One line: what ran, how long it took and on which clock, how many hits."""
        ttft, tbt, hit_rate = self.ttft_s, self.tbt_ms(), self.hit_rate
        said = [f"{self.system}, {self.new_tokens} new tokens"]
        said += [] if ttft is None else [f"first after {1e3 * ttft:.4g} ms"]
        said += [] if tbt is None else [f"then {tbt['median']:.4g} ms each"]
        said += [] if hit_rate is None else [f"hit rate {hit_rate:.1%}"]
        return f"{', '.join(said)} ({self.times})"

    @property
    def times(self) -> str:
        """Which times these are, in a few words."""
        if self.device == "paced":
            slowed = f", {self.slowdown:g} times as long" if self.slowdown not in (None, 1) else ""
            return f"wall clock, paced to {self.profile}{slowed}"
        if self.clock == "virtual":
            return f"virtual clock, {self.costs.get('profile', 'as measured')}"
        return "wall clock, this machine"

    def table(self, by: str = "step") -> Any:
        """A DataFrame, or rows where pandas is not installed: who ran what, hits, bytes, prefetches, times of lanes.

        Args: by: "step", "layer", "step and layer", or "expert". Times are milliseconds on `clock`.
        """
        from hybrimoe_jax.engine import stats_table

        return tables.table(stats_table.rows_by(self, by))

    @property
    def plot(self) -> StatsPlots:
        """Pictures: `plot.hit_rate()`, `times()`, `lanes()`, `layers()`, `experts()`."""
        from hybrimoe_jax.engine.stats_plots import StatsPlots

        return StatsPlots(self)

    def __repr__(self) -> str:
        return f"<RunStats: {self.in_short()}>"

    def _repr_html_(self) -> str:
        from hybrimoe_jax.engine.stats_table import at_a_glance

        note = f"<p>{html.escape(self.note)}</p>" if self.note else ""
        return at_a_glance(self)._repr_html_() + note

    def summary(self) -> dict:
        """The record that `generate --stats json` prints (without the tokens)."""
        lanes = self.lanes()
        return {
            "ttft_s": self.ttft_s,
            "tbt_ms": self.tbt_ms(),
            "compile_s": self.compile_s,
            "hit_rate": self.hit_rate,
            "hits": int(self.total("hits")),
            "misses": int(self.total("misses")),
            "cpu_experts": sum(len(layer.cpu) for step in self.steps for layer in step.layers),
            "device_experts": sum(len(layer.device) for step in self.steps for layer in step.layers),
            "demand_fetches": sum(len(layer.fetched) for step in self.steps for layer in step.layers),
            "layer_streamed": int(self.total("layer_streamed")),
            "bytes_h2d": int(self.total("bytes_h2d")),
            "prefetch": dataclasses.asdict(self.prefetch),
            "lanes": {f"{k}_s": v for k, v in dataclasses.asdict(lanes).items()},
            "system": self.system,
            "executor": self.executor,
            "cache_ratio": self.cache_ratio,
            "slots": self.slots,
            "slots_given_up": self.slots_given_up,
            "expert_format": self.expert_format,
            "host_kernel": self.host_kernel,
            "device_kernel": self.device_kernel,
            "cores": self.cores,
            "clock": self.clock,
            "cost_shape": self.cost_shape,
            "device": self.device,
            "profile": self.profile,
            "slowdown": self.slowdown,
            "overshoot": self.overshoot,
            "costs": self.costs,
            "new_tokens": self.new_tokens,
            "fused_steps": sum(step.fused for step in self.steps),
            "switches": self.switches,
            "peak_device_bytes": self.peak_device_bytes,
            "host_bytes": self.host_bytes,
            "note": self.note,
        }
