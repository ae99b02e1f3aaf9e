"""One process that `bench start` times: it starts as `generate` does and prints the seconds of its parts.

`python -m hybrimoe_jax.bench.start_process BEGUN MODEL CACHE`; BEGUN is when it was started, by `time.time`.
"""

from __future__ import annotations

import json
import sys
import time

from hybrimoe_jax.cli import run

NEW = 8
PROMPT = list(range(1, 9))
"""Token ids that every model has."""


def main(begun: float, model: str, cache: str) -> None:
    import hybrimoe_jax.checkpoint.reader
    import hybrimoe_jax.engine.engine  # noqa: F401  # which `read_model` and `Model.engine` import
    from hybrimoe_jax.engine.config import EngineConfig
    from hybrimoe_jax.engine.lanes.clock import compile_clock
    from hybrimoe_jax.engine.load import read_model

    times = {"importing": time.time() - begun}
    options, compiled, start = EngineConfig(start_cache=cache), compile_clock().seconds, time.perf_counter()
    read = read_model(model, options)
    times["reading"] = time.perf_counter() - start
    start = time.perf_counter()
    engine = read.engine(options)
    times["compiling"], times["measuring"] = compile_clock().seconds - compiled, engine.measuring_s
    times["building"] = max(0.0, time.perf_counter() - start - times["compiling"] - times["measuring"])
    start, seen = time.perf_counter(), []
    for _ in engine.steps([PROMPT], max_new_tokens=NEW):
        seen.append(time.perf_counter() - start)
    steps = engine.stats.steps if engine.stats else []
    first, *rest = [step.compile_s for step in steps]
    times["first token"] = max(0.0, seen[0] - first)
    times["text"] = max(0.0, seen[-1] - seen[0] - sum(rest))
    times["compiling"] += first + sum(rest)
    print(json.dumps(times))


if __name__ == "__main__":
    run(lambda: main(float(sys.argv[1]), *sys.argv[2:]))
