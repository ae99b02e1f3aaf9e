"""What the design assumes of a GPU, and how the figures of `gpu_checks` confirm or refute it (docs/gpu.md lists them).

Facts are {part: {what: value}}, as the measuring scripts write them. A decision whose figures are not there was not
taken; so is every decision where the device is no GPU, whatever the figures say.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Facts = Mapping[str, Mapping[str, Any]]
BIG = "17 MB"
"""Of the transfers: four experts of DeepSeek-V2-Lite in int4."""


@dataclasses.dataclass(frozen=True)
class Decision:
    """One row of the table.

    Attributes: `assumes`: what the design takes for granted. `look`: facts -> (figures, whether they bear it out);
    LookupError where a figure is missing.
    """

    name: str
    assumes: str
    look: Callable[[Facts], tuple[dict[str, Any], bool]]


def pick(facts: Facts, part: str, *names: str) -> dict[str, float]:
    return {name: facts[part][name] for name in names}


def read_back(facts: Facts):
    found = pick(facts, "read-back", "1 tokens, dispatch and read (us)", "1 tokens, with copy_to_host_async (us)")
    return found, found["1 tokens, with copy_to_host_async (us)"] < 100


def registered(facts: Facts):
    kinds = [kind for kind in ("dma-mapped", "pinned_host") if f"{BIG} {kind}: alone (GB/s)" in facts["transfer"]]
    found = pick(facts, "transfer", *(f"{BIG} {kind}: alone (GB/s)" for kind in ("plain", *kinds)))
    rates = list(found.values())
    return found, max(rates[1:]) > 1.2 * rates[0]


def mapped(facts: Facts):
    found = pick(facts, "transfer", *(f"{BIG} {kind}: alone (GB/s)" for kind in ("dma-mapped", "pinned_host")))
    first, second = found.values()
    return found, first > 0.95 * second


def order(facts: Facts):
    kind = "dma-mapped" if f"{BIG} dma-mapped: alone (GB/s)" in facts["transfer"] else "pinned_host"
    found = pick(facts, "transfer", *(f"{BIG} {kind}, {o}: landed (GB/s)" for o in ("put, compute", "compute, put")))
    first, behind = found.values()
    return found, first > 1.3 * behind


def overlap(facts: Facts):
    kind = "dma-mapped" if f"{BIG} dma-mapped: alone (GB/s)" in facts["transfer"] else "pinned_host"
    found = pick(facts, "transfer", f"{BIG} {kind}, put, compute: overlap (0 none, 1 all)")
    return found, min(found.values()) > 0.7


def callback(facts: Facts):
    found = pick(facts, "callback", "1 x 4096 (us)") | pick(facts, "dispatch", "front, ids read, experts (us)")
    return found, found["1 x 4096 (us)"] > found["front, ids read, experts (us)"]


def in_place(facts: Facts):
    small, large = "an expert written to a stack of 16 (us)", "an expert written to a stack of 64 (us)"
    found = pick(facts, "slots", "an expert written to slots of their own (us)", small, large)
    found |= pick(facts, "slots", "written in place (1 yes, 0 no)")
    return found, found["written in place (1 yes, 0 no)"] == 1 and found[large] < 1.5 * found[small]


def stacked(facts: Facts):
    found = pick(facts, "slots", "6 experts out of slots of their own (us)", "6 experts out of a stack of 64 (us)")
    own, stack = found.values()
    return found, stack <= 1.1 * own


def beside(other: str) -> Callable[[Facts], tuple[dict[str, Any], bool]]:
    """Whether hybrimoe as it is decodes as fast as `other`, within 3 %."""

    def look(facts: Facts):
        found = {name: facts[name]["tbt_ms"] for name in ("hybrimoe", other)}
        return found, found["hybrimoe"] <= 1.03 * found[other]

    return look


def dispatch(facts: Facts):
    found = pick(facts, "dispatch", "issuing one program (us)", "front, ids read, experts (us)")
    return found, found["front, ids read, experts (us)"] < 100


def two_threads(facts: Facts):
    threads = facts["threads"]
    return dict(threads), all(
        threads[f"{what} together (1/s)"] > 0.3 * threads[f"{what} alone (1/s)"] for what in ("puts", "writes")
    )


def packed(facts: Facts):
    kernels = facts["cuda"]
    found = {name: value for name, value in kernels.items() if name.startswith("int4")}
    faster = all(
        kernels[f"int4-g64, load {n}, cuda: one expert (us)"] < kernels[f"int4-g64, load {n}, xla: one expert (us)"]
        for n in (1, 8)
    )
    exact = all(value < 1000 for name, value in found.items() if "difference" in name)
    return found, faster and exact


def fastest(facts: Facts):
    found = {name: facts[name]["tbt_ms"] for name in ("hybrimoe", "ktransformers", "cpu-only", "device-only")}
    return found, found["hybrimoe"] <= 1.05 * min(found.values())


def same_tokens(facts: Facts):
    found = {name: facts[name]["same tokens"] for name in ("hybrimoe", "ktransformers", "cpu-only", "device-only")}
    return found, all(found.values())


def cells(facts: Facts):
    return dict(facts["cells"]), facts["cells"]["failed"] == 0 < facts["cells"]["passed"]


def kept(facts: Facts):
    found = facts["budget"]
    limit = abs(found["bytes_limit"] - found["budget"]) < 0.01 * found["budget"]
    return dict(found), limit and found["peak_bytes_in_use"] <= found["budget"]


def workspace(facts: Facts):
    found = facts["budget"]
    seen = found["peak_bytes_in_use"] - (found["stated"] - found["workspace"])
    return {"stated": found["workspace"], "seen": seen}, abs(seen - found["workspace"]) < 0.05 * found["workspace"]


def out_of_memory(facts: Facts):
    found = facts["out of memory"]
    return dict(found), found["tokens are the same"] and found["slots given up"] > 0


def tests(facts: Facts):
    return dict(facts["tests"]), facts["tests"]["failed"] == 0 < facts["tests"]["passed"]


def precision(facts: Facts):
    found = facts["precision"]
    split = {name: value for name, value in found.items() if "error" in name and "X6" in name}
    return dict(found), 0 < len(split) and max(split.values()) < 3 * found["HIGHEST: error (1e-6)"] + 1


DECISIONS = (
    Decision("read-back", "expert ids are on the host within 100 us of the router's dispatch", read_back),
    Decision(
        "registered memory", "registered or pinned memory is copied at least 1.2 times as fast as plain", registered
    ),
    Decision("mapped memory", "registering the experts' blocks is as good as `pinned_host` arrays", mapped),
    Decision("order of copies", "a copy that is issued before the compute lands sooner than one behind it", order),
    Decision("overlap", "a transfer hides behind compute for more than 0.7 of its time", overlap),
    Decision("callback", "a callback a layer costs more than leaving the program", callback),
    Decision(
        "writes in place", "a donated write is in place, and takes as long in a large pool as in a small one", in_place
    ),
    Decision(
        "stacked pool", "experts out of one stacked pool are computed as fast as out of buffers of their own", stacked
    ),
    Decision("dispatch", "a layer's two programs and its read-back take the host under 100 us", dispatch),
    Decision("two threads", "one thread copies while another writes slots, and both go on", two_threads),
    Decision(
        "int4 kernel", "our kernel beats XLA's form of an int4 expert at loads 1 and 8, and agrees with it", packed
    ),
    Decision("split products", "prefill's split products are as exact as float32's own", precision),
    Decision(
        "hybrid decode", "hybrimoe decodes as fast as the fastest of ktransformers, cpu-only and device-only", fastest
    ),
    Decision(
        "stacked in the engine",
        "hybrimoe decodes faster with stacked slots than with separate ones",
        beside("hybrimoe, separate slots"),
    ),
    Decision(
        "int4 kernel in the engine",
        "hybrimoe decodes faster with our kernel than with XLA's form",
        beside("hybrimoe, xla"),
    ),
    Decision(
        "registered in the engine",
        "hybrimoe decodes faster from registered memory than from plain",
        beside("hybrimoe, plain memory"),
    ),
    Decision("same tokens", "all systems give the same greedy tokens at a real size", same_tokens),
    Decision("exactness", "every cell of the exactness matrix that was run is within its tolerance", cells),
    Decision("budget", "the allocator's limit is the vram_budget, and its peak is within it", kept),
    Decision("workspace", "the workspace stated is what the device had in use, within 5 %", workspace),
    Decision(
        "out of memory", "where memory runs out the engine gives up slots once, and answers as before", out_of_memory
    ),
    Decision("tests", "the engine's tests pass", tests),
)


def judge(facts: Facts, platform: str) -> list[dict[str, Any]]:
    """One record a decision: its verdict ("confirmed", "refuted" or "not taken") and the figures."""
    records = []
    for decision in DECISIONS:
        figures: dict[str, Any] = {}
        try:
            figures, holds = decision.look(facts)
            verdict = "confirmed" if holds else "refuted"
        except (LookupError, TypeError, ValueError, StopIteration):
            verdict = "not taken"
        verdict = verdict if platform == "gpu" else "not taken"
        records.append({"decision": decision.name, "assumes": decision.assumes, "verdict": verdict, "figures": figures})
    return records


def summarise(files: list[Path]) -> dict[str, Any]:
    """The calls' files (`first.json`, `second.json`) together, as `summary.json` has them."""
    calls = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    facts = {part: figures for call in calls for part, figures in call["facts"].items()}
    platforms = {call["platform"] for call in calls}
    platform = platforms.pop() if len(platforms) == 1 else "unknown"
    about = {"device": calls[0]["device"], "platform": platform, "dry_run": any(call["dry_run"] for call in calls)}
    parts = {name: part for call in calls for name, part in call["parts"].items()}
    return {**about, "parts": parts, "decisions": judge(facts, platform)}
