"""What a machine's costs mean for a model, in numbers a person can use."""

from __future__ import annotations

import math
from typing import Any

MOST_LOAD = 1 << 16


def fetch_from_load(costs: Any) -> int | None:
    """From what load on an expert is worth fetching: it is done sooner over the link and on the device than on the CPU.

    The CPU computes meanwhile, and has other experts before it. None: from none up to `MOST_LOAD`.
    """
    load = 1
    while not _worth_fetching(costs, load):
        load *= 2
        if load > MOST_LOAD:
            return None
    low, high = load // 2, load  # not worth it at `low`; the CPU's time rises faster than the device's
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _worth_fetching(costs, middle) else (middle, high)
    return high


def device_from_load(costs: Any) -> int | None:
    """From what load on a resident expert is done sooner on the device than on the CPU; None as above."""
    for power in range(MOST_LOAD.bit_length()):
        if costs.device(1 << power) < _cpu(costs, 1 << power):
            return 1 << power
    return None


def layers_to_hide(costs: Any, layer_s: float) -> int:
    """How many layers of `layer_s` seconds a prefetch must be ahead of need, so that nobody waits for it."""
    return max(1, math.ceil(costs.transfer(True) / layer_s))


def _worth_fetching(costs: Any, load: int) -> bool:
    return costs.transfer(True) + costs.device(load) < _cpu(costs, load)


def _cpu(costs: Any, load: int) -> float:
    return min(costs.cpu(load), costs.alone(load)) if costs.shares_cores else costs.cpu(load)
