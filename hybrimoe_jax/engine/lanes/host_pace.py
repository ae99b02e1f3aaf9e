"""When the host experts of a paced device end: one behind the other, each as long as the profile says.

Imports no jax.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hybrimoe_jax.engine.lanes.pacing import Lateness, sleep_until
from hybrimoe_jax.machine.costs import CostModel
from hybrimoe_jax.machine.profile import MachineCosts


class HostPace:
    """Args: costs: seconds, as they are to last. now: the clock.

    Attributes:
      late: how well ends were kept.
      free: when the lane is.
      watchers: called with (now, until) when the lane is busy until then.
    """

    def __init__(self, costs: CostModel | MachineCosts, now: Callable[[], float]):
        self.costs, self.now = costs, now
        self.late = Lateness()
        self.watchers: list[Callable[[float, float], None]] = []
        self.free = 0.0

    def start(self, experts: Sequence[int], loads: Sequence[int], wide: bool) -> list[tuple[int, float, float]]:
        """Experts that start now: (expert, begin, end) of each. `wide`: with all cores, where the costs know them."""
        costs, now = self.costs, self.now()
        end, spans = max(now, self.free), []
        for index, (expert, load) in enumerate(zip(experts, loads, strict=True)):
            begin, first = end, index == 0
            if wide and isinstance(costs, CostModel) and costs.shares_cores:
                end += costs.alone(load) + (costs.alone_first if first else 0.0)
            else:
                end += costs.cpu(load, first)
            spans.append((expert, begin, end))
        self.free = end
        for watch in self.watchers:
            watch(now, end)
        return spans

    def wait(self, until: float) -> None:
        """Sleeps until experts have lasted as long as they should."""
        self.late.note(sleep_until(until))
