"""Machine profiles: what a machine takes, figure by figure, each with its source; and the costs of one model on it.

A profile is JSON and knows no model: overheads in seconds, bandwidths in bytes per second, rates in operations per
second. Those that come with the package are in `profiles/`. `MachineCosts` makes from one, a `ModelShape` and a weight
format what a planner asks of `CostModel`, and what the virtual machine needs beyond that. W weights of b bytes, n
tokens:

  CPU expert     overhead, b / bandwidth and 2 W n / flops combined, and square W n^2; `cpu_first` more for the first
  device expert  overhead, b / bandwidth and 2 W n / flops combined
  MoE block      device_block, and where there are shared experts the same of them; it opens the device lane
  layer          the same of attention and router (bf16): the cache read once, scores by context
  transfer       latency + b / bandwidth, with the second bandwidth while the CPU computes

How a lane combines (`combine` in the file): "max", overhead and the larger of reading and computing; "sum", all three;
"hidden", the largest of the three, where launching a kernel takes longer than running it. `copies_wait` (in the file,
true or false): whether a transfer waits for the device's work that was queued before it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybrimoe_jax import arguments
from hybrimoe_jax.errors import UserError, is_name, shown, shown_name
from hybrimoe_jax.files import is_object, read_json
from hybrimoe_jax.machine.costs import CostModel, check_figure, is_profile, slower
from hybrimoe_jax.machine.origin import Machine, Origin
from hybrimoe_jax.machine.shapes import ModelShape

KIND, VERSION = "hybrimoe-jax machine profile", 1
FOLDER = Path(__file__).parent / "profiles"
PROFILES = tuple(sorted(path.stem for path in FOLDER.glob("*.json")))
DENSE_BYTES = 2
"""Dense weights and the cache are bfloat16 whatever the experts' format."""


@dataclasses.dataclass(frozen=True)
class Figures:
    """The figures of a machine; units in the module docstring. UserError where one is none."""

    cpu_overhead: float
    cpu_first: float
    cpu_bandwidth: float
    cpu_flops: float
    cpu_square: float
    device_block: float
    device_overhead: float
    device_bandwidth: float
    device_flops: float
    shared_overhead: float
    link_latency: float
    link_bandwidth: float
    link_bandwidth_cpu_busy: float
    layer_overhead: float
    look_overhead: float

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            check_figure(name, value, is_rate(name))
        if self.link_bandwidth_cpu_busy > self.link_bandwidth:
            raise UserError("link_bandwidth_cpu_busy must not be above link_bandwidth")


@dataclasses.dataclass(frozen=True)
class MachineProfile:
    """A named machine.

    Attributes:
      sources: (kind, where it comes from) of every figure.
      combine: how a lane combines, where that is not "max".
      copies_wait: whether a transfer waits for the device's work that was queued before it. A paced device does so.
      slowdown: how many times as long everything takes as on the machine itself.

    UserError where `combine` is something else.
    """

    name: str
    about: str
    figures: Figures
    sources: Mapping[str, tuple[str, str]]
    combine: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    copies_wait: bool = False
    slowdown: float = 1.0

    def __post_init__(self) -> None:
        if not is_object(self.combine):
            raise UserError(f"combine must be an object, not {shown(self.combine)}")
        for lane, how in self.combine.items():
            if lane not in ("cpu", "device") or how not in ("max", "sum", "hidden"):
                raise UserError(f"combine.{shown_name(lane)} is {shown(how)}; cpu and device may be max, sum or hidden")

    def costs(self, shape: ModelShape, fmt: str) -> MachineCosts:
        """What this machine takes for a model with experts in format `fmt`."""
        return MachineCosts(self, shape, fmt)

    def changed(self, **factors: float) -> MachineProfile:
        """The same machine with some figures multiplied, for what-if questions."""
        arguments.names("a machine profile", factors, [field.name for field in dataclasses.fields(Figures)], "figure ")
        changes = {n: getattr(self.figures, n) * arguments.number(n, f) for n, f in factors.items()}
        figures = dataclasses.replace(self.figures, **changes)
        said = " ".join(f"{name} x{factor:g}" for name, factor in factors.items())
        return dataclasses.replace(self, name=f"{self.name} ({said})" if said else self.name, figures=figures)

    def slowed(self, factor: float) -> MachineProfile:
        """The same machine with every duration `factor` times as long."""
        names = [field.name for field in dataclasses.fields(Figures)]
        slow = self.changed(**{name: 1 / factor if is_rate(name) else factor for name in names})
        return dataclasses.replace(slow, name=self.name, slowdown=self.slowdown * factor)


class MachineCosts:
    """One model on one machine; has the methods of `CostModel`, all in seconds."""

    shares_cores = False

    fetch_host = 0.0

    def __init__(self, profile: MachineProfile, shape: ModelShape, fmt: str):
        f = self._figures = profile.figures
        self.profile, self.shape, self.fmt, self._combine = profile, shape, fmt, profile.combine
        self.expert_bytes, self.copies_wait = shape.expert_bytes(fmt), profile.copies_wait
        self.look = f.look_overhead
        self.source = f"profile {profile.name}, {shape.name}, {fmt}{slower(profile.slowdown)}"
        self._transfer = tuple(
            f.link_latency + self.expert_bytes / b for b in (f.link_bandwidth, f.link_bandwidth_cpu_busy)
        )
        self._cpu: dict[int, float] = {}
        self._device: dict[int, float] = {}
        self._layer: dict[tuple[int, int], float] = {}

    def slowed(self, factor: float) -> MachineCosts:
        """The same model on the same machine with every duration `factor` times as long."""
        return MachineCosts(self.profile.slowed(factor), self.shape, self.fmt)

    def describe(self) -> dict[str, Any]:
        """Plain values, for statistics and records."""
        figures = dataclasses.asdict(self._figures)
        about: dict[str, Any] = {"profile": self.profile.name, "model": self.shape.name, "format": self.fmt}
        if self.profile.slowdown != 1:
            about["slowdown"] = self.profile.slowdown
        return {**about, "expert_bytes": self.expert_bytes, "combine": dict(self._combine), "figures": figures}

    def cpu(self, load: int, first: bool = False) -> float:
        """One expert on the CPU; `first` where nothing ran on it yet in this step."""
        seconds = self._cpu.get(load)
        if seconds is None:
            f, weights = self._figures, self.shape.expert
            read, work = self.expert_bytes / f.cpu_bandwidth, 2 * weights * load / f.cpu_flops
            seconds = self._combined("cpu", f.cpu_overhead, read, work) + f.cpu_square * weights * load**2
            self._cpu[load] = seconds
        return seconds + self._figures.cpu_first if first else seconds

    def device(self, load: int) -> float:
        """One resident expert on the device."""
        seconds = self._device.get(load)
        if seconds is None:
            overhead = self._figures.device_overhead
            seconds = self._device[load] = self._on_device(overhead, self.expert_bytes, self.shape.expert, load)
        return seconds

    def shared(self, tokens: int) -> float:
        """What opens the device lane of every MoE block."""
        seconds, weights = self._figures.device_block, self.shape.shared
        if weights:
            size = weights * self.expert_bytes / self.shape.expert
            seconds += self._on_device(self._figures.shared_overhead, size, weights, tokens)
        return seconds

    def transfer(self, cpu_busy: bool = False) -> float:
        """One expert over the link."""
        return self._transfer[cpu_busy]

    def layer(self, tokens: int, context: int = 0) -> float:
        """Everything between two MoE blocks, with `context` places of each token's cache to attend to."""
        key = tokens, context
        seconds = self._layer.get(key)
        if seconds is None:
            f, shape = self._figures, self.shape
            read = DENSE_BYTES * (shape.attention + shape.kv * context) / f.device_bandwidth
            work = 2 * tokens * (shape.attention + shape.scores * context) / f.device_flops
            if len(self._layer) > 100_000:
                self._layer.clear()
            seconds = self._layer[key] = self._combined("device", f.layer_overhead, read, work)
        return seconds

    def step(self, tokens: int) -> float:
        """What a step takes outside its MoE layers: leading dense layers for every token, logits for one."""
        leading, head = self.shape.leading, self.shape.head
        seconds = self._on_device(0.0, DENSE_BYTES * leading, leading, tokens) if leading else 0.0
        return seconds + self._on_device(0.0, DENSE_BYTES * head, head, 1)

    def _on_device(self, overhead: float, size: float, weights: int, tokens: int) -> float:
        f = self._figures
        return self._combined("device", overhead, size / f.device_bandwidth, 2 * weights * tokens / f.device_flops)

    def _combined(self, lane: str, overhead: float, read: float, work: float) -> float:
        how = self._combine.get(lane, "max")
        if how == "hidden":
            return max(overhead, read, work)
        return overhead + (read + work if how == "sum" else max(read, work))


def is_rate(figure: str) -> bool:
    """Whether a figure is so much per second, and not so many seconds."""
    return figure.endswith(("bandwidth", "flops", "cpu_busy"))


def load_profile(name: str | Path) -> MachineProfile:
    """A profile of the package by name, or from a file; UserError naming it and the first thing wrong."""
    name = arguments.path("profile", name)
    path = FOLDER / f"{name}.json" if name in PROFILES else Path(name)
    if not path.exists():
        raise UserError(f"profile {name}: neither a known one ({', '.join(PROFILES)}) nor a file that is there")
    raw = read_json(path, f"profile {name}: not a profile")
    if not is_object(raw) or raw.get("kind") != KIND:
        raise UserError(f"profile {name}: expected a JSON object of kind {KIND!r}")
    if raw.get("version") != VERSION:
        raise UserError(
            f"profile {name}: version {shown(raw.get('version'))} is not supported (this program reads {VERSION})"
        )
    figures, combine = raw.get("figures"), raw.get("combine", {})
    if not is_object(figures) or not is_object(combine):
        raise UserError(f"profile {name}: `figures` and `combine` must be objects")
    values, sources = _figures(figures, name)
    about, waits = str(raw.get("about", "")), raw.get("copies_wait", False)
    if not isinstance(waits, bool):
        raise UserError(f"profile {name}: copies_wait must be true or false, not {shown(waits)}")
    called = raw.get("name", shown_name(path.stem))
    if not is_name(called):
        raise UserError(f"profile {name}: its name is {shown(called)}; give a short, printable one")
    try:
        return MachineProfile(called, about, Figures(**values), sources, combine, waits)
    except UserError as error:
        raise UserError(f"profile {name}: {error}") from None


def _figures(figures: dict[str, Any], name: str | Path) -> tuple[dict[str, float], dict[str, tuple[str, str]]]:
    """A file's figures by name, and their sources; UserError for the first thing wrong."""
    names = [field.name for field in dataclasses.fields(Figures)]
    for missing in [n for n in names if n not in figures] + [n for n in figures if n not in names]:
        raise UserError(f"profile {name}: figure {shown(missing)} is {'missing' if missing in names else 'unknown'}")
    values: dict[str, float] = {}
    sources: dict[str, tuple[str, str]] = {}
    for field in names:
        entry: dict[str, Any] = figures[field] if is_object(figures[field]) else {}
        values[field] = check_figure(f"profile {name}: {field}.value", entry.get("value"), is_rate(field))
        if not isinstance(entry.get("source"), str) or not entry["source"].strip():
            raise UserError(f"profile {name}: {field} has no source; every figure says where it comes from")
        sources[field] = str(entry.get("kind", "unstated")), entry["source"]
    return values, sources


def load_costs(name: str | Path, shape: ModelShape, fmt: str, here: Machine | None = None) -> MachineCosts | CostModel:
    """Costs of a model by a profile: one of this package, a file of the same kind, or what was measured and saved.

    What was measured is bound to its model: UserError where an expert's size, its format or a layer is another. `here`:
    plans are to be made for this machine, so a profile of another one is refused too, see `machine.origin`.
    """
    if str(name) not in PROFILES and is_profile(name):
        costs = CostModel.load(name)
        if costs.expert_bytes != shape.expert_bytes(fmt):
            raise UserError(
                f"profile {name}: measured with experts of {costs.expert_bytes} bytes, those of {shape.name} have "
                f"{shape.expert_bytes(fmt)} in {fmt}; measure it with this model or name a machine "
                f"({', '.join(PROFILES)})"
            )
        origin = Origin.read(name)
        if origin is not None:
            origin.check_model(name, shape, fmt)
            if here is not None:
                origin.check_machine(name, here)
        return costs
    return load_profile(name).costs(shape, fmt)
