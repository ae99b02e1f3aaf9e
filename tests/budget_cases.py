"""Runs engines within byte budgets and measures what lives on the device, as a program: one JSON object a case.

Its own process, so that the arrays it counts are the engine's. Live arrays are summed at every point of a step where
something was just allocated: programs, transfers and slot writes are wrapped. Arrays that were alive before an engine
was built do not count.
"""

from __future__ import annotations

import gc
import json
import sys

import jax
import tiny

from hybrimoe_jax.engine import assembly, probes
from hybrimoe_jax.engine.lanes import slots, transfer
from hybrimoe_jax.engine.steps import layered, overlapped

FAMILY, CONTEXT, PROMPTS = "qwen2_moe", 160, (37, 20)
EXPERTS = 24
"""Routed experts in the three MoE layers."""
COMMON = dict(max_context=CONTEXT, prefill_chunk=16)

# name -> (experts that the budget leaves room for, engine options, batch)
CASES = {
    "no slots": (0, {}, 1),
    "no slots, device only": (0, {"system": "device-only"}, 1),
    "one slot a layer and something over": (4.5, {}, 1),
    "next-layer prefetch": (7, {"system": "adapmoe"}, 1),
    "whole layers": (17, {"system": "llamacpp"}, 1),
    "every expert": (EXPERTS, {}, 1),
    "a batch of two": (9, {"system": "on-demand", "max_batch": 2}, 2),
    "streamed prompts": (7, {"system": "freetoken"}, 1),
    "callback": (6, {"executor": "callback"}, 1),
    "measured at load": (6, {"profile": None}, 1),
}


class Meter:
    """Bytes of the live arrays that were not there at the start, at most so far."""

    def __init__(self):
        gc.collect()
        self._before = jax.live_arrays()  # held, so that no new array takes an old one's identity
        self._known = set(map(id, self._before))
        self.samples, self.peak = 0, 0

    def live(self) -> int:
        return sum(a.nbytes for a in jax.live_arrays() if id(a) not in self._known and not a.is_deleted())

    def sample(self) -> None:
        self.samples += 1
        self.peak = max(self.peak, self.live())


meter: Meter


def sampled(owner, name: str) -> None:
    """Replaces owner.name by one that samples the meter after every call."""
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        out = original(*args, **kwargs)
        meter.sample()
        return out

    setattr(owner, name, wrapped)


def wrap() -> None:
    for owner, name in (
        (slots.SlotPool, "write"),
        (slots.SlotPool, "stream"),
        (transfer.Link, "put"),
        (transfer.Link, "landed"),
        (transfer.Link, "streamed"),
        (layered.LayeredForward, "land"),
        (layered.LayeredForward, "prefetch"),
        (overlapped.OverlappedForward, "dispatch_block"),
        (overlapped.OverlappedForward, "read"),
        (layered.programs, "add_device_experts"),
        (layered, "read_routing"),
        (probes, "_timed"),
        (assembly.DeviceModel, "init_cache"),
    ):
        sampled(owner, name)


def fixed_bytes(options: dict) -> int:
    """What the options need on the device before any expert is cached: an engine with more than enough knows."""
    engine = tiny.engine(FAMILY, vram_budget="1GiB", **COMMON, **options)
    held = engine._parts.footprint
    engine.close()
    return held.total - held.slots


def run(room: float, options: dict, batch: int) -> dict:
    global meter
    fixed = fixed_bytes({key: value for key, value in options.items() if key != "profile"})
    meter = Meter()
    expert = 3 * tiny.COMMON["hidden_size"] * tiny.CONFIGS[FAMILY]["moe_intermediate_size"] * 4
    budget = fixed + int(room * expert)
    engine = tiny.engine(FAMILY, vram_budget=budget, **COMMON, **options)
    loaded = meter.peak
    prompts = tiny.prompts(engine.config, PROMPTS[:batch], seed=3)
    out = engine.generate(prompts, max_new_tokens=CONTEXT - max(PROMPTS))
    engine.logits(prompts[0])
    record = {
        "budget": budget,
        "peak": meter.peak,
        "loaded": loaded,
        "samples": meter.samples,
        "stated": out.stats.peak_device_bytes,
        "slots": out.stats.slots,
        "room": room,
        "token_ids": out.token_ids,
    }
    engine.close()
    del engine, out
    gc.collect()
    record["left"] = meter.live()
    return record


if __name__ == "__main__":
    jax.config.update("jax_cpu_enable_async_dispatch", True)
    meter = Meter()
    wrap()
    for name in sys.argv[1:]:
        print(json.dumps({"case": name, **run(*CASES[name])}), flush=True)
