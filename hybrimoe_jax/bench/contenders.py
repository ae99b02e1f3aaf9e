"""Contenders of the benchmarks that compare whole runs.

Each lives in a process of its own and answers requests, one JSON object a line:

    {"run": "open", "name": ..., "options": {...}}  ->  {"load_s": ...}, what `name` then runs with
    {"run": "generate", "name": ..., "ids": [...], "new": m}  ->  {"ttft_s": ..., "decode_s": of m more tokens,
        "tbt_s": [of each], "token_ids": [...], ...}
    {"run": "prefill", "name": ..., "tokens": n}  ->  {"seconds": time to the first token}
    {"run": "decode", "name": ..., "tokens": n, "new": m}  ->  {"seconds": seconds a token, "token_ids": [...]}
    {"run": "close", "name": ...}  ->  {}

An answer {"error": message} ends it: what was asked for cannot be done.

`python -m hybrimoe_jax.bench.contenders KIND MODEL ...` starts one; the first line it prints says what it is.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from hybrimoe_jax.bench.peers import AccelerateContender, LlamaCppContender, TorchContender, TransformersContender
from hybrimoe_jax.bench.served import StepsContender, prompt
from hybrimoe_jax.cli import INTERRUPTED
from hybrimoe_jax.errors import UserError


class EngineContender(StepsContender):
    """Our engine under several systems, in one process that shares host weights and executables.

    Args: systems: opened at once, at `cache_ratio`; `open` takes an EngineConfig's options. device: of all of them.
    """

    def __init__(
        self, model: str, threads: int, systems: Sequence[str] = (), cache_ratio: float = 0.25, device: str = "auto"
    ):
        from hybrimoe_jax.engine.config import EngineConfig
        from hybrimoe_jax.engine.load import read_model

        self.usual = {"threads": threads, "device": device}
        self.model = read_model(model, EngineConfig(**self.usual))
        self.vocab = self.model.config.vocab_size
        self.engines: dict[str, Any] = {}
        for name in systems:
            self.open(name, {"system": name, "cache_ratio": cache_ratio, "max_context": 1024})
        self.about = self.sizes() if systems else {}

    def make(self, options: dict[str, Any]) -> Any:
        from hybrimoe_jax.engine.config import EngineConfig

        return self.model.engine(EngineConfig(**{**self.usual, **options}))

    def sizes(self) -> dict[str, Any]:
        """What a token takes, by whatever engine is open: bytes, and multiplications with additions."""
        config, store = self.model.config, self.model.store
        expert = 3 * config.hidden_size * config.moe_width
        held = next(iter(self.engines.values()))._parts.model
        layers = [array for layer in held.layers for array in layer.params.values()]
        read = sum(array.nbytes for array in (held.norm, held.head, *layers))
        routed = store.expert_bytes * config.num_experts_per_tok * len(config.moe_layers)
        weights = [array for array in layers if array.ndim > 1]
        return {
            "parameters": sum(a.size for a in self.model.dense.values())
            + expert * store.num_experts * store.num_layers,
            "bytes_per_token": routed + read,
            "moe_layers": len(config.moe_layers),
            "expert_bytes": store.expert_bytes,
            "expert_operations": 2 * expert,
            "dense_bytes": read,
            "dense_operations": 2 * sum(array.size for array in weights),
            "head_operations": 2 * held.head.size,
            "cache_bytes_per_token": held.cache_bytes(1, 2048) - held.cache_bytes(1, 2047),
        }

    def counts(self, prompts: list[list[int]]) -> dict[str, Any]:
        """How often prompts activate each expert, [MoE layer][expert]."""
        engine = next(iter(self.engines.values()))
        table = np.zeros((self.model.store.num_layers, self.model.store.num_experts), int)
        for ids in prompts:
            for step in engine.generate([ids], max_new_tokens=1).stats.steps:
                for layer in step.layers:
                    table[layer.layer, list(layer.loads)] += list(layer.loads.values())
        return {"counts": table.tolist()}

    def overhead(self, name: str, tokens: int, new: int) -> dict:
        """The engine's own time per MoE layer at decode.

        It is the step less what its kernels take when nothing else is timed.

        Kernel time of a layer: its front program, then the longer of the host's experts (as measured in the run) and
        the device's (shared and resident experts), each device program timed back to back so that dispatch is hidden.
        """
        engine = self.engines[name]
        run = engine.generate([prompt(tokens, self.vocab)], max_new_tokens=new + 1)
        decoded = [step for step in run.stats.steps if step.phase == "decode"]
        layers = [layer for step in decoded for layer in step.layers]
        steps = [step.seconds for step in decoded if not step.compile_s]
        parts = device_kernel_seconds(engine)
        kernels = [
            parts["front"] + max(layer.lanes.cpu, parts["shared"] + len(layer.device) * parts["expert"])
            for layer in layers
        ]
        count = self.about["moe_layers"]
        per_layer = (statistics.median(steps) - parts["head"]) / count - statistics.mean(kernels)
        return {"overhead_us_per_layer": 1e6 * per_layer, "kernel_us": {k: 1e6 * v for k, v in parts.items()}}


def device_kernel_seconds(engine, repeats: int = 30) -> dict[str, float]:
    """Seconds of the device programs of one decode step, each queued `repeats` times before waiting."""
    import jax
    import jax.numpy as jnp

    from hybrimoe_jax.engine import programs

    parts = engine._parts
    model, pool = parts.model, parts.pool
    x = jnp.zeros((1, engine.config.hidden_size), jnp.float32)
    layers = model.moe_layers
    caches = model.init_cache(1, 256)
    positions = jnp.full((1, 1), 128, jnp.int32)
    state = {"h": x[None], "i": 0}

    def queued(run) -> float:
        out, times = jax.block_until_ready(run()), []
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(repeats):
                out = run()
            jax.block_until_ready(out)
            times.append((time.perf_counter() - start) / repeats)
        return statistics.median(times)

    def front():
        i = state["i"] = (state["i"] + 1) % len(layers)
        layer = layers[i]
        routers = model.lookahead_routers(layer.moe_layer, parts.lookahead)
        state["h"], *_, caches[i], packed = layer.programs.front(
            layer.params, routers, state["h"], x, x, caches[i], positions, 256
        )
        return packed

    def shared():
        i = state["i"] = (state["i"] + 1) % len(layers)
        return layers[i].programs.shared(layers[i].params, x)

    slots = [(layer, expert) for layer in range(len(layers)) for expert in sorted(pool.residents(layer))]

    def expert():
        i = state["i"] = state["i"] + 1
        slot = pool.get(*slots[i % len(slots)])
        return programs.dense_rows(x, x, one, slot, kernel=model.device_kernel)

    one = jnp.ones((1, 1), jnp.float32)
    last = jnp.zeros(1, jnp.int32)
    return {
        "front": queued(front),
        "shared": queued(shared) if layers[0].programs.shared is not None else 0.0,
        "expert": queued(expert) if slots else 0.0,
        "head": queued(lambda: programs.last_logits(model.norm, model.head, x[None], x, x, last, eps=model.eps)),
    }


CONTENDERS = {
    "engine": EngineContender,
    "torch": TorchContender,
    "transformers": TransformersContender,
    "accelerate": AccelerateContender,
    "llama.cpp": LlamaCppContender,
}
"""By the name that a process is started with."""


def serve() -> None:
    kind, options = sys.argv[1], json.loads(sys.argv[2])
    contender = CONTENDERS[kind](**options)
    print(json.dumps({"names": contender.names(), **contender.about}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        kind, before = request.pop("run"), time.process_time()
        answer = getattr(contender, kind)(**request)
        if kind == "generate":
            answer["cpu_s"] = time.process_time() - before
            answer["process_peak_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    try:
        serve()
    except UserError as error:
        print(json.dumps({"error": str(error)}), flush=True)
    except (KeyboardInterrupt, BrokenPipeError):  # the benchmark was ended, and says so
        os._exit(INTERRUPTED)
