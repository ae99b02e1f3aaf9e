"""Profiles, both kinds: of a machine, and of costs measured with one model.

The reference is the file: the figures used are those that it says. A replay under them, with a cache that does not look
at costs, counts what it counts under any other profile, and its times are finite and not negative.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from fuzz.mutate import brief, change_json, json_text
from fuzz.trace_files import small
from fuzz.worker import Case, Wrong

FIGURES = (1e-310, 1e308, 5e-324, 0, -0.0, -1, 1e-30, 1e30, True, "1", None, math.nan, math.inf, 10**400, [1])
SHAPE = "bundled"


class Kind:
    """A file of each kind that is changed, and a trace to replay under what it says."""

    def __init__(self, base: Path):
        from hybrimoe_jax.machine.costs import CostModel
        from hybrimoe_jax.machine.profile import FOLDER
        from hybrimoe_jax.machine.shapes import get_shape
        from hybrimoe_jax.trace.file import save_trace

        self.shape = get_shape(SHAPE)
        save_trace(small(self.shape.layers, self.shape.experts, 4), base / "trace.npz")
        self.trace = base / "trace.npz"
        size = self.shape.expert_bytes("int4-g64")
        times = dict.fromkeys(("cpu_expert", "cpu_token", "cpu_first", "device_expert", "device_token"), 1e-4)
        times |= dict.fromkeys(("shared_base", "shared_token", "layer_base", "layer_token", "transfer_latency"), 1e-5)
        CostModel(**times, bandwidth=1e10, bandwidth_cpu_busy=5e9, expert_bytes=size).save(base / "costs.json")
        self.files = {
            "machine.json": json.loads((FOLDER / "laptop-8gb.json").read_text()),
            "costs.json": json.loads((base / "costs.json").read_text()),
        }
        self.counts = None
        self.counts = self.counted(FOLDER / "laptop-8gb.json")

    def case(self, rng: random.Random, folder: Path) -> Case:
        name = rng.choice(list(self.files))
        value: Any = json.loads(json.dumps(self.files[name]))
        if rng.random() < 0.6:
            figures = value["figures"] if name == "machine.json" else value
            key = rng.choice([k for k in figures if k not in ("kind", "version", "source", "host_memory")])
            holder, last = (figures[key], "value") if name == "machine.json" else (figures, key)
            holder[last] = rng.choice((*FIGURES, holder[last] * 1.5, holder[last] * 0.5))
            what = f"{key} = {brief(holder[last])}"
        else:
            value, what = change_json(rng, value, ("name", "combine", "copies_wait", "figures", "origin", "points"))
        text, spoilt = json_text(rng, value)
        path = folder / name
        path.write_bytes(text)
        return Case(f"{name}: {what} {spoilt}", lambda: self.compare(path, None if spoilt else value), (name,))

    def compare(self, path: Path, value: Any) -> None:
        from hybrimoe_jax.machine.profile import load_costs

        costs = load_costs(path, self.shape, "int4-g64")
        said = {} if value is None else value.get("figures", value)
        used = costs.describe().get("figures") or costs.describe()
        for key, figure in said.items():
            figure = figure.get("value") if isinstance(figure, dict) else figure
            if key in used and key not in ("source", "host_memory") and used[key] != figure:
                raise Wrong(f"{key}: {brief(figure)} in the file, {used[key]} used")
        for seconds in (costs.cpu(1), costs.device(3), costs.transfer(True), costs.layer(4, 100), costs.shared(2)):
            if not (math.isfinite(seconds) and 0 <= seconds < 1e9):
                raise Wrong(f"a time of {seconds} s")
        counted = self.counted(path)
        if self.counts is not None and counted != self.counts:
            raise Wrong(f"counts {counted}, under another profile {self.counts}")

    def counted(self, path: Path) -> dict[str, int]:
        """Counts of a replay, none of which depends on the machine."""
        from hybrimoe_jax.simulate.runs import replay

        found = replay(self.trace, machine=str(path), systems=["on-demand"], ratios=[0.5], starts=["cold"], shape=SHAPE)
        (record,) = found.records
        json.dumps(record, allow_nan=False)
        times = [v for k, v in record.items() if k.endswith("_s") and isinstance(v, (int, float))]
        if any(not 0 <= t < 1e9 for t in times):
            raise Wrong(f"times {times}")
        return {key: value for key, value in record.items() if key in ("hits", "misses", "steps", "hit_rate")}
