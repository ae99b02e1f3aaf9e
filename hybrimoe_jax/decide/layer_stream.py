"""Whole layers through two buffers: how FreeToken reads prompts (arXiv 2608.16157).

A chunk of a prompt asks for nearly every expert of every layer, so nothing is gained by choosing. The device runs all
that were activated: the resident ones from their slots, the others from one of two buffers. While layer l computes from
one, the experts of layer l+1 that are not resident cross the link into the other, asked for or not, since their routing
is not known yet; those of the first layer start with the step. When layer l+1 starts, layer l is done with its buffer,
and layer l+2 may follow. Nothing enters or leaves the slots.

With compute times C and stream times S of whole layers a chunk so takes about S of the first layer + the sum of max(C
of layer l, S of layer l+1) + C of the last; less, since a layer's experts start one by one as they land.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from hybrimoe_jax.decide.costs import Costs
from hybrimoe_jax.decide.plan import Counters
from hybrimoe_jax.decide.schedule import FetchMissesScheduler, Problem, Schedule

BUFFERED_LAYERS = 2


class StreamedLayer(NamedTuple):
    """A layer's lanes, and where the device's experts are: in its buffer (in order), in slots, or still on the link."""

    double_buffered: tuple[int, ...]
    schedule: Schedule
    device: tuple[int, ...]
    awaited: tuple[int, ...]


class LayerStream:
    """The buffers' contents, by when they land on the planner's clock.

    Args:
      num_experts: routed experts in each layer.
      costs: the CPU computes no routed expert meanwhile, so transfers are those of a link alone.
      counters: what crossed the link is counted there.
    """

    def __init__(self, num_experts: int, costs: Costs, counters: Counters):
        self.num_experts, self.costs, self.counters = num_experts, costs, counters
        self._rule = FetchMissesScheduler()
        self._landing: dict[int, dict[int, float]] = {}

    def start(self, layer: int, present: Collection[int], link_free: float) -> tuple[tuple[int, ...], float]:
        """Queues the experts of `layer` that are not `present` (resident or under way), in the order of their ids.

        Args: link_free: when the link is done with what is queued. Returns them, and when it is done with them as well.
        """
        experts = tuple([expert for expert in range(self.num_experts) if expert not in present])
        transfer = self.costs.transfer(False)
        self._landing[layer] = {expert: link_free + (i + 1) * transfer for i, expert in enumerate(experts)}
        self.counters.layer_streamed += len(experts)
        return experts, link_free + len(experts) * transfer

    def schedule(
        self,
        layer: int,
        loads: Mapping[int, int],
        tokens: int,
        resident: Collection[int],
        in_flight: Mapping[int, float],
        clock: float,
        link_busy: float,
    ) -> StreamedLayer:
        """The layer as it is run; its buffer is done with.

        Args: as of `schedule.Problem`; in_flight: prefetches under way. An expert that was resident when the stream was
        started and has been evicted by a prefetch since is fetched.
        """
        landing = self._landing.pop(layer, {})
        absent = [expert for expert in loads if expert not in resident]
        coming = {expert: max(0.0, landing[expert] - clock) for expert in absent if expert in landing}
        problem = Problem(
            loads, resident, self.costs, tokens, None, {**coming, **in_flight}, link_busy, allow_cpu=False
        )
        schedule = self._rule.schedule(problem)
        double_buffered = tuple([expert for expert in schedule.awaited if expert not in in_flight])
        self.counters.layer_streamed_used += len(double_buffered)
        device = tuple([expert for expert in schedule.device if expert in resident])
        return StreamedLayer(double_buffered, schedule, device, tuple([e for e in schedule.awaited if e in in_flight]))
