"""What an engine is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from hybrimoe_jax.decide.planner import Planner
from hybrimoe_jax.decide.systems import System
from hybrimoe_jax.engine import budget, exhaustion
from hybrimoe_jax.engine.config import EngineConfig
from hybrimoe_jax.engine.device_model import DeviceModel
from hybrimoe_jax.engine.lanes import threads
from hybrimoe_jax.engine.lanes.clock import Clock
from hybrimoe_jax.engine.lanes.host import HostExecutor
from hybrimoe_jax.engine.lanes.slots import SlotPool
from hybrimoe_jax.engine.lanes.transfer import Link
from hybrimoe_jax.engine.programs import Device
from hybrimoe_jax.engine.stats import RunStats
from hybrimoe_jax.engine.step import Forward
from hybrimoe_jax.machine.costs import CostModel
from hybrimoe_jax.machine.profile import MachineCosts


@dataclasses.dataclass(kw_only=True)
class Parts:
    """What an engine is made of.

    `slots`: of each MoE layer. `measuring_s`: seconds of measurements, without compiling. `lookahead`: layers at most.
    `wake_s`: what waking a host thread takes. `fusible`: whether a decode step could be one program.
    `slots_given_up`: because the device's memory ran out. `shrink`: has the executor go on with fewer slots.
    The dense executor has no planner, costs, pool, link and host lane.
    """

    options: EngineConfig
    system: System
    device: Device
    model: DeviceModel
    forward: Forward
    clock: Clock
    footprint: budget.Footprint
    cores: threads.ThreadBudget
    expert_format: str
    device_kernel: str
    slots: list[int]
    slots_given_up: int = 0
    shrink: Callable[[str], tuple[Planner, list[int]]] | None = None
    measuring_s: float = 0.0
    lookahead: int = 0
    wake_s: float = 0.0
    fusible: bool = False
    planner: Planner | None = None
    costs: CostModel | MachineCosts | None = None
    pool: SlotPool | None = None
    link: Link | None = None
    host: HostExecutor | None = None

    def new_stats(self) -> RunStats:
        paced, experts = self.options.paced, self.model.config.num_experts * len(self.model.moe_layers)
        return RunStats(
            system=self.system.name,
            executor=self.options.executor,
            cache_ratio=sum(self.slots) / experts if experts else 0.0,
            clock=self.options.clock,
            cost_shape=self.options.cost_shape,
            device=self.device.platform if paced is None else "paced",
            profile=None if paced is None else paced.profile,
            slowdown=None if paced is None else paced.slowdown,
            host_kernel=self.host.kernel.describe() if self.host else {},
            device_kernel=self.device_kernel,
            cores=dataclasses.asdict(self.cores),
            costs=self.costs.describe() if self.costs else {},
            slots=self.slots,
            expert_format=self.expert_format,
        )

    def give_up_slots(self, why: str) -> None:
        """Goes on with fewer slots where the device's memory ran out; DeviceError where it did so before."""
        if self.shrink is None or self.pool is None:
            raise exhaustion.still(why)
        before = sum(self.slots)
        self.planner, self.slots = self.shrink(why)
        self.slots_given_up = before - sum(self.slots)
        self.footprint = dataclasses.replace(self.footprint, slots=self.pool.expert_bytes * sum(self.slots))

    def close(self) -> None:
        for part in (self.host, self.link):
            if part is not None:
                part.close()
