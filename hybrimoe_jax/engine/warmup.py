"""The warm-up at load: the cost model holds this machine's figures and no literals.

It times host experts, device experts, shared experts, a layer's front and transfers.

A sample is the median of a few repeats; experts are rotated so that weights come from memory and not from a cache.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import threading

import jax
import jax.numpy as jnp
import numpy as np

from hybrimoe_jax.decide.prefetch.prediction import predict
from hybrimoe_jax.engine import programs
from hybrimoe_jax.engine.device_model import DeviceModel
from hybrimoe_jax.engine.lanes.clock import WallClock
from hybrimoe_jax.engine.lanes.host import HostExecutor, HostWork
from hybrimoe_jax.engine.lanes.slots import SlotPool
from hybrimoe_jax.engine.lanes.transfer import Link
from hybrimoe_jax.engine.routing import read_routing
from hybrimoe_jax.formats.packing import HostExpert, PackedExpert
from hybrimoe_jax.machine.costs import CostModel
from hybrimoe_jax.machine.fit import Samples
from hybrimoe_jax.machine.fit import fit as fit_costs

REPEATS = 7
ROTATION_BYTES = 64 << 20
"""Weights that the timed experts rotate over, so that they come from memory as they will in a run."""
CPU_LOADS = (1, 16, 64)
DEVICE_LOADS = (1, 16, 64)
FRONT_TOKENS = (1, 16)


def measure(
    model: DeviceModel,
    pool: SlotPool,
    link: Link,
    host: HostExecutor,
    weights,
    capacity: int,
    inline_s: float,
    distances: int,
    fusible: bool = False,
) -> CostModel:
    """Runs the warm-up (a second or two, most of it compiling what decoding needs anyway) and fits the costs.

    Args:
      weights: (MoE layer, expert) -> HostExpert.
      capacity: of the KV cache used for the front's timing.
      inline_s: host experts shorter than this are run by the thread that dispatches the device's.
      distances: lookahead depth, whose price is measured too.
      fusible: whether a decode step can be one program, so that leaving it has a price.
    """
    config = model.config
    every = itertools.product(range(len(model.moe_layers)), range(config.num_experts))
    count = max(4, ROTATION_BYTES // pool.expert_bytes)
    experts = list(itertools.islice(every, count))
    samples = Samples(expert_bytes=pool.expert_bytes)
    _host_samples(samples, host, experts, config.hidden_size, link.device.platform == "cpu")
    inline = statistics.median(seconds for load, seconds in samples.cpu if load == 1) < inline_s
    _device_samples(samples, model, pool.some(count), host.clock, capacity, inline)
    _transfer_samples(samples, pool, link, host, experts, weights)
    samples.look = distances * _look(model, host.clock)
    if inline:
        samples.fetch_host = _issue(host.clock, pool, link, itertools.cycle(experts), weights)
    if fusible:
        samples.handover = _handover(model, host.clock, capacity)
    return fit_costs(samples, source="warm-up on this machine")


def _timed(clock: WallClock, run) -> float:
    run()
    times = []
    for _ in range(REPEATS):
        start = clock.now()
        run()
        times.append(clock.now() - start)
    return statistics.median(times)


def _host_run(host: HostExecutor, rotation, load: int, width: int, count: int = 1, wide: bool = False):
    """A call that runs `count` experts of a layer, the next of the rotation, at one load.

    Every other token of x if several; `wide`: as in a step, on all workers.
    """
    tokens = 1 if load == 1 else 2 * load
    x = np.random.default_rng(0).standard_normal((tokens, width), np.float32)
    rows, mix = np.arange(0, tokens, 2), np.ones(load, np.float32)

    def run():
        picks = list(itertools.islice(rotation, count))
        layer = picks[0][0]
        chosen = [expert for at, expert in picks if at == layer]
        work = HostWork(layer, chosen, x, [rows] * len(chosen), [mix] * len(chosen))
        host.submit(work, inline=not wide, wide=wide).result()

    return run


def _host_samples(samples: Samples, host: HostExecutor, experts, width: int, shared_cores: bool) -> None:
    for (
        layer,
        expert,
    ) in experts:  # as they will be after some use; a cost of the first calls would mislead every later plan
        host.kernel.pack(host.handle(layer, expert))
    rotation = itertools.cycle(experts)
    for load in CPU_LOADS:
        alone = _timed(host.clock, _host_run(host, rotation, load, width))
        several = _timed(host.clock, _host_run(host, rotation, load, width, 4))
        samples.cpu_first.append((load, alone))
        samples.cpu.append((load, min(alone, (several - alone) / 3) if several > alone else several / 4))
        if shared_cores:
            few = _timed(host.clock, _host_run(host, rotation, load, width, 2, wide=True))
            many = _timed(host.clock, _host_run(host, rotation, load, width, 8, wide=True))
            each = (many - few) / 6 if many > few else many / 8
            samples.alone.append((load, each))
            samples.alone_first.append((load, max(each, few - each)))


def _device_samples(
    samples: Samples, model: DeviceModel, slots: list, clock: WallClock, capacity: int, inline: bool
) -> None:
    """Measures device experts, shared experts and a layer's front.

    Where host experts run `inline`, a device expert also holds up the host for as long as its dispatch takes; that is
    added to its cost, since a lane of its own cannot show it.
    """
    rotation = itertools.cycle(slots)
    layer = model.moe_layers[0]
    shared = layer.programs.shared
    for load in DEVICE_LOADS:
        x = jnp.ones((load, model.config.hidden_size), jnp.float32)
        rows, mix = {0: np.arange(load)}, {0: np.ones(load, np.float32)}

        def expert(x=x, rows=rows, mix=mix):
            slot = next(rotation)
            jax.block_until_ready(programs.add_device_experts(x, x, [(0, slot)], rows, mix, model.device_kernel))

        samples.device.append(
            (load, _timed(clock, expert) + (_dispatch(model, clock, x, slots[0], rows, mix) if inline else 0))
        )
        if shared is not None:
            samples.shared.append((load, _timed(clock, lambda x=x: jax.block_until_ready(shared(layer.params, x)))))
        if load in FRONT_TOKENS:
            front = _front_run(model, layer, x, capacity)
            samples.layer.append((load, _timed(clock, lambda front=front: jax.block_until_ready(front()))))


def _dispatch(model: DeviceModel, clock: WallClock, x: jax.Array, slot, rows, mix) -> float:
    """Seconds until the call returns, with the device's work still to be done."""
    times = []
    for _ in range(REPEATS):
        start = clock.now()
        result = programs.add_device_experts(x, x, [(0, slot)], rows, mix, model.device_kernel)
        times.append(clock.now() - start)
        jax.block_until_ready(result)
    return statistics.median(times)


def _handover(model: DeviceModel, clock: WallClock, capacity: int) -> float:
    """Seconds that a layer's front takes longer when its routing is waited for and read.

    No less than reading takes.

    What lies between two measurements may hide the difference on a busy machine. It is never nothing, which would say
    that there is no program to leave.
    """
    config, repeats = model.config, 4 * REPEATS
    run = _front_run(model, model.moe_layers[0], jnp.ones((1, config.hidden_size), jnp.float32), capacity)
    row = np.zeros(1, np.int64)

    def read(packed):
        read_routing(np.asarray(packed), config.num_experts_per_tok, config.num_experts, row)

    apart = _timed(clock, lambda: read(run()))
    queued = _timed(clock, lambda: jax.block_until_ready([run() for _ in range(repeats)])) / repeats
    ready = np.asarray(run())
    return max(_timed(clock, lambda: read(ready)), apart - queued)


def _front_run(model: DeviceModel, layer, x: jax.Array, capacity: int):
    """-> a function that dispatches the front of one decode step and returns the packed routing."""
    positions = jnp.arange(x.shape[0], dtype=jnp.int32)[None]
    nothing, h = jnp.zeros_like(x), x[None]
    cache = {name: jnp.zeros(shape, model.cache_dtype) for name, shape in layer.cache_shapes(1, capacity).items()}

    def run():
        nonlocal cache
        *_, cache, packed = layer.programs.front(layer.params, (), h, nothing, nothing, cache, positions, capacity)
        return packed

    return run


def _transfer_samples(samples: Samples, pool: SlotPool, link: Link, host: HostExecutor, experts, weights) -> None:
    rotation = itertools.cycle(experts)

    def whole():
        jax.block_until_ready(pool.stream(link.put(weights(*next(rotation)))))

    def part():  # an explicit copy, since putting an aligned array on the CPU backend would alias it
        jax.block_until_ready(jax.device_put(_down(weights(*next(rotation))).copy(), link.device))

    samples.transfer.append((_down(weights(*experts[0])).nbytes, _timed(host.clock, part)))
    samples.transfer.append((pool.expert_bytes, _timed(host.clock, whole)))

    def beside_the_host():  # the way of a prefetch: staged by the link's thread, then written into a slot
        layer, expert = next(rotation)
        link.prefetch(layer, expert, weights(layer, expert))
        jax.block_until_ready(pool.stream(link.wait(layer, expert).staged))

    with _beside(_host_run(host, itertools.cycle(experts), 1, weights(*experts[0]).width)):
        samples.transfer_cpu_busy.append((pool.expert_bytes, _timed(host.clock, beside_the_host)))


def _down(weights: HostExpert) -> np.ndarray:
    """A smaller array of an expert to transfer: its down matrix."""
    return weights.matrices[2].data if isinstance(weights, PackedExpert) else weights.down


def _issue(clock: WallClock, pool: SlotPool, link: Link, rotation, weights) -> float:
    """Seconds until the calls that start a demand fetch return."""
    times = []
    for layer, expert in itertools.islice(rotation, REPEATS):
        start = clock.now()
        slot = pool.stream(link.put(weights(layer, expert)))
        times.append(clock.now() - start)
        jax.block_until_ready(slot)
    return statistics.median(times)


def _look(model: DeviceModel, clock: WallClock) -> float:
    """Seconds of one distance of lookahead for one token: a later router on the device, its choice read on the host."""
    config = model.config
    ((norm, gate),) = model.lookahead_routers(0, 1)
    h = jnp.ones((1, 1, config.hidden_size), jnp.float32)
    scores = jax.jit(programs.router_scores, static_argnums=3)

    def run():  # queued, so that dispatch does not count: in a step this is part of another program
        jax.block_until_ready([scores(h, norm, gate, model.eps) for _ in range(REPEATS)])

    row = np.asarray(scores(h, norm, gate, model.eps))[0]
    return _timed(clock, run) / REPEATS + _timed(clock, lambda: predict(row, config.num_experts_per_tok))


@contextlib.contextmanager
def _beside(run):
    """While open, another thread calls `run` over and over, so that it reads memory beside what is timed."""
    stop = threading.Event()

    def loop():
        while not stop.is_set():
            run()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def wake_latency(host: HostExecutor, width: int) -> float:
    """Seconds to hand a worker thread nothing and get it back: work shorter than this is better done inline."""
    times = []
    empty = HostWork(0, [], np.zeros((1, width), np.float32), [], [])
    for _ in range(REPEATS + 2):
        start = host.clock.now()
        host.submit(empty).result()
        times.append(host.clock.now() - start)
    return statistics.median(times[2:])
