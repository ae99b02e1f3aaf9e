"""A run's statistics as rows: by step, by MoE layer, by expert, and at a glance. Imports no jax."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from hybrimoe_jax.engine.stats import LayerStats, RunStats
from hybrimoe_jax.errors import UserError, shown
from hybrimoe_jax.tables import Table, as_text

Row = dict[str, Any]


def rows_by(stats: RunStats, by: str) -> Iterator[Row]:
    """The rows of `RunStats.table(by)`; UserError for another `by`."""
    if by not in WAYS:
        raise UserError(f"a table by {shown(by)} is unknown; choose one of {', '.join(WAYS)}")
    return WAYS[by](stats)


def by_step(stats: RunStats) -> Iterator[Row]:
    for number, step in enumerate(stats.steps):
        about = {"step": number, "phase": step.phase, "tokens": step.tokens}
        times = {"ms": 1e3 * (step.seconds - step.compile_s), "compile_ms": 1e3 * step.compile_s}
        yield about | times | _sums(step.layers) | {"clock": stats.times}


def by_layer(stats: RunStats) -> Iterator[Row]:
    layers: dict[int, list[LayerStats]] = {}
    for step in stats.steps:
        for layer in step.layers:
            layers.setdefault(layer.layer, []).append(layer)
    for number, records in sorted(layers.items()):
        slots = {"layer": number, "slots": stats.slots[number] if number < len(stats.slots) else None}
        ms = {"ms": 1e3 * sum(record.seconds for record in records)}
        yield slots | ms | _sums(records) | {"clock": stats.times}


def by_step_and_layer(stats: RunStats) -> Iterator[Row]:
    for number, step in enumerate(stats.steps):
        for layer in step.layers:
            about = {"step": number, "phase": step.phase, "layer": layer.layer, "ms": 1e3 * layer.seconds}
            yield about | _sums([layer]) | {"clock": stats.times}


def by_expert(stats: RunStats) -> Iterator[Row]:
    """Experts that were activated, by layer and number: in how many steps, by how many tokens, who computed them."""
    found: dict[tuple[int, int], Row] = {}
    for step in stats.steps:
        for layer in step.layers:
            for expert, tokens in layer.loads.items():
                about = {"layer": layer.layer, "expert": expert, "steps": 0, "tokens": 0}
                row = found.setdefault((layer.layer, expert), about | {"cpu": 0, "device": 0, "fetched": 0})
                row["steps"] += 1
                row["tokens"] += tokens
                for who in ("cpu", "device", "fetched"):
                    row[who] += expert in getattr(layer, who)
    return (found[key] for key in sorted(found))


WAYS = {"step": by_step, "layer": by_layer, "step and layer": by_step_and_layer, "expert": by_expert}


def _sums(layers: Iterable[LayerStats]) -> Row:
    """Of layers' records: experts by who ran them, hits, megabytes moved, prefetches, busy milliseconds of lanes."""
    layers = list(layers)
    hits, misses = sum(layer.hits for layer in layers), sum(layer.misses for layer in layers)
    counts = {name: sum(len(getattr(layer, name)) for layer in layers) for name in ("cpu", "device", "fetched")}
    fates = {
        fate: sum(len(getattr(layer, f"prefetch_{fate}")) for layer in layers) for fate in ("useful", "late", "wasted")
    }
    busy = {
        f"{lane}_ms": 1e3 * sum(getattr(layer.lanes, lane) for layer in layers) for lane in ("cpu", "device", "link")
    }
    rate = {"hits": hits, "misses": misses, "hit_rate": hits / (hits + misses) if hits + misses else None}
    return rate | counts | {"MB": sum(layer.bytes_h2d for layer in layers) / 1e6} | fates | busy


def at_a_glance(stats: RunStats) -> Table:
    """What a person looks for first: a row each."""
    s = stats.summary()
    tbt, fates, lanes, rate = s["tbt_ms"], s["prefetch"], s["lanes"], s["hit_rate"]
    said: dict[str, Any] = {
        "system": f"{stats.system}, executor {stats.executor}, cache ratio {stats.cache_ratio:.3g}",
        "times": stats.times,
        "new tokens": s["new_tokens"],
        "time to first token": None if s["ttft_s"] is None else f"{1e3 * s['ttft_s']:.4g} ms",
        "time between tokens": None if tbt is None else f"median {tbt['median']:.4g} ms, p90 {tbt['p90']:.4g} ms",
        "compiling, apart": f"{s['compile_s']:.3g} s",
        "hit rate": None if rate is None else f"{rate:.1%} ({s['hits']} of {s['hits'] + s['misses']})",
        "experts run": f"{s['cpu_experts']} on the CPU, {s['device_experts']} on the device",
        "demand fetches": s["demand_fetches"],
        "prefetches": ", ".join(f"{fates[name]} {name}" for name in ("issued", "useful", "late", "wasted")),
        "moved to the device": f"{s['bytes_h2d'] / 1e6:.4g} MB",
        "lanes busy": ", ".join(f"{name} {lanes[f'{name}_s']:.3g} s" for name in ("cpu", "device", "link")),
        "device memory": f"{s['peak_device_bytes'] / 2**20:.1f} MiB",
        "host memory": f"{s['host_bytes'] / 2**20:.1f} MiB of experts",
    }
    return Table({"": name, stats.system: as_text(value)} for name, value in said.items())
