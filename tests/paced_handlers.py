"""A process of its own for `test_native_pace`: XLA's pool has two threads here. Prints one JSON object."""

from __future__ import annotations

import json
import os
import sys
import time

os.environ.update(NPROC=sys.argv[1], JAX_PLATFORMS="cpu")

import jax
import jax.numpy as jnp
import numpy as np

from hybrimoe_jax.engine.lanes.pacing import block_seconds
from hybrimoe_jax.host_kernels.native import pace

MS = 1e-3


def told(*seconds: float) -> np.ndarray:
    return pace.dispatched(np.array(seconds, np.float32))


def seconds(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@jax.jit
def program(x, p):
    return pace.end(jnp.sin(pace.begin(x, p)), p)


@jax.jit
def working(x, p):
    """Some tens of milliseconds of work between the two."""
    y = pace.begin(x, p)
    return pace.end(jax.lax.fori_loop(0, 60, lambda _, a: jnp.tanh(a @ jnp.full((200, 200), 0.01)), y), p)


@jax.jit
def block(x, p, loads):
    return pace.end(pace.begin(x, p) + 1, p, block_seconds(p, loads))


def main() -> None:
    x = jnp.ones((1, 32))

    def paced():
        return program(x, told(40 * MS))

    def dispatched_before():
        pace_of_it = told(40 * MS)
        time.sleep(30 * MS)
        return seconds(lambda: program(x, pace_of_it).block_until_ready())

    big, loads = jnp.ones((200, 200)), jnp.array([2, 0, 1, 0, 0])
    table = 5 * MS, 10 * MS, 30 * MS, 1.0
    for ready in (paced(), working(big, told(0)), block(x, told(*table), loads), program(x, None)):
        ready.block_until_ready()
    pace.overshoot(reset=True)
    start = time.perf_counter()
    result = paced()
    dispatched = time.perf_counter() - start
    result.block_until_ready()
    record = {"dispatch": dispatched, "one": time.perf_counter() - start, "same": bool((result == jnp.sin(x)).all())}
    record["rest"] = dispatched_before()
    record["five"] = seconds(lambda: jax.block_until_ready([paced() for _ in range(5)]))
    record["beside"] = seconds(lambda: (y := paced(), time.sleep(40 * MS), y.block_until_ready()))
    record["work"] = seconds(lambda: working(big, None).block_until_ready())  # compiles
    record["work"] = seconds(lambda: working(big, None).block_until_ready())
    record["worked"] = seconds(lambda: working(big, told(400 * MS)).block_until_ready())
    record["block"] = seconds(lambda: block(x, told(*table), loads).block_until_ready())
    record["overshoot"] = vars(pace.overshoot(reset=True))
    record["after_reset"] = pace.overshoot().count
    record["unpaced"] = "custom-call" not in jax.jit(program).lower(x, None).as_text().replace("_", "-")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
