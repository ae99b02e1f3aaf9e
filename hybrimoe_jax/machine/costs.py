"""What things take: the cost model that every decision is made with, and its file (`fit` fits it to a warm-up).

The shape is the paper's (HybriMoE, arXiv 2504.05897, section 4.2): CPU time is linear in the load, and the first expert
of a run is slower than the following ones; device time hardly depends on the load; a transfer takes as long for every
expert. Four things are refined because measurements ask for it. A transfer is latency + bytes / bandwidth, so that it
carries over to other expert sizes. The bandwidth is lower while the CPU reads the same memory (published: 62 and 57
GB/s alone, 38 and 37 together). What calling the device takes belongs to a MoE block and not to each of its experts.
And an expert takes no less than reading its weights does, however small its load.

Units: seconds, bytes, bytes per second; loads in tokens. There is no default coefficient anywhere: they are measured or
read from a file.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybrimoe_jax.errors import UserError, is_name, shown, shown_name
from hybrimoe_jax.files import is_object, read_json, replacing

PROFILE_VERSION = 5
_TEXTS = ("source", "host_memory")
ORIGIN, POINTS = "origin", "points"
"""What a file may hold besides: what was measured where (`machine.origin`), and the measurements themselves."""
_KIND = "hybrimoe-jax cost model"
DURATIONS = 1e-30, 1e6
RATES = 1e-6, 1e21
"""Within these, sums, products and quotients of figures stay numbers. No machine comes near them."""


def check_figure(name: str, value: Any, rate: bool) -> float:
    """A figure of a machine: a rate in units a second, or 0 or a duration in seconds. UserError where it is none."""
    least, most = RATES if rate else DURATIONS
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if least <= value <= most or (value == 0 and not rate):
            return float(value)
    what = "a number a second" if rate else "0 or seconds"
    raise UserError(f"{name} must be {what} from {least:g} to {most:g}, not {shown(value)}")


@dataclasses.dataclass(frozen=True)
class CostModel:
    """Seconds for everything a layer can do. UserError where a coefficient is no figure of a machine.

    `cpu_expert + cpu_token * load` for an expert on the CPU, no less than `cpu_floor`, and `cpu_first` more for the
    first one of a run; likewise for the device. `device_block` is what running experts on the device takes beside them,
    once in a MoE block. The shared experts are linear in the tokens, with a floor. So is the rest of a layer
    (attention, norms, router), with `layer_context` for each token and place of its cache that it attends to; it takes
    no less than reading, `layer_floor` and `layer_place` for each place. `bandwidth` and `bandwidth_cpu_busy` are the
    link's, in bytes per second. `fetch_host` is how long issuing a demand fetch keeps the CPU lane from computing (0
    where other threads compute), and `look` what predicting the coming layers costs in each layer.
    `alone_*` are the CPU's figures where it has the device's cores too, on a machine whose device has none of its own
    (all 0: it has). `handover` is what it takes per layer, on such a machine, to leave the device's program and come
    back to it so that the host can decide, or as much as it must be by what both ways took (`engine/fused/select.py`);
    0: a step cannot be one program. `host_memory`: the kind that experts cross the link from soonest, an
    `EngineConfig.host_memory`; "": that was not measured.
    """

    cpu_expert: float
    cpu_token: float
    cpu_first: float
    device_expert: float
    device_token: float
    shared_base: float
    shared_token: float
    layer_base: float
    layer_token: float
    transfer_latency: float
    bandwidth: float
    bandwidth_cpu_busy: float
    expert_bytes: int
    source: str = "unstated"
    fetch_host: float = 0.0
    look: float = 0.0
    alone_expert: float = 0.0
    alone_token: float = 0.0
    alone_first: float = 0.0
    handover: float = 0.0
    device_block: float = 0.0
    device_floor: float = 0.0
    shared_floor: float = 0.0
    cpu_floor: float = 0.0
    alone_floor: float = 0.0
    layer_floor: float = 0.0
    layer_place: float = 0.0
    layer_context: float = 0.0

    copies_wait = False

    host_memory: str = ""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if name in _TEXTS:
                if not isinstance(value, str) or (value and not is_name(value)):
                    raise UserError(f"cost model: {name} must be a name, not {shown(value)}")
            elif name != "expert_bytes":
                check_figure(f"cost model: {name}", value, name.startswith("bandwidth"))
            elif type(value) is not int or not 0 < value < 2**50:
                raise UserError(f"cost model: expert_bytes must be a whole number above 0, not {shown(value)}")
        if self.bandwidth_cpu_busy > self.bandwidth:
            raise UserError(
                "cost model: bandwidth_cpu_busy must not be above bandwidth: the CPU only takes from the link"
            )

    @functools.cached_property
    def _transfer(self) -> tuple[float, float]:
        """Seconds of one expert over the link: alone, beside a computing CPU."""
        alone = self.transfer_latency + self.expert_bytes / self.bandwidth
        return alone, self.transfer_latency + self.expert_bytes / self.bandwidth_cpu_busy

    def cpu(self, load: int, first: bool = False) -> float:
        """One expert on the CPU; `first` where nothing ran on it yet in this step."""
        seconds = max(self.cpu_floor, self.cpu_expert + self.cpu_token * load)
        return seconds + self.cpu_first if first else seconds

    @property
    def shares_cores(self) -> bool:
        """Whether the device works on the CPU's cores, so that the CPU may get them all."""
        return self.alone_expert > 0 or self.alone_token > 0 or self.alone_floor > 0

    def alone(self, load: int) -> float:
        """One expert on the CPU with the device's cores too."""
        return max(self.alone_floor, self.alone_expert + self.alone_token * load)

    def device(self, load: int) -> float:
        """One resident expert on the device."""
        return max(self.device_floor, self.device_expert + self.device_token * load)

    def shared(self, tokens: int) -> float:
        """What opens the device lane of a MoE block: calling the device, and the shared experts if there are any."""
        return self.device_block + max(self.shared_floor, self.shared_base + self.shared_token * tokens)

    def transfer(self, cpu_busy: bool = False) -> float:
        """One expert over the link; `cpu_busy` where the CPU computes at the same time."""
        return self._transfer[cpu_busy]

    def step(self, tokens: int) -> float:
        """What a step takes outside its MoE layers; a warm-up measures none."""
        return 0.0

    def layer(self, tokens: int, context: int = 0) -> float:
        """Everything between two MoE blocks, with `context` places of each token's cache to attend to.

        That is attention, norms and router. A warm-up at load does not tell how it grows with the context.
        """
        computing = self.layer_base + (self.layer_token + self.layer_context * context) * tokens
        return max(computing, self.layer_floor + self.layer_place * context)

    def scaled(
        self, *, cpu: float = 1.0, device: float = 1.0, shared: float = 1.0, transfer: float = 1.0, layer: float = 1.0
    ) -> CostModel:
        """The same machine with some lanes slower (factor above 1) or faster, for tests and what-if questions."""
        factors = {"cpu": cpu, "device": device, "shared": shared, "transfer": transfer, "layer": layer}
        changed = " ".join(f"{name} x{factor:g}" for name, factor in factors.items() if factor != 1.0)
        return dataclasses.replace(
            self,
            cpu_expert=self.cpu_expert * cpu,
            cpu_token=self.cpu_token * cpu,
            cpu_first=self.cpu_first * cpu,
            cpu_floor=self.cpu_floor * cpu,
            alone_floor=self.alone_floor * cpu,
            alone_expert=self.alone_expert * cpu,
            alone_token=self.alone_token * cpu,
            alone_first=self.alone_first * cpu,
            device_expert=self.device_expert * device,
            device_token=self.device_token * device,
            device_block=self.device_block * device,
            device_floor=self.device_floor * device,
            shared_base=self.shared_base * shared,
            shared_token=self.shared_token * shared,
            shared_floor=self.shared_floor * shared,
            layer_base=self.layer_base * layer,
            layer_token=self.layer_token * layer,
            layer_context=self.layer_context * layer,
            layer_floor=self.layer_floor * layer,
            layer_place=self.layer_place * layer,
            transfer_latency=self.transfer_latency * transfer,
            bandwidth=self.bandwidth / transfer,
            bandwidth_cpu_busy=self.bandwidth_cpu_busy / transfer,
            source=f"{self.source} ({changed})" if changed else self.source,
        )

    def slowed(self, factor: float) -> CostModel:
        """The same machine with every duration `factor` times as long."""
        slow = self.scaled(cpu=factor, device=factor, shared=factor, transfer=factor, layer=factor)
        others = {name: factor * getattr(self, name) for name in ("fetch_host", "look", "handover")}
        return dataclasses.replace(slow, **others, source=self.source + slower(factor))

    def describe(self) -> dict[str, Any]:
        """Plain values, for statistics and records."""
        return dataclasses.asdict(self)

    def save(self, path: str | Path, more: Mapping[str, Any] | None = None) -> None:
        """Writes a profile as JSON, whole or not at all. `more`: what else it holds, under `ORIGIN` and `POINTS`."""
        about = {"kind": _KIND, "version": PROFILE_VERSION}
        with replacing(path) as file:
            file.write(json.dumps({**about, **dataclasses.asdict(self), **(more or {})}, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> CostModel:
        """The cost model of a file that `save` wrote; UserError naming the file and the first thing wrong in it."""
        raw = read_profile(path)
        version = raw.pop("version", None)
        if version != PROFILE_VERSION:
            raise UserError(
                f"{path}: profile version {shown(version)} is not supported (this program reads {PROFILE_VERSION})"
            )
        for name in (ORIGIN, POINTS):
            raw.pop(name, None)
        names = {field.name for field in dataclasses.fields(cls)}
        missing, unknown = sorted(names - raw.keys()), sorted(raw.keys() - names)
        if missing or unknown:
            problem = f"missing {', '.join(missing)}" if missing else f"unknown {shown_name(unknown[0])}"
            raise UserError(f"{path}: not a usable profile: {problem}; measure it again")
        try:
            return cls(**raw)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None


def slower(factor: float) -> str:
    """What is added to a machine's name where all its durations are `factor` times as long."""
    return "" if factor == 1 else f", {factor:g} times slower"


def read_profile(path: str | Path) -> dict[str, Any]:
    """What a file that `save` wrote holds. UserError for a file that is none."""
    raw = read_json(Path(path), f"{path}: not a profile")
    if not is_object(raw) or raw.pop("kind", None) != _KIND:
        raise UserError(f"{path}: not a profile: expected a JSON object of kind {_KIND!r}")
    return raw


def is_profile(path: str | Path) -> bool:
    """Whether the file is one that `CostModel.save` wrote, usable or not."""
    try:
        raw = read_json(Path(path))
    except UserError:
        return False
    return is_object(raw) and raw.get("kind") == _KIND
