"""The callback executor: fetches land first, then one jitted call of the Flax MoE module computes the layer.

The simple reference for the overlapped executor; same plans, same answers, no overlap. On the CPU backend jax must run
with synchronous dispatch (`jax_cpu_enable_async_dispatch=False`), or a callback can hang on one core.
"""

from __future__ import annotations

import functools

import jax
import numpy as np

from hybrimoe_jax.decide.plan import Fetch, LayerPlan
from hybrimoe_jax.engine.device_model import DeviceLayer
from hybrimoe_jax.engine.inputs import bucket
from hybrimoe_jax.engine.lanes.host import HostExecutor
from hybrimoe_jax.engine.programs import program
from hybrimoe_jax.engine.routing import HostRouting
from hybrimoe_jax.engine.stats import Lanes
from hybrimoe_jax.engine.steps.layered import LayeredForward
from hybrimoe_jax.host_kernels.kernel import run_experts
from hybrimoe_jax.models.hybrid import HybridMoE, register_host
from hybrimoe_jax.models.parameters import merge


@functools.cache
def moe_program(graphdef, kernel: str = "xla"):
    """(params, acc, x, slot_weights, slots, host) -> [N, D] for every layer with this static part and device kernel."""

    def moe(params, acc, x, slot_weights, slots, host):
        return HybridMoE(merge(graphdef, params).ffn, kernel)(acc, x, slot_weights, slots, host)

    return program(moe)


class HostExperts:
    """What a callback runs: numpy only, no statistics, any number of times.

    What it raises would reach the caller as a text of XLA's: it is kept for whoever waits for the program, see `check`.
    """

    def __init__(self, host: HostExecutor):
        self._host = host
        self._error: BaseException | None = None

    def check(self) -> None:
        """Raises what the host experts have raised."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def __call__(self, layer: int, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
        out = np.zeros_like(x)
        try:
            self._add(out, layer, x, ids, weights)
        except BaseException as error:
            self._error = error
        return out

    def _add(self, out: np.ndarray, layer: int, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> None:
        experts = [e for e in np.unique(ids).tolist() if e >= 0]
        places = [np.nonzero(ids == e) for e in experts]
        run_experts(
            self._host.kernel,
            [self._host.handle(layer, e) for e in experts],
            np.ascontiguousarray(x),
            [rows for rows, _ in places],
            [weights[place] for place in places],
            out,
        )


class CallbackForward(LayeredForward):
    """See `LayeredForward`. The callback uses the host lane's kernel and handles."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._experts = HostExperts(self.host)
        self._handle = np.int32(register_host(self._experts))

    def carry_out(self, run, lanes, layer, routed, block, routing: HostRouting, plan: LayerPlan) -> None:
        now, moe_layer, x = self.link.clock.now, run.moe_layer, routed.x
        started = now()
        kept, acc = self._bring_in(moe_layer, layer, x, routing, plan, lanes)
        if self.verify is not None:
            self.verify(moe_layer)
        if plan.fetch or plan.awaited:
            lanes.link = max(lanes.link, now() - started)
        started = now()
        slots = [(expert, self.pool.get(moe_layer, expert)) for expert in kept]
        acc = self._call(layer, acc, x, slots, routing, plan.cpu)
        jax.block_until_ready(acc)
        self._experts.check()
        lanes.device = now() - started
        if self.timeline is not None:  # one event for all: what runs inside one executable cannot be timed apart
            self.timeline.moe_block(moe_layer, started, now(), device=kept, cpu=plan.cpu)
        self.prefetch(moe_layer, routing)
        run.device_part, run.host_part = acc, self.no_host_part(x.shape[0])

    def _bring_in(self, moe_layer: int, layer: DeviceLayer, x, routing: HostRouting, plan: LayerPlan, lanes: Lanes):
        """Waits for all that moves.

        Returns the experts that are in slots then, and the sum of those that no slot keeps (None if there is none).
        """
        acc, kept = None, list(plan.device)
        for fetch in plan.fetch:
            if not fetch.stream:
                self._fetch(moe_layer, fetch)
                kept.append(fetch.expert)
        for fetch in plan.awaited:
            slot = self.wait_for(moe_layer, fetch)
            if fetch.stream:
                acc = self._call(layer, acc, x, [(fetch.expert, slot)], routing, ())
            else:
                kept.append(fetch.expert)
        for expert in plan.double_buffered:
            slot = self.double_buffered(moe_layer, expert, lanes)
            acc = self._call(layer, acc, x, [(expert, slot)], routing, ())
        for fetch in plan.fetch:
            if fetch.stream:
                acc = self._call(layer, acc, x, [(fetch.expert, self._fetch(moe_layer, fetch))], routing, ())
        return kept, acc

    def _fetch(self, moe_layer: int, fetch: Fetch):
        """A demand fetch that has landed."""
        issued = self.link.clock.now()
        slot = jax.block_until_ready(self.fetched(moe_layer, fetch, self.start_fetch(moe_layer, fetch)))
        if self.timeline is not None:
            self.timeline.transfer("fetch", moe_layer, fetch.expert, issued, self.link.clock.now())
        return slot

    def _call(self, layer, acc, x, slots, routing: HostRouting, cpu):
        """One jitted call; the number of slots is padded to a power of two with a repeated slot of weight zero."""
        rows = x.shape[0]
        count = bucket(len(slots)) if slots else 0
        slot_weights = np.zeros((count, rows), np.float32)
        for i, (expert, _) in enumerate(slots):
            slot_weights[i, routing.rows[expert]] = routing.weights[expert]
        given = tuple(slot for _, slot in slots + slots[:1] * (count - len(slots)))
        host = None
        if cpu:
            ids = np.full(routing.ids.shape, -1, np.int32)
            mine = np.isin(routing.ids[routing.valid], list(cpu))
            ids[routing.valid] = np.where(mine, routing.ids[routing.valid], -1)
            host = (self._handle, np.int32(layer.moe_layer), ids, np.ascontiguousarray(routing.row_weights))
        moe = moe_program(layer.graphdef, self.model.device_kernel)
        return moe(layer.params, acc, x, slot_weights, given, host)
