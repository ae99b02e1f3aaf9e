"""What time it is, and what a step's work takes: on this machine's clock, or on that of a profile's machine.

A step tells its clock what it does, and asks it what has landed; it never asks which clock that is. Under the wall
clock things take the time they take. Under the virtual clock a `VirtualMachine` says when each of them would have
ended. Every time that is shown names its clock.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hybrimoe_jax.decide.plan import LayerPlan
from hybrimoe_jax.engine.lanes.host_pace import HostPace
from hybrimoe_jax.engine.lanes.link_pace import LinkPace
from hybrimoe_jax.engine.lanes.pacing import NO_PACING, NoPacing, Pacing
from hybrimoe_jax.engine.stats import Lanes

if TYPE_CHECKING:
    from hybrimoe_jax.engine.lanes.transfer import Link, Transfer
    from hybrimoe_jax.machine.virtual import VirtualMachine


class Clock(abc.ABC):
    """The time of a step; seconds throughout. `pacing`: how long the device's programs are made to last."""

    name: str
    pacing: NoPacing = NO_PACING
    real = True
    """Whether work takes its time while it is done; else its time is worked out once it is planned."""

    @abc.abstractmethod
    def now(self) -> float: ...

    @abc.abstractmethod
    def compile_seconds(self) -> float:
        """Spent compiling so far, of what `now` counts."""

    @abc.abstractmethod
    def planning_time(self) -> float | None:
        """What the planner is told as `now`; None: it goes on from its own prediction."""

    @abc.abstractmethod
    def begin_step(self, tokens: int, streamed: Sequence[int]) -> None:
        """A step begins, and with it the transfers of the first MoE layer's `streamed` experts."""

    @abc.abstractmethod
    def front(self, moe_layer: int, tokens: int, context: int, looked_ahead: bool) -> None:
        """A layer's attention and router have run."""

    @abc.abstractmethod
    def landed(self, link: Link) -> list[Transfer]:
        """Takes the prefetches off the link that have landed by now."""

    @abc.abstractmethod
    def settled(self, link: Link, under_way: Sequence[tuple[int, int]]) -> list[Transfer]:
        """Waits for all prefetches `under_way`, (layer, expert), between two steps, and takes them off the link."""

    @abc.abstractmethod
    def transfer_seconds(self, transfer: Transfer) -> float | None:
        """How long a transfer held the link, where that was measured."""

    @abc.abstractmethod
    def carry_out(self, plan: LayerPlan, loads: Mapping[int, int], tokens: int) -> None:
        """A plan is about to be carried out."""

    @abc.abstractmethod
    def prefetch(self, moe_layer: int, expert: int) -> None:
        """A prefetch is issued."""

    @abc.abstractmethod
    def lanes(self, measured: Lanes) -> Lanes:
        """Busy seconds of the lanes since the layer's `front`, of which `measured` were measured."""

    @abc.abstractmethod
    def drain(self) -> None:
        """Whatever was under way is forgotten."""

    def overshoot(self, reset: bool = False) -> dict[str, dict[str, float]]:
        """How well each lane of a paced device kept its pace since the last reset; empty for every other device."""
        return {}

    @abc.abstractmethod
    def attach(self, timeline):
        """Takes a timeline if it notes events itself.

        Returns the one that the executor notes its events in, or None.
        """


class WallClock(Clock):
    """Monotonic seconds of this machine. `host`: how long host experts last, on a paced device."""

    name = "wall"
    host: HostPace | None = None

    def now(self) -> float:
        return time.perf_counter()

    def compile_seconds(self) -> float:
        return compile_clock().seconds

    def planning_time(self) -> float | None:
        return None

    def begin_step(self, tokens, streamed) -> None:
        pass

    def front(self, moe_layer, tokens, context, looked_ahead) -> None:
        pass

    def landed(self, link: Link) -> list[Transfer]:
        return link.landed()

    def settled(self, link: Link, under_way: Sequence[tuple[int, int]]) -> list[Transfer]:
        return [link.wait(*key) for key in under_way]

    def transfer_seconds(self, transfer: Transfer) -> float:
        return transfer.seconds

    def carry_out(self, plan, loads, tokens) -> None:
        pass

    def prefetch(self, moe_layer, expert) -> None:
        pass

    def lanes(self, measured: Lanes) -> Lanes:
        return measured

    def drain(self) -> None:
        pass

    def attach(self, timeline):
        return timeline


class PacedClock(WallClock):
    """This machine's seconds, on a device that is slowed to a profile.

    Args: pacing: of its programs. host: of host experts, if there are any.
    Attributes: costs: seconds of everything. link: how long transfers last.
    """

    name = "paced"

    def __init__(self, pacing: Pacing, host: HostPace | None = None):
        self.pacing, self.costs, self.host = pacing, pacing.costs, host
        self.link = LinkPace(self.costs, self.now, host)

    def planning_time(self) -> float:
        return self.now()

    def overshoot(self, reset: bool = False) -> dict[str, dict[str, float]]:
        from hybrimoe_jax.host_kernels.native import pace

        lanes = {"device": pace.overshoot(reset), "link": self.link.late}
        if self.host is not None:
            lanes["cpu"] = self.host.late
        seen = {lane: dataclasses.asdict(late) for lane, late in lanes.items()}
        if reset:
            for lane in (self.link, self.host):
                if lane is not None:
                    lane.late.reset()
        return seen


class VirtualClock(Clock):
    """Args: machine: keeps the time, and says what lands when."""

    name = "virtual"
    real = False

    def __init__(self, machine: VirtualMachine):
        self.machine = machine
        self._before = machine.lanes()

    def now(self) -> float:
        return self.machine.now

    def compile_seconds(self) -> float:
        return 0.0

    def planning_time(self) -> float:
        return self.machine.now

    def begin_step(self, tokens, streamed) -> None:
        self.machine.step(tokens, streamed)

    def front(self, moe_layer, tokens, context, looked_ahead) -> None:
        self._before = self.machine.lanes()
        self.machine.front(moe_layer, tokens, context, looked_ahead)

    def landed(self, link: Link) -> list[Transfer]:
        return [link.wait(*key) for key in self.machine.landed()]

    def settled(self, link: Link, under_way: Sequence[tuple[int, int]]) -> list[Transfer]:
        return [link.wait(*key) for key in self.machine.settle()]

    def transfer_seconds(self, transfer: Transfer) -> None:
        return None

    def carry_out(self, plan, loads, tokens) -> None:
        self.machine.run(plan, loads, tokens)

    def prefetch(self, moe_layer, expert) -> None:
        self.machine.prefetch(moe_layer, expert)

    def lanes(self, measured: Lanes) -> Lanes:
        return Lanes(*(after - before for before, after in zip(self._before, self.machine.lanes())))

    def drain(self) -> None:
        self.machine.drain()

    def attach(self, timeline) -> None:
        self.machine.timeline = timeline


class CompileClock:
    """Adds up what jax reports of tracing, lowering and compiling in this process.

    So no measured step hides a compilation.
    """

    def __init__(self):
        import jax.monitoring

        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def _note(self, event: str, duration_secs: float, **_) -> None:
        if event.startswith("/jax/core/compile"):
            self.seconds += duration_secs


@functools.lru_cache(maxsize=1)
def compile_clock() -> CompileClock:
    """The process's one: listeners cannot be unregistered one by one."""
    return CompileClock()
