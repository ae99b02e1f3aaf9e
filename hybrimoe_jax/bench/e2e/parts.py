"""Why ours is faster, by part: the same policies in both engines separate the policy from the engine.

From PyTorch's fastest mode to hybrimoe there are two steps. The first keeps the policies and changes the engine; its
time is that of the busiest lane ("kernels": computing and moving experts) and of the rest of the step ("dispatch":
attention, router, calls, waiting). The second keeps our engine and changes the policy. "overlap" is what share of a
step all lanes together were busy: above 1 they hid behind each other. (Our device's and link's are upper bounds, until
they were seen to have ended.)
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hybrimoe_jax.bench.e2e.bars import MEASURES, RATIO, REFERENCE, cells, ratio
from hybrimoe_jax.bench.e2e.grid import TORCH_MODES

HEAD = ("what", "torch", "ms", "same policies, ours", "ms", "kernels", "dispatch", "policy", "hybrimoe", "overlap")


def parts(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A record of each model, format, prompt and phase at a quarter of the experts."""
    for cell in cells([row for row in rows if row["cache_ratio"] == RATIO]):
        ours = cell[REFERENCE]
        for phase, measure in MEASURES.items():
            theirs = {mode: cell[f"torch {mode}"] for mode in TORCH_MODES if f"torch {mode}" in cell}
            if not theirs:
                continue
            mode = min(theirs, key=lambda name: ratio(theirs[name], ours, measure))
            same = cell.get(TORCH_MODES[mode])
            if same is not None:
                keys = ("model", "format", "device", "prompt_tokens")
                about = {key: ours[key] for key in keys} | {"phase": phase, "mode": mode}
                yield {**about, **split(theirs[mode], same, ours, phase, measure)}


def split(theirs: dict, same: dict, ours: dict, phase: str, measure: str) -> dict[str, Any]:
    """Milliseconds of a prompt or a token: what each step saves, and by what."""
    whole = {name: statistics.median(row["rounds"][measure]) for name, row in named(theirs, same, ours)}
    lanes = {name: row["lanes"][phase] for name, row in named(theirs, same, ours)}
    busiest = {name: min(1.0, max(lanes[name].values())) * whole[name] for name in whole}
    rest = {name: whole[name] - busiest[name] for name in whole}
    return {
        "torch_ms": whole["torch"],
        "same_system": same["contender"],
        "same_ms": whole["same"],
        "hybrimoe_ms": whole["hybrimoe"],
        "kernels_ms": busiest["torch"] - busiest["same"],
        "dispatch_ms": rest["torch"] - rest["same"],
        "policy_ms": whole["same"] - whole["hybrimoe"],
        "overlap": {name: sum(busy.values()) for name, busy in lanes.items()},
    }


def named(theirs: dict, same: dict, ours: dict) -> Sequence[tuple[str, dict]]:
    return ("torch", theirs), ("same", same), ("hybrimoe", ours)


def line(part: Mapping[str, Any]) -> list[str]:
    """As a row of HEAD."""
    after = part["prompt_tokens"]
    unit = f"a token after {after}" if part["phase"] == "decode" else f"a prompt of {after}"
    what = f"{part['model']} {part['format']}{'' if part['device'] == 'auto' else ', paced'}: {unit}"
    saved = [f"{part[f'{name}_ms']:+.2f}" for name in ("kernels", "dispatch", "policy")]
    busy = " / ".join(f"{share:.2f}" for share in part["overlap"].values())
    times = [part["mode"], f"{part['torch_ms']:.2f}", part["same_system"], f"{part['same_ms']:.2f}"]
    return [what, *times, *saved, f"{part['hybrimoe_ms']:.2f}", busy]
