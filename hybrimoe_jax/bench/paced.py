"""`bench paced`: systems in real time on paced devices, beside what the virtual clock computes of the same runs.

One process, one model, the costs of a full-size one. On each machine every system has two engines, one on the paced
device and one under the virtual clock, which are asked the same in the same order; systems take turns in each round.
All times are shown as the machine's own: wall-clock seconds over the slowdown. A round's ratio is wall over virtual.

`own_layer_ms` is what the engine itself takes for a MoE layer of the same plans when nothing is paced, on this
machine's clock and not divided by anything: it must fit into `paced_layer_ms`.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrimoe_jax.bench.engine import processor
from hybrimoe_jax.engine.config import EngineConfig
from hybrimoe_jax.machine.paced import PREFIX, parse_device

if TYPE_CHECKING:
    from hybrimoe_jax.engine.engine import Engine
    from hybrimoe_jax.engine.load import Model

MACHINES = ("a6000-paper:8", "laptop-8gb:20", "rtx4090-pcie4:50")
"""With slowdowns at which the engine's own time is a small part of a layer's on two cores."""
SYSTEMS = ("hybrimoe", "ktransformers", "adapmoe", "on-demand", "fiddler", "llamacpp", "freetoken")
REFERENCE = "ktransformers"
MEASURES = ("ttft_ms", "tbt_ms")
COUNTS = ("hits", "misses", "cpu_experts", "device_experts", "demand_fetches")
MOST_OFF, MOST_SPREAD, FAR_APART = 0.15, 0.10, 0.30
"""How far the wall may be from virtual times, how far the ratios of a machine's systems may lie apart, and from what
difference of virtual times on the order must be the same."""


@dataclasses.dataclass
class Options:
    """Args: machines: "PROFILE[:SLOWDOWN]". cost_shape: of the full-size model. prompt, new: tokens."""

    machines: tuple[str, ...] = MACHINES
    systems: tuple[str, ...] = SYSTEMS
    cost_shape: str = "deepseek-v2-lite"
    cache_ratio: float = 0.25
    rounds: int = 3
    prompt: int = 32
    new: int = 16


def run(options: Options, note: Callable[[str], None]) -> dict:
    """-> the record."""
    from hybrimoe_jax.engine.load import read_model

    model = read_model(None, EngineConfig(device=PREFIX + options.machines[0]))
    started, machines = time.perf_counter(), {}
    for machine in options.machines:
        machines[machine] = _measure(model, machine, options, note)
    return {
        "benchmark": "paced",
        "device": "paced",
        "clock": "wall",
        "processor": processor(),
        **dataclasses.asdict(options),
        "seconds": time.perf_counter() - started,
        "machines": machines,
    }


def _measure(model: Model, machine: str, options: Options, note: Callable[[str], None]) -> dict:
    """One machine: a record of each system, and how the bars are met."""
    device = parse_device(PREFIX + machine)
    assert device is not None
    common: dict[str, Any] = {"cost_shape": options.cost_shape, "cache_ratio": options.cache_ratio}
    kinds: dict[str, dict[str, Any]] = {
        "wall": {"device": PREFIX + machine},
        "virtual": {"clock": "virtual", "profile": device.profile},
    }
    ids = _prompt(model, options.prompt)
    runs: dict[str, dict[str, list[dict]]] = {name: {kind: [] for kind in kinds} for name in options.systems}
    engines = {
        (name, kind): model.engine(EngineConfig(system=name, **common, **kinds[kind]))
        for name, kind in itertools.product(options.systems, kinds)
    }
    for turn in range(options.rounds + 1):
        shift = turn % len(options.systems)
        for name in options.systems[shift:] + options.systems[:shift]:
            note(f"{machine} {name}: " + (f"round {turn} of {options.rounds}" if turn else "warming up"))
            for kind in kinds:
                made = _generate(engines[name, kind], ids, options.new, device.slowdown if kind == "wall" else 1.0)
                if turn:
                    runs[name][kind].append(made)
    for engine in engines.values():
        engine.close()
    rows = {name: _row(found["wall"], found["virtual"]) for name, found in runs.items()}
    _compare(rows)
    return {"profile": device.profile, "slowdown": device.slowdown, "systems": rows, "bars": bars(rows)}


def _prompt(model: Model, tokens: int) -> list[int]:
    text = Path(__file__).parents[1] / "assets" / "text" / "held-out.txt"
    return model.tokenizer.encode(text.read_text(encoding="utf-8")[: 8 * tokens])[:tokens]


def _generate(engine: Engine, ids: Sequence[int], new: int, slowdown: float) -> dict[str, Any]:
    """One run's times as the machine's own, its counts, and what its decode steps took on this machine's clock."""
    seen = [time.perf_counter()]
    for _ in engine.steps([ids], max_new_tokens=new):
        seen.append(time.perf_counter())
    stats = engine.stats
    assert stats is not None
    record, tbt, layers = stats.summary(), stats.tbt_ms(), len(stats.slots)
    assert stats.ttft_s is not None and tbt is not None
    decode = [after - before for before, after in itertools.pairwise(seen[1:])]
    return {
        "ttft_ms": 1e3 * stats.ttft_s / slowdown,
        "tbt_ms": tbt["median"] / slowdown,
        "layer_ms": 1e3 * statistics.median(decode) / layers,
        "counts": {name: record[name] for name in COUNTS} | {"prefetches": record["prefetch"]["issued"]},
        "overshoot": stats.overshoot,
    }


def _row(wall: list[dict], virtual: list[dict]) -> dict[str, Any]:
    """Medians over rounds of one system on one machine."""
    row: dict[str, Any] = {}
    for measure in MEASURES:
        row[measure] = statistics.median(made[measure] for made in wall)
        row[f"virtual_{measure}"] = statistics.median(made[measure] for made in virtual)
        pairs = zip(wall, virtual, strict=True)
        row[f"{measure[:-3]}_ratio"] = statistics.median(made[measure] / wanted[measure] for made, wanted in pairs)
    row["own_layer_ms"] = statistics.median(made["layer_ms"] for made in virtual)
    row["paced_layer_ms"] = statistics.median(made["layer_ms"] for made in wall)
    row["counts"], row["virtual_counts"] = wall[-1]["counts"], virtual[-1]["counts"]
    row["overshoot_us"] = {lane: _late(lane, wall) for lane in wall[0]["overshoot"]}
    return row


def _late(lane: str, runs: list[dict]) -> float:
    """How late things of a lane ended on average, microseconds of this machine's clock."""
    count = sum(made["overshoot"][lane]["count"] for made in runs)
    return 1e6 * sum(made["overshoot"][lane]["sum_s"] for made in runs) / max(1, count)


def _compare(rows: dict[str, dict]) -> None:
    """Adds every system's speed against the reference's, above 1 where it is faster."""
    if REFERENCE not in rows:
        return
    for row in rows.values():
        row["speed"] = rows[REFERENCE]["tbt_ms"] / row["tbt_ms"]
        row["virtual_speed"] = rows[REFERENCE]["virtual_tbt_ms"] / row["virtual_tbt_ms"]


def bars(rows: dict[str, dict]) -> dict[str, Any]:
    """How far the wall is from the virtual clock on one machine, and whether that is near enough."""
    found: dict[str, Any] = {}
    for measure in MEASURES:
        short = measure[:-3]
        ratios = [row[f"{short}_ratio"] for row in rows.values()]
        far = [
            (one, other)
            for one, other in itertools.combinations(rows, 2)
            if abs(rows[one][f"virtual_{measure}"] / rows[other][f"virtual_{measure}"] - 1) > FAR_APART
        ]
        swapped = [
            pair
            for pair in far
            if (rows[pair[0]][measure] < rows[pair[1]][measure])
            != (rows[pair[0]][f"virtual_{measure}"] < rows[pair[1]][f"virtual_{measure}"])
        ]
        most, spread = max(abs(ratio - 1) for ratio in ratios), max(ratios) / min(ratios) - 1
        found[short] = {
            "most_off": most,
            "spread": spread,
            "swapped": swapped,
            "met": most <= MOST_OFF and spread <= MOST_SPREAD and not swapped,
        }
    return found


def table(found: dict) -> str:
    """One machine's systems, a line each."""
    lines = [
        f"paced: {found['profile']}, {found['slowdown']:g} times slower than it; times are shown as that machine's",
        f"{'':14}{'TTFT ms':>9}{'virtual':>9}{'ratio':>7}{'TBT ms':>9}{'virtual':>9}{'ratio':>7}"
        f"{'speed':>8}{'virtual':>8}{'layer ms':>10}{'own':>6}  late us (device, cpu, link)",
    ]
    for name, row in found["systems"].items():
        late = row["overshoot_us"]
        speeds = "".join(f"{row[key]:>7.2f}x" if key in row else f"{'-':>8}" for key in ("speed", "virtual_speed"))
        lines.append(
            f"{name:14}{row['ttft_ms']:>9.2f}{row['virtual_ttft_ms']:>9.2f}{row['ttft_ratio']:>7.2f}"
            f"{row['tbt_ms']:>9.3f}{row['virtual_tbt_ms']:>9.3f}{row['tbt_ratio']:>7.2f}{speeds}"
            f"{row['paced_layer_ms']:>10.2f}{row['own_layer_ms']:>6.2f}  "
            + ", ".join(f"{late.get(lane, 0):.0f}" for lane in ("device", "cpu", "link"))
        )
    for short, bar in found["bars"].items():
        swapped = ", ".join(" and ".join(pair) for pair in bar["swapped"]) or "none"
        lines.append(
            f"{short.upper()}: wall at most {bar['most_off']:.0%} off the virtual clock (bar {MOST_OFF:.0%}), ratios "
            f"{bar['spread']:.0%} apart (bar {MOST_SPREAD:.0%}), order changed: {swapped}"
        )
    return "\n".join(lines)


def tables(record: dict) -> str:
    return "\n\n".join(table(found) for found in record["machines"].values())
