"""What time could be had at best: a clairvoyant planner, which is a heuristic, and a bound that no system is below.

Minimising time is not minimising misses: a miss may be computed by the CPU, cost nothing beside a busy device, or be
fetched ahead. The bound relaxes all of it but three facts: each lane takes at least as long as its work; a transfer
takes the link at least its own time; and an expert on the device was either moved there since its last use or kept in a
slot since then. It

* gives every step and layer the makespan max(CPU, device) of its best split with n experts on the CPU, made convex
  in n,
* keeps as many experts from one use to the next as fit the layer's slots (interval scheduling, exact by a greedy rule;
  staging is free),
* and lets all steps share one link: with N uses on the CPU at least uses - N - kept - initial transfers are needed.

The bound is the least over N of the larger of the two sums. The clairvoyant planner stands above it: Belady's rule,
perfect prediction and the optimal schedule of each layer.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from hybrimoe_jax.decide.cache import Belady
from hybrimoe_jax.decide.systems import SIMULATED, System
from hybrimoe_jax.simulate.workload import Step

CLAIRVOYANT = System(SIMULATED[0], "lru", "optimal", prefetch="impact", lookahead=3, predictor="perfect")
"""Simulator only: Belady's cache, the least makespan and perfect prediction, over the steps to come. Not a bound:
each part is the best of its kind, their sum need not be."""

BELADY = System(SIMULATED[1], "lru", "device-only")
"""Simulator only: `on-demand` with Belady's cache, the most hits of all that keep every miss."""

CLAIRVOYANTS: dict[str, System] = dict(zip(SIMULATED, (CLAIRVOYANT, BELADY), strict=True))


def knows_the_future(system: str | System) -> System | None:
    """The system if it is one of these two, whose cache policy, Belady's rule, needs the steps."""
    if isinstance(system, str):
        return CLAIRVOYANTS.get(system)
    return system if system in CLAIRVOYANTS.values() else None


def clairvoyant_policies(
    steps: Iterable[Step],
    num_experts: int,
    slots: Sequence[int],
    top_k: int,
    frequencies: Sequence[Sequence[float]] | None = None,
) -> Sequence[Belady]:
    """Cache policies that know the steps to come; their planner must be replayed on exactly these.

    Args as of `Planner`; slots: of each layer.
    """
    future: list[list[list[int]]] = [[] for _ in slots]
    for step in steps:
        for asked in step.layers:
            future[asked.layer].append(list(asked.loads))
    return Belady.for_layers(num_experts, slots, top_k, future=future, frequencies=frequencies)


def least_seconds(
    steps: Iterable[Step], slots: Sequence[int], costs: Any, *, cold: bool = False, pooled: bool = False
) -> float:
    """Seconds that no system takes less than for `steps`.

    Args:
      slots: device slots of each MoE layer.
      costs: the machine's, as the simulator charges them.
      cold: slots start empty; otherwise what they start with is free.
      pooled: all layers share them.
    """
    base, slopes, used, kept = 0.0, [], 0, 0
    gaps: list[list[tuple[int, int]]] = [[] for _ in slots]  # (end, begin) of each stay from one use to the next
    last: list[dict[int, int]] = [{} for _ in slots]
    known: dict[tuple, tuple[float, np.ndarray]] = {}
    for number, step in enumerate(steps):
        base += costs.step(step.tokens)
        tokens, rest = step.tokens, costs.layer(step.tokens, step.context)
        for layer, loads, *_ in step.layers:
            used += len(loads)
            key = (tokens, len(loads) if tokens == 1 else tuple(sorted(loads.values())))
            split = known.get(key)
            if split is None:
                split = known[key] = _splits(sorted(loads.values()), tokens, costs)
            base += rest + split[0]
            slopes.append(split[1])
            seen, stays = last[layer], gaps[layer]
            for expert in loads:
                if expert in seen:
                    stays.append((number, seen[expert]))
                seen[expert] = number
    if pooled:  # a place in time is a step and a layer
        layers = len(slots)
        stays = [(end * layers + i, begin * layers + i) for i, own in enumerate(gaps) for end, begin in own]
        kept = _most_kept(stays, sum(slots))
    else:
        kept = sum(_most_kept(stays, room) for stays, room in zip(gaps, slots))
    computing = base + np.concatenate([[0.0], np.cumsum(np.sort(np.concatenate([np.zeros(0), *slopes])))])
    free = kept + (0 if cold else sum(slots))
    transfers = np.maximum(0, used - np.arange(used + 1) - free)
    return float(np.maximum(computing, transfers * costs.transfer(False)).min())


def _splits(loads: Sequence[int], tokens: int, costs: Any) -> tuple[float, np.ndarray]:
    """(makespan with nothing on the CPU, what each further expert there adds at least, rising).

    It is the lower convex envelope of max(CPU, device) by the number of experts on the CPU.
    """
    on_cpu = np.concatenate([[0.0], np.cumsum(sorted(min(costs.cpu(n, False), costs.cpu(n, True)) for n in loads))])
    on_device = np.concatenate([[0.0], np.cumsum(sorted(costs.device(n) for n in loads))])[::-1]
    makespan = np.maximum(on_cpu, costs.shared(tokens) + on_device)
    hull = [0]
    for n in range(1, len(makespan)):
        while len(hull) > 1 and _slope(makespan, hull[-2], n) <= _slope(makespan, hull[-2], hull[-1]):
            hull.pop()
        hull.append(n)
    return float(makespan[0]), np.diff(np.interp(np.arange(len(makespan)), hull, makespan[hull]))


def _slope(values: np.ndarray, a: int, b: int) -> float:
    return (values[b] - values[a]) / (b - a)


def _most_kept(stays: list[tuple[int, int]], room: int) -> int:
    """How many of the stays (end, begin) fit `room` slots, one after another in each.

    The earliest end first, into the slot that has been free for the shortest time (Faigle and Nawijn 1995).
    """
    free, count = [-1] * room, 0  # when each slot falls free, sorted
    for end, begin in sorted(stays):
        slot = bisect_right(free, begin) - 1
        if slot >= 0:
            free.pop(slot)
            insort(free, end)
            count += 1
    return count
