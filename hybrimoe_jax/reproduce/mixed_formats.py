"""Should MRS weigh what it costs to load an expert again? A question only where costs differ: one budget of bytes for all layers, experts of two sizes.

Every second MoE layer is held in one format and the others in another, half its size; all layers share one budget of device bytes, every miss
is fetched and kept, and as many of the least valuable experts leave as make room. An expert's value is its MRS score S (alpha 0.5, p = 2k, or k
where a trace has no full scores) by one of three rules:

  plain            S, as the paper has it
  cost             S times the seconds that fetching it again would take
  cost per byte    the same by the bytes it holds: what keeping it saves for each byte

The slots of the live engine have one size, so that this is a replay of its own. It is event-atomic: what the running layer needs stays.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from hybrimoe_jax.decide.cache import policy_class
from hybrimoe_jax.simulate.workload import Step
from hybrimoe_jax.trace.facts import TraceFacts

RULES = ("plain", "cost", "cost per byte")


class Reloads(NamedTuple):
    """What a rule came to: share of activated experts found resident, and what the link carried a step."""

    rule: str
    hit_rate: float
    bytes_per_step: float
    seconds_per_step: float


def reloads(
    steps: Iterable[Step],
    facts: TraceFacts,
    sizes: tuple[int, int],
    seconds: tuple[float, float],
    ratio: float,
    rule: str,
) -> Reloads:
    """Replays `steps` from an empty cache.

    Args:
      sizes, seconds: bytes of an expert of even and of odd layers, and what fetching it takes.
      ratio: the budget, as a share of all experts' bytes.
    """
    layers, experts = facts.layers, facts.experts
    mrs = policy_class("mrs").for_layers(experts, [experts] * layers, facts.top_k)
    size, cost = ([pair[layer % 2] for layer in range(layers)] for pair in (sizes, seconds))
    weight = {
        "plain": [1.0] * layers,
        "cost": cost,
        "cost per byte": [c / s for c, s in zip(cost, size)],
    }[rule]  # fmt: skip
    room = int(ratio * experts * sum(size))
    last: dict[tuple[int, int], int] = {}  # residents: when they were used last
    hits = asked = moved = count = 0
    busy = 0.0
    for step in steps:
        count += 1
        for layer, loads, scores, _ in step.layers:
            mrs[layer].observe(scores, loads)
            needed = {(layer, expert) for expert in loads}
            missing = needed - last.keys()
            hits, asked = hits + len(needed) - len(missing), asked + len(needed)
            moved, busy = moved + len(missing) * size[layer], busy + len(missing) * cost[layer]
            wanted = len(missing) * size[layer]
            while room < wanted:
                victim = min(
                    (key for key in last if key not in needed),
                    key=lambda key: (mrs[key[0]].value(key[1]) * weight[key[0]], last[key], key),
                )
                room += size[victim[0]]
                del last[victim]
            room -= wanted
            last.update(dict.fromkeys(needed, count))
    return Reloads(rule, hits / asked, moved / count, busy / count)
