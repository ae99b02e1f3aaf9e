"""A run's statistics for a person: a few lines that fit a screen. Imports no jax."""

from __future__ import annotations

import textwrap

from hybrimoe_jax.engine.stats import RunStats
from hybrimoe_jax.machine.paced import PacedDevice

SCREEN = 80
"""Columns that the lines fill at most."""


def stats_text(stats: RunStats) -> str:
    record = stats.summary()
    lanes, prefetch, tbt = record["lanes"], record["prefetch"], record["tbt_ms"]
    lines = [
        f"system {record['system']}, executor {record['executor']}, cache ratio {record['cache_ratio']:.3g}, host "
        f"kernel {record['host_kernel'].get('name', 'none')}",
        times_text(record),
        f"first token {record['ttft_s']:.3f} s"
        + (f", then {tbt['median']:.2f} ms a token (p90 {tbt['p90']:.2f})" if tbt else "")
        + (f"; compiling took {record['compile_s']:.2f} s more" if record["compile_s"] else ""),
    ]
    if record["hit_rate"] is not None:
        lines += [
            f"hit rate {record['hit_rate']:.1%} ({record['hits']} hits, {record['misses']} misses)",
            f"experts run: {record['cpu_experts']} cpu, {record['device_experts']} device; "
            f"{record['demand_fetches']} demand fetches"
            + (f", {record['layer_streamed']} streamed with their layers" if record["layer_streamed"] else ""),
            f"prefetches: {prefetch['issued']} issued, {prefetch['useful']} useful, {prefetch['late']} late, "
            f"{prefetch['wasted']} wasted; {record['bytes_h2d'] / 1e6:.1f} MB to the device",
            f"lanes busy: cpu {lanes['cpu_s']:.3f} s, device <= {lanes['device_s']:.3f} s, link <= "
            f"{lanes['link_s']:.3f} s",
        ]
    held = "its experts: slots and staging" if record["cost_shape"] else "device memory"
    lines.append(
        f"{held} {record['peak_device_bytes'] / 2**20:.1f} MiB, host memory {record['host_bytes'] / 2**20:.1f} MiB"
        + ("" if record["cost_shape"] else f" of {record['expert_format']} experts")
    )
    for switch in record["switches"]:
        fused = f"as one program ({1e3 * switch['fused_s']:.2f} ms a token)"
        layered = f"layer by layer ({1e3 * switch['layered_s']:.2f} ms a token)"
        ways = (fused, layered) if switch["to_fused"] else (layered, fused)
        lines.append(f"decoding changed its way: {ways[0]} was faster than {ways[1]}")
    if record["note"]:
        lines.append(record["note"])
    return "\n".join(row for line in lines for row in textwrap.wrap(line, SCREEN, subsequent_indent="  "))


def times_text(record: dict) -> str:
    """Which clock the times are of, and whose."""
    costs = record["costs"]
    if record["device"] == "paced":
        about = PacedDevice(record["profile"], record["slowdown"]).describe()
        whose = f"; bytes and times of {costs['model']}, {costs['format']}" if record["cost_shape"] else ""
        return f"times: wall clock, {about}{whose}; not measured on that machine"
    if record["clock"] == "wall":
        return "times: wall clock, this machine"
    if record["cost_shape"]:
        return f"bytes and times of {costs['model']}, {costs['format']}, computed for profile {costs['profile']}"
    return f"times: virtual clock, computed for profile {costs.get('profile', 'as measured')}"
