"""The warm-up at load: times host experts, device experts, shared experts, a layer's front and transfers, so that the
cost model holds this machine's figures and no literals.

A sample is the median of a few repeats; experts are rotated so that weights come from memory and not from a cache.
"""

from __future__ import annotations

import itertools
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from hybrimoe_jax.decide.costs import CostModel, Samples
from hybrimoe_jax.decide.costs import fit as fit_costs
from hybrimoe_jax.runtime import programs
from hybrimoe_jax.runtime.device_model import DeviceModel
from hybrimoe_jax.runtime.host import HostExecutor, HostWork
from hybrimoe_jax.runtime.slots import SlotPool
from hybrimoe_jax.runtime.transfer import Link

REPEATS = 7
ROTATION = 8
CPU_LOADS = (1, 2, 4, 16, 64)
ROWS = (1, 16)


def measure(model: DeviceModel, pool: SlotPool, link: Link, host: HostExecutor, weights, capacity: int) -> CostModel:
    """Runs the warm-up (a second or two, most of it compiling what decoding needs anyway) and fits the costs.

    Args: weights: (MoE layer ordinal, expert) -> ExpertWeights. capacity: of the KV cache used for the front's timing.
    """
    config, clock = model.config, host.clock
    experts = list(
        itertools.islice(itertools.product(range(len(model.moe_layers)), range(config.num_experts)), ROTATION)
    )
    samples = Samples(expert_bytes=pool.expert_bytes)

    def timed(run, repeats: int = REPEATS) -> float:
        run()
        times = []
        for _ in range(repeats):
            start = clock.now()
            run()
            times.append(clock.now() - start)
        return statistics.median(times)

    rng = np.random.default_rng(0)
    width = config.hidden_size
    rotation = itertools.cycle(experts)

    def host_run(load: int, count: int):
        x = rng.standard_normal((load, width), np.float32)
        rows, mix = np.arange(load), np.ones(load, np.float32)

        def run():
            for layer, expert in [next(rotation) for _ in range(count)]:
                host.submit(HostWork(layer, [expert], x, [rows], [mix]), inline=True).result()

        return run

    for load in CPU_LOADS:
        alone = timed(host_run(load, 1))
        several = timed(host_run(load, 4))
        following = min(alone, (several - alone) / 3) if several > alone else several / 4
        samples.cpu_first.append((load, alone))
        samples.cpu.append((load, following))

    staged = [link.put(weights(*experts[i % len(experts)])) for i in range(2)]
    slots = [pool.stream(part) for part in staged]
    for rows in ROWS:
        x = jax.device_put(jnp.asarray(rng.standard_normal((rows, width), np.float32)), model.device)
        zeros = jnp.zeros_like(x)
        for load in sorted({1, rows}):
            index = {0: np.arange(load)}
            mix = {0: np.ones(load, np.float32)}

            def device_run(x=x, zeros=zeros, index=index, mix=mix):
                jax.block_until_ready(programs.add_device_experts(zeros, x, [(0, slots[0])], index, mix))

            samples.device.append((load, timed(device_run)))
        layer = model.moe_layers[0]
        if layer.programs.shared is not None:
            samples.shared.append(
                (rows, timed(lambda x=x: jax.block_until_ready(layer.programs.shared(layer.params, x))))
            )
        samples.layer.append((rows, timed(_front_run(model, layer, x, capacity))))

    def transfer_run(parts: int):
        def run():
            jax.block_until_ready(pool.stream(link.put(weights(*next(rotation)))))

        def half():
            jax.block_until_ready(jax.device_put(weights(*next(rotation)).down.copy(), model.device))

        return run if parts == 2 else half

    down_bytes = weights(*experts[0]).down.nbytes
    samples.transfer.append((down_bytes, timed(transfer_run(1))))
    samples.transfer.append((pool.expert_bytes, timed(transfer_run(2))))
    busy = _beside_host(host, experts, rng.standard_normal((1, width), np.float32))
    with busy:
        samples.transfer_cpu_busy.append((pool.expert_bytes, timed(transfer_run(2))))
    return fit_costs(samples, source="warm-up on this machine")


def _front_run(model, layer, x, capacity):
    rows = x.shape[0]
    routers = model.lookahead_routers(layer.ordinal, 0)
    positions = np.arange(rows, dtype=np.int32)[None]
    nothing = jnp.zeros_like(x)
    h = x[None]
    shapes = layer.cache_shapes(1, capacity)
    cache = {name: jnp.zeros(shape, model.cache_dtype) for name, shape in shapes.items()}

    def run():
        nonlocal cache
        *_, cache, packed = layer.programs.front(layer.params, routers, h, nothing, nothing, cache, positions)
        jax.block_until_ready(packed)

    return run


class _beside_host:
    """While open, a host worker computes experts over and over, so that it reads memory beside what is timed."""

    def __init__(self, host: HostExecutor, experts, x: np.ndarray):
        self._host, self._experts, self._x, self._on = host, experts, x, False

    def __enter__(self):
        import threading

        self._on = True
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def __exit__(self, *_):
        self._on = False
        self._thread.join()

    def _loop(self):
        rows, mix = np.zeros(1, np.int64), np.ones(1, np.float32)
        for layer, expert in itertools.cycle(self._experts):
            if not self._on:
                return
            self._host.submit(HostWork(layer, [expert], self._x, [rows], [mix]), inline=True).result()


def wake_latency(host: HostExecutor, width: int) -> float:
    """Seconds to hand a worker thread nothing and get it back: work shorter than this is better done inline."""
    times = []
    empty = HostWork(0, [], np.zeros((1, width), np.float32), [], [])
    for _ in range(REPEATS + 2):
        start = host.clock.now()
        host.submit(empty).result()
        times.append(host.clock.now() - start)
    return statistics.median(times[2:])
