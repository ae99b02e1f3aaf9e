"""What a warm-up times: an engine's own programs and lanes, each asked for one kind of work.

Experts rotate, so that weights come from memory as they will in a run, and not from a cache. A `Run` does its work once
and returns when it is done.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp
import numpy as np

from hybrimoe_jax.decide.prefetch.prediction import predict
from hybrimoe_jax.engine import programs
from hybrimoe_jax.engine.device_model import DeviceModel
from hybrimoe_jax.engine.device_probes import DevicePrograms
from hybrimoe_jax.engine.lanes.clock import PacedClock
from hybrimoe_jax.engine.lanes.host import HostExecutor, HostWork
from hybrimoe_jax.engine.lanes.slots import SlotPool, write_slot
from hybrimoe_jax.engine.lanes.transfer import Link
from hybrimoe_jax.engine.routing import read_routing
from hybrimoe_jax.formats.packing import HostExpert, PackedExpert
from hybrimoe_jax.formats.plain import ExpertWeights

Run = Callable[[], object]
REPEATS = 7
ROTATION_BYTES = 64 << 20
"""Weights that the timed experts rotate over."""


class EngineLanes:
    """Args: model, pool, link, host: the engine's; weights: (MoE layer, expert) -> HostExpert.

    Attributes: `now`: seconds of this machine; `shares_cores`: whether the device works on the CPU's cores;
    `expert_bytes`: of what the link's times are of; `moves_parts`: whether less than an expert takes less time (a paced
    link has one time for all).
    """

    def __init__(self, model: DeviceModel, pool: SlotPool, link: Link, host: HostExecutor, weights):
        self.model, self.pool, self.link, self.host, self.weights = model, pool, link, host, weights
        self.clock, self.now = host.clock, host.clock.now
        self.expert_bytes, self.width = pool.expert_bytes, model.config.hidden_size
        self.shares_cores, self.moves_parts = link.device.platform == "cpu", True
        if isinstance(self.clock, PacedClock):
            costs = self.clock.costs
            self.expert_bytes, self.shares_cores, self.moves_parts = costs.expert_bytes, costs.shares_cores, False
        count = max(4, ROTATION_BYTES // pool.expert_bytes)
        every = itertools.product(range(len(model.moe_layers)), range(model.config.num_experts))
        self._experts = list(itertools.islice(every, count))
        self._wanted = itertools.cycle(self._experts)
        self.on_device = DevicePrograms(model, pool, link, weights, self.clock, count)

    @property
    def part_bytes(self) -> int:
        return _down(self.weights(*self._experts[0])).nbytes

    def prepare(self) -> None:
        """Packs the experts that rotate, as they are after some use: first calls would mislead every later plan."""
        for layer, expert in self._experts:
            self.host.kernel.pack(self.host.handle(layer, expert))

    def cpu(self, load: int, experts: int, wide: bool = False, host: HostExecutor | None = None) -> Run:
        """Experts of one layer on the CPU; `wide`: on all workers. `host`: others than the engine's.

        Every other token of x if several.
        """
        host = host or self.host
        tokens = 1 if load == 1 else 2 * load
        x = np.random.default_rng(0).standard_normal((tokens, self.width), np.float32)
        rows, mix = [np.arange(0, tokens, 2)] * experts, [np.ones(load, np.float32)] * experts
        groups = itertools.cycle(_groups(self._experts, experts))

        def run() -> None:
            layer, chosen = next(groups)
            host.submit(HostWork(layer, list(chosen), x, rows, mix), inline=not wide, wide=wide).result()

        return run

    def cpu_by_threads(self, load: int, threads: int) -> Run:
        """Four experts of one layer on so many threads, which end when nothing refers to the run any more."""
        host = HostExecutor(self.host.kernel, self.weights, threads, threads, self.clock, pace=self.host.pace)
        return self.cpu(load, 4, wide=True, host=host)

    def device(self, tokens: int, experts: int) -> Run:
        """A MoE block on the device: the shared experts, and so many others that all tokens are routed to."""
        start = self.on_device.block(tokens, experts, shared=self._shares())
        return lambda: jax.block_until_ready(start())

    def dispatch(self, tokens: int, experts: int) -> float:
        """Seconds until the calls of such experts return, with the device's work still to be done.

        Nothing where they are part of a call that is made in any case.
        """
        if self.on_device.finder(tokens) is not None:
            return 0.0
        start, times = self.on_device.block(tokens, experts, shared=False), []
        for _ in range(REPEATS):
            began = self.now()
            result = start()
            times.append(self.now() - began)
            jax.block_until_ready(result)
        return statistics.median(times)

    def layer_front(self, tokens: int, context: int) -> Run:
        """Attention and router of a MoE layer, the last token at place `context` of its cache."""
        start = self.on_device.front(tokens, context)
        return lambda: jax.block_until_ready(start())

    def transfer(self, size: int) -> Run:
        """A demand fetch: so many bytes to the device and into a slot; a whole expert goes the way of a step's."""
        if size == self.expert_bytes:
            return lambda: jax.block_until_ready(self.issue_fetch())
        data, slot = self._part(size)

        def part() -> None:
            nonlocal slot
            slot = jax.block_until_ready(write_slot(slot, self.link.put(data)))

        return part

    def prefetch(self, size: int) -> Run:
        """The same as a prefetch, from its issue until it is in a slot: staged by the link's thread."""
        if size != self.expert_bytes:
            return self._prefetch_part(size)

        def run() -> None:
            layer, expert = next(self._wanted)
            self.link.prefetch(layer, expert, self.weights(layer, expert))
            jax.block_until_ready(self.pool.stream(self.link.wait(layer, expert).staged))

        return run

    def _prefetch_part(self, size: int) -> Run:
        data, slot = self._part(size)

        def run() -> None:
            nonlocal slot
            self.link.prefetch(0, 0, data)
            slot = jax.block_until_ready(write_slot(slot, self.link.wait(0, 0).staged))

        return run

    def _part(self, size: int):
        """So many bytes in host memory, and a slot for them."""
        down = size // 3
        slot = (jnp.zeros(size - down, jnp.uint8), jnp.zeros(down, jnp.uint8))
        data = ExpertWeights(np.ones(size - down, np.uint8), np.ones(down, np.uint8))
        return data, jax.device_put(slot, self.link.device)

    def issue_fetch(self):
        """Starts a demand fetch of one expert; the slot's arrays."""
        layer, expert = next(self._wanted)
        return self.pool.stream(self.link.arrived(self.link.fetch(layer, expert, self.weights(layer, expert))))

    def fetch_host(self) -> float:
        """Seconds until the calls that start a demand fetch return."""
        times = []
        for _ in range(REPEATS):
            start = self.now()
            slot = self.issue_fetch()
            times.append(self.now() - start)
            jax.block_until_ready(slot)
        return statistics.median(times)

    def look(self) -> float:
        """Seconds of one distance of lookahead for one token: a later router on the device, its choice read here."""
        model, config = self.model, self.model.config
        ((norm, gate),) = model.lookahead_routers(0, 1)
        h = jnp.ones((1, 1, config.hidden_size), jnp.float32)
        scores = jax.jit(programs.router_scores, static_argnums=3)

        def run() -> None:  # queued, so that dispatch does not count: in a step this is part of another program
            jax.block_until_ready([scores(h, norm, gate, model.eps) for _ in range(REPEATS)])

        row = np.asarray(scores(h, norm, gate, model.eps))[0]
        return _timed(self.now, run) / REPEATS + _timed(self.now, lambda: predict(row, config.num_experts_per_tok))

    def handover(self, context: int) -> float:
        """Seconds that a layer's front takes longer when its routing is waited for and read.

        No less than reading takes. What lies between two measurements may hide the difference on a busy machine. It is
        never nothing, which would say that there is no program to leave.
        """
        config, repeats = self.model.config, 4 * REPEATS
        run, row = self.on_device.front(1, context), np.zeros(1, np.int64)

        def read(packed) -> None:
            read_routing(np.asarray(packed), config.num_experts_per_tok, config.num_experts, row)

        apart = _timed(self.now, lambda: read(run()))
        queued = _timed(self.now, lambda: jax.block_until_ready([run() for _ in range(repeats)])) / repeats
        ready = np.asarray(run())
        return max(_timed(self.now, lambda: read(ready)), apart - queued)

    def beside_cpu(self) -> AbstractContextManager[None]:
        """While open, the CPU computes experts of load 1 over and over: it reads memory beside what is timed."""
        return _beside(self.cpu(1, 1))

    def beside_link(self) -> AbstractContextManager[None]:
        """While open, experts cross the link one behind the other, beside what is timed."""
        wanted = itertools.cycle(self._experts)

        def run() -> None:
            layer, expert = next(wanted)
            self.link.prefetch(layer, expert, self.weights(layer, expert))
            self.link.wait(layer, expert)

        return _beside(run)

    def opens(self, tokens: int) -> bool:
        """Whether a block without routed experts runs anything on the device."""
        return self._shares() or self.on_device.finder(tokens) is not None

    def most_experts(self, tokens: int) -> int | None:
        """Of a block: where its program finds residents by itself, no more than a token has. None: any number."""
        return len(self.on_device.residents()) if self.on_device.finder(tokens) is not None else None

    def _shares(self) -> bool:
        return self.on_device.layer.programs.shared is not None


def wake_latency(host: HostExecutor, width: int) -> float:
    """Seconds to hand a worker thread nothing and get it back: work shorter than this is better done inline."""
    times = []
    empty = HostWork(0, [], np.zeros((1, width), np.float32), [], [])
    for _ in range(REPEATS + 2):
        start = host.clock.now()
        host.submit(empty).result()
        times.append(host.clock.now() - start)
    return statistics.median(times[2:])


def _timed(now: Callable[[], float], run: Run) -> float:
    """The median of a few runs, the first left out."""
    run()
    times = []
    for _ in range(REPEATS):
        start = now()
        run()
        times.append(now() - start)
    return statistics.median(times)


def _groups(experts: Sequence[tuple[int, int]], count: int) -> list[tuple[int, tuple[int, ...]]]:
    """(MoE layer, `count` of its experts) over all that are given; wrapped around where a layer is cut short."""
    layers: dict[int, list[int]] = {}
    for layer, expert in experts:
        layers.setdefault(layer, []).append(expert)
    found = []
    for layer, own in layers.items():
        if len(own) < count and found:
            continue
        turns = itertools.cycle(own)
        found += [(layer, tuple(itertools.islice(turns, count))) for _ in range(-(-len(own) // count))]
    return found


def _down(weights: HostExpert) -> np.ndarray:
    """A smaller array of an expert to transfer: its down matrix."""
    return weights.matrices[2].data if isinstance(weights, PackedExpert) else weights.down


@contextlib.contextmanager
def _beside(run: Run) -> Iterator[None]:
    """While open, another thread calls `run` over and over."""
    stop = threading.Event()

    def loop() -> None:
        while not stop.is_set():
            run()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
