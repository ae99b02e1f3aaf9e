"""Parts of `gpu_facts` about what lies between host and device: waiting, transfers, callbacks, dispatch, threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np

LAYERS, ARGUMENTS, PACKED_WIDTH, WIDTH, PAGE = 32, 20, 68, 1024, 4096


def timed(run: Callable[[], object], repeats: int) -> float:
    """Median seconds of `run`, after one call that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return median(times)


def host_array(megabytes: float, aligned: bool) -> np.ndarray:
    """float32 [WIDTH, n], on a page's boundary or 16 bytes past one."""
    columns = max(1, int(megabytes * 1e6) // (4 * WIDTH))
    raw = np.zeros(4 * WIDTH * columns + 2 * PAGE, np.uint8)
    start = -raw.ctypes.data % PAGE + (0 if aligned else 16)
    array = raw[start : start + 4 * WIDTH * columns].view(np.float32).reshape(WIDTH, columns)
    array[:] = 1.0
    return array


def measure_read_back(sizes, repeats) -> dict[str, float]:
    """Microseconds until ids, weights and scores [tokens, 68] are a numpy array."""
    import jax
    import jax.numpy as jnp

    step = jax.jit(lambda x: (x + 1.0, x[:, :PACKED_WIDTH] * 2.0))
    found = {}
    for tokens in (1, 128):
        state = {"x": jnp.ones((tokens, WIDTH), jnp.float32)}

        def dispatch(state=state):
            state["x"], packed = step(state["x"])
            return packed

        def ahead(dispatch=dispatch):
            packed = dispatch()
            packed.copy_to_host_async()
            return np.asarray(packed)

        settled = []
        for _ in range(repeats + 1):  # a new array each time: jax keeps the host copy of one that was read
            packed = jax.block_until_ready(dispatch())
            start = time.perf_counter()
            np.asarray(packed)
            settled.append(time.perf_counter() - start)
        found[f"{tokens} tokens, finished array (us)"] = 1e6 * median(settled[1:])
        found[f"{tokens} tokens, dispatch and read (us)"] = 1e6 * timed(lambda d=dispatch: np.asarray(d()), repeats)
        found[f"{tokens} tokens, with copy_to_host_async (us)"] = 1e6 * timed(ahead, repeats)
    return found


def sources(size: float, device) -> tuple[dict[str, Any], Callable[[], None]]:
    """Arrays of `size` MB in each kind of host memory that there is, and what gives the registered one back.

    plain: what NumPy allocates. dma-mapped: the same, registered with the client. pinned_host: jax's own pinned memory.
    """
    import jax

    found: dict[str, Any] = {"plain": host_array(size, False)}
    mapped, kinds = host_array(size, True), {memory.kind for memory in device.addressable_memories()}
    address, release = mapped.ctypes.data, lambda: None
    try:
        device.client.dma_map(address, mapped.nbytes)
        found["dma-mapped"], release = mapped, lambda: device.client.dma_unmap(address)
    except (AttributeError, RuntimeError):  # the CPU backend has it not
        pass
    if "pinned_host" in kinds:
        pinned = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
        found["pinned_host"] = jax.block_until_ready(jax.device_put(found["plain"], pinned))
    return found, release


def measure_transfer(sizes, repeats) -> dict[str, float]:
    """GB/s of device_put from each kind of memory, alone and beside compute, in both orders.

    put, compute: the copy is issued first. compute, put: it is issued behind the compute. Shown are how much of the
    shorter the longer hides (overlap), and GB/s from the copy's issue until it was seen landed.
    """
    import jax
    import jax.numpy as jnp

    device = jax.devices()[0]
    target = jax.sharding.SingleDeviceSharding(device)

    @jax.jit
    def compute(x, rounds):
        return jax.lax.fori_loop(0, rounds, lambda _, y: jnp.tanh(y @ x), x)

    weights = jnp.full((512, 512), 1e-3, jnp.float32)
    one_round = timed(lambda: compute(weights, 50).block_until_ready(), 5) / 50
    found = {}

    def one(source, rounds: int, put_first: bool) -> tuple[float, float, float]:
        """-> seconds until the call returned, until the copy landed, and of both."""
        start = issued = time.perf_counter()
        result = None
        if not put_first:
            result, issued = compute(weights, rounds), time.perf_counter()
        moved = jax.device_put(source, target)
        returned = time.perf_counter()
        result = compute(weights, rounds) if result is None else result
        moved.block_until_ready()
        landed = time.perf_counter()
        result.block_until_ready()
        return returned - issued, landed - issued, time.perf_counter() - start

    for size in sizes:
        kinds, release = sources(size, device)
        for name, source in kinds.items():
            label, nbytes = f"{size:g} MB {name}", source.nbytes
            alone = timed(lambda s=source: jax.device_put(s, target).block_until_ready(), repeats)
            rounds = max(1, int(2 * alone / one_round))
            busy = timed(lambda n=rounds: compute(weights, n).block_until_ready(), repeats)
            found[f"{label}: alone (GB/s)"] = nbytes / alone / 1e9
            for order, first in (("put, compute", True), ("compute, put", False)):
                returned, landed, both = (median(t) for t in zip(*(one(source, rounds, first) for _ in range(repeats))))
                hidden = (alone + busy - both) / min(alone, busy)
                found[f"{label}, {order}: landed (GB/s)"] = nbytes / landed / 1e9
                found[f"{label}, {order}: overlap (0 none, 1 all)"] = min(1.0, max(0.0, hidden))
                found[f"{label}, {order}: the call returns after (us)"] = 1e6 * returned
        release()
    return found


def measure_callback(sizes, repeats) -> dict[str, float]:
    """Microseconds of a jitted program that only calls the host."""
    import jax
    import jax.numpy as jnp

    found = {}
    for tokens in (1, 128):
        x = jnp.ones((tokens, 4096), jnp.float32)
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        call = jax.jit(lambda x, shape=shape: jax.pure_callback(lambda y: np.asarray(y), shape, x))
        nothing = jax.jit(lambda x: x + 1.0)
        found[f"{tokens} x 4096 (us)"] = 1e6 * timed(lambda c=call, x=x: c(x).block_until_ready(), repeats)
        found[f"{tokens} x 4096, program without it (us)"] = 1e6 * timed(
            lambda n=nothing, x=x: n(x).block_until_ready(), repeats
        )
    return found


def measure_dispatch(sizes, repeats) -> dict[str, float]:
    """Microseconds a layer: programs of 20 arguments that do next to nothing, queued, or with ids read in between."""
    import jax
    import jax.numpy as jnp

    weights = [jnp.ones((8,), jnp.float32) for _ in range(ARGUMENTS)]
    front = jax.jit(lambda h, *w: (h + w[0][0], h[:, :PACKED_WIDTH] * w[-1][0]))
    experts = jax.jit(lambda h, mix: h * mix)
    h = jnp.ones((1, WIDTH), jnp.float32)
    mix = np.ones((1, 1), np.float32)

    def queued() -> float:
        """-> when the last program was issued."""
        x = h
        for _ in range(LAYERS):
            x, _ = front(x, *weights)
        issued = time.perf_counter()
        x.block_until_ready()
        return issued

    def planned():
        x = h
        for _ in range(LAYERS):
            x, packed = front(x, *weights)
            np.asarray(packed)
            x = experts(x, mix)
        x.block_until_ready()

    issue = []
    whole = timed(queued, repeats)
    for _ in range(repeats):
        start = time.perf_counter()
        issue.append(queued() - start)
    return {
        "issuing one program (us)": 1e6 * median(issue) / LAYERS,
        "one program, finished (us)": 1e6 * whole / LAYERS,
        "front, ids read, experts (us)": 1e6 * timed(planned, repeats) / LAYERS,
    }


def measure_threads(sizes, repeats) -> dict[str, float]:
    """Rates of device_put on a second thread and of donated writes on the first.

    Each alone, and together; contents are checked.
    """
    import jax
    import jax.numpy as jnp

    from hybrimoe_jax.engine.lanes.slots import write_slot

    device, seconds = jax.devices()[0], 0.1 + 0.02 * repeats
    source = host_array(sizes[0], False)
    news = [(jnp.full((64, WIDTH), float(i)), jnp.full((WIDTH, 32), float(i))) for i in range(4)]
    slots = [tuple(jnp.zeros_like(part) for part in new) for new in news]
    errors: list[BaseException] = []

    def put():
        jax.device_put(source, device).block_until_ready()

    def write(turn: int):
        slots[turn % 4] = jax.block_until_ready(write_slot(slots[turn % 4], news[turn % 4]))

    def rate(stop: Callable[[], bool], run) -> float:
        count, start = 0, time.perf_counter()
        while not stop():
            run(count)
            count += 1
        return count / (time.perf_counter() - start)

    def for_seconds():
        end = time.perf_counter() + seconds
        return lambda: time.perf_counter() > end

    put()
    write(0)
    found = {"puts alone (1/s)": rate(for_seconds(), lambda _: put()), "writes alone (1/s)": rate(for_seconds(), write)}
    done, rates = threading.Event(), []

    def second():
        try:
            rates.append(rate(done.is_set, lambda _: put()))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=second)
    thread.start()
    found["writes together (1/s)"] = rate(for_seconds(), write)
    done.set()
    thread.join()
    if errors:
        raise errors[0]
    found["puts together (1/s)"] = rates[0]
    for i, slot in enumerate(slots):
        if not all(bool((part == float(i)).all()) for part in slot):
            raise RuntimeError(f"slot {i} does not hold what was written")
    return found
