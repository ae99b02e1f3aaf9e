"""The virtual machine: a CPU, a device and a link that carry out plans and take as long as a profile says.

It keeps the virtual clock. What a layer does is known once it is planned, so its events are worked out in order of
time: the CPU runs its experts one behind the other; the device opens with the shared experts and runs its queue,
waiting for what has not landed; the link moves prefetches and demand fetches first come, first served (see `link`). A
layer ends when both computing lanes have ended; then comes the next layer's attention, on the device. Where the link's
two bandwidths are equal a layer takes what the planner predicted; where they differ the planner's constant transfer
time is an estimate and this is the truth.

Used by `replay` and by the live engine under `--clock virtual`, which therefore agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybrimoe_jax.decide.plan import LayerPlan
from hybrimoe_jax.machine.link import LinkLane
from hybrimoe_jax.trace.timeline import Timeline


class VirtualMachine:
    """Lanes under a virtual clock; all times in seconds.

    Args:
      costs: a `CostModel` or `MachineCosts`.
      timeline: events go there, or None.
      links: how many links there are; a transfer takes the one with the fewest waiting. The planner believes in one.

    Per step call `step`, and per MoE layer `front`, `landed`, then (once planned) `run` and `prefetch`.

    Attributes: `now`; `cpu`, `device`: busy seconds so far; `attention`: the part of `device` outside MoE blocks.
    """

    def __init__(self, costs: Any, timeline: Timeline | None = None, links: int = 1):
        self.costs, self.timeline = costs, timeline
        self.links = [LinkLane(costs) for _ in range(links)]
        self.now = self.cpu = self.device = self.attention = 0.0
        self._block = 0.0  # when the latest MoE block began
        self._in_flight: set[tuple[int, int]] = set()  # prefetches not yet told of
        self._landed: list[tuple[float, int, int]] = []
        self._buffered: dict[tuple[int, int], float] = {}  # streamed with their whole layer: when they landed
        self._streaming = 0  # how many of those are still to land

    @property
    def link(self) -> float:
        """Busy seconds of all links so far."""
        return sum([lane.busy for lane in self.links])

    def lanes(self) -> tuple[float, float, float]:
        """Busy seconds so far: (cpu, device, link)."""
        return self.cpu, self.device, self.link

    def step(self, tokens: int, stream: Sequence[int] = ()) -> None:
        """A step begins: what it takes outside its MoE layers is charged here.

        `stream`: experts of the first MoE layer that start to cross the link with it.
        """
        self._block = self.now
        self._start_stream(0, stream)
        self._dense(self.costs.step(tokens), "step")

    def front(self, layer: int, tokens: int, context: int, looked: bool) -> None:
        """A layer's attention and router; the coming layers' routers too where they are `looked` at."""
        seconds = self.costs.layer(tokens, context)
        self._dense(seconds + self.costs.look if looked else seconds, "attention", layer)

    def landed(self) -> list[tuple[int, int]]:
        """Prefetches, (layer, expert), that have landed by now and were not told of, in order."""
        if not self._in_flight:
            return []
        self._advance(self.now)
        ready = [(layer, expert) for _, layer, expert in sorted(self._landed)]
        self._landed.clear()
        self._in_flight.difference_update(ready)
        return ready

    def settle(self) -> list[tuple[int, int]]:
        """Waits until the links are idle; the prefetches that have landed and were not told of, in order."""
        for lane in self.links:
            while len(lane):
                key, began, end = lane.finish_first()
                self._arrived(key, began, end)
                self.now = max(self.now, end)
        return self.landed()

    def run(self, plan: LayerPlan, loads: Mapping[int, int], tokens: int) -> None:
        """Carries out a plan and moves the clock to its end."""
        start = self._block = self.now
        if self._in_flight or self._streaming:
            self._advance(start)
        cpu = self._run_cpu(plan, loads) if plan.cpu else start
        for lane in self.links:
            lane.cpu_until = cpu
        device = self._run_device(plan, loads, tokens)
        self.now = cpu if cpu > device else device
        if plan.next_layer_experts:
            self._start_stream(plan.layer + 1, plan.next_layer_experts)

    def prefetch(self, layer: int, expert: int) -> None:
        """Starts a transfer behind all that is queued, at the start of the MoE block that ran last."""
        self._in_flight.add((layer, expert))
        self._send("prefetch", layer, expert)

    def drain(self) -> None:
        """Forgets every transfer under way."""
        for lane in self.links:
            lane.clear()
        self._landed.clear()
        self._in_flight.clear()
        self._buffered.clear()
        self._streaming = 0

    def _run_cpu(self, plan: LayerPlan, loads: Mapping[int, int]) -> float:
        """The CPU's experts, one behind the other; when they end."""
        cpu = self.now + self.costs.fetch_host * len(plan.fetch)
        first, cost, timeline = True, self.costs.cpu, self.timeline
        for expert in plan.cpu:
            begin = cpu
            cpu += cost(loads[expert], first)
            first = False
            if timeline is not None:
                _note(timeline, "cpu", "expert", plan.layer, expert, begin, cpu, load=loads[expert])
        self.cpu += cpu - self.now
        return cpu

    def _run_device(self, plan: LayerPlan, loads: Mapping[int, int], tokens: int) -> float:
        """The shared experts, then the device's queue, which waits for what has not landed; when it ends."""
        start, timeline, cost = self.now, self.timeline, self.costs.device
        device: float = start + self.costs.shared(tokens)
        busy = device - start
        if timeline is not None and busy:
            timeline.add("device", f"shared {plan.layer}", start, device, layer=plan.layer)
        if plan.fetch or plan.awaited or plan.double_buffered:
            ready = self._arrivals(plan)
            for expert in plan.schedule.device:
                begin = ready.get(expert, device)
                if begin < device:
                    begin = device
                device = begin + cost(loads[expert])
                busy += device - begin
                if timeline is not None:
                    _note(timeline, "device", "expert", plan.layer, expert, begin, device, load=loads[expert])
        else:
            for expert in plan.device:
                begin = device
                device += cost(loads[expert])
                if timeline is not None:
                    _note(timeline, "device", "expert", plan.layer, expert, begin, device, load=loads[expert])
            busy = device - start
        self.device += busy
        return device

    def _dense(self, seconds: float, name: str, *layer: int) -> None:
        start = self.now
        self.now += seconds
        self.device += seconds
        self.attention += seconds
        if self.timeline is not None and seconds:
            self.timeline.add("device", " ".join([name, *map(str, layer)]), start, self.now)

    def _start_stream(self, layer: int, experts: Sequence[int]) -> None:
        for expert in experts:
            self._buffered.pop((layer, expert), None)  # of an earlier step, which did not ask for it
            self._send("stream", layer, expert)
        self._streaming += len(experts)

    def _send(self, kind: str, layer: int, expert: int) -> None:
        lane = self.links[0] if len(self.links) == 1 else min(self.links, key=len)
        lane.send((kind, layer, expert), self._block)

    def _advance(self, until: float) -> None:
        for lane in self.links:
            for job in lane.advance(until):
                self._arrived(*job)

    def _arrived(self, key: tuple[str, int, int], began: float, end: float) -> None:
        kind, layer, expert = key
        if kind == "prefetch":
            self._landed.append((end, layer, expert))
        elif kind == "stream":
            self._buffered[layer, expert] = end
            self._streaming -= 1
        if self.timeline is not None:
            _note(self.timeline, "link", kind, layer, expert, began, end, kind=kind)

    def _arrivals(self, plan: LayerPlan) -> dict[int, float]:
        """When each awaited, streamed or fetched expert is on the device.

        The waits' transfers end here and are not told of.
        """
        layer, buffered = plan.layer, self._buffered
        for fetch in plan.fetch:
            self._send("fetch", layer, fetch.expert)
        wanted = {fetch.expert for fetch in plan.fetch + plan.awaited}.union(plan.double_buffered)
        ready = {expert: buffered[layer, expert] for expert in plan.double_buffered if (layer, expert) in buffered}
        for lane in self.links:
            while any(key[1] == layer and key[2] in wanted for key in lane.keys()):
                key, began, end = lane.finish_first()
                self._arrived(key, began, end)
                if key[1] == layer and key[2] in wanted:
                    ready[key[2]] = end
        if plan.awaited:
            awaited = {(layer, fetch.expert) for fetch in plan.awaited}
            ready |= {landing[2]: landing[0] for landing in self._landed if landing[1:] in awaited}
            self._landed = [landing for landing in self._landed if landing[1:] not in awaited]
            self._in_flight -= awaited
        return ready


def _note(
    timeline: Timeline, lane: str, what: str, layer: int, expert: int, begin: float, end: float, **args: Any
) -> None:
    timeline.add(lane, f"{what} {layer}.{expert}", begin, end, layer=layer, expert=expert, **args)
