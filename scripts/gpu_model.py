"""`python scripts/gpu_model.py`: DeepSeek-V2-Lite with random weights, int4 experts, under four systems, and a profile.

Then hybrimoe again, each time with one choice made otherwise: separate slots, XLA's form of an expert, plain memory.

Nothing is written to disk but results: weights are drawn in memory, on all cores. A table for people; `--json FILE` is
brought up to date after every system, so that a run that is stopped has told what it knew. With `--trace FILE` a few
decode steps under hybrimoe are profiled by jax, and the file is that profile, compressed.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from gpu_report import report

SYSTEMS = ("hybrimoe", "ktransformers", "cpu-only", "device-only")
OTHERWISE: dict[str, dict[str, Any]] = {
    "hybrimoe, separate slots": {"slots": "separate"},
    "hybrimoe, xla": {"device_kernel": "xla"},
    "hybrimoe, plain memory": {"host_memory": "plain"},
}
"""hybrimoe with one choice made otherwise; after the systems, as far as the time goes."""
FORMAT, RATIO = "int4-g64", 0.25
SMALL = dict(
    hidden_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    vocab_size=512,
    intermediate_size=512,
    moe_intermediate_size=128,
    n_routed_experts=8,
    num_experts_per_tok=2,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
    max_position_embeddings=1024,
)
"""What a dry run has other than the published configuration."""


def random_model(layers: int | None, small: bool) -> Any:
    """An `engine.load.Model` of random weights in host memory; `layers`: fewer than the published 27."""
    from hybrimoe_jax.bench.random_models import DEEPSEEK_V2_LITE
    from hybrimoe_jax.checkpoint.expert_store import ExpertStore
    from hybrimoe_jax.checkpoint.random import random_weights
    from hybrimoe_jax.engine.load import Model

    raw = {**DEEPSEEK_V2_LITE, **(SMALL if small else {}), **({"num_hidden_layers": layers} if layers else {})}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(raw))
        weights = random_weights(folder, FORMAT)
    config, routed = weights.config, [shard.experts for shard in weights.shards if shard.experts is not None]
    shape = (len(routed), config.num_experts, config.moe_width, config.hidden_size)
    layout = routed[0].layout  # pyright: ignore[reportAttributeAccessIssue]  # of PackedExperts
    store = ExpertStore(lambda layer, expert: routed[layer].packed(expert), shape, np.uint8, layout=layout)  # pyright: ignore[reportAttributeAccessIssue]
    tensors = {name: tensor for shard in weights.shards for name, tensor in shard.dense.items()}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        dense = dict(zip(tensors, pool.map(lambda tensor: tensor.read(), tensors.values())))
        list(pool.map(lambda place: store.get(*place), np.ndindex(shape[:2])))
    return Model(config, dense, store, None, (), None, "off", None)


def profile(engine: Any, prompt: list[int], trace: Path | None) -> dict[str, float]:
    """What jax's profiler saw of a few decode steps, a MoE layer: events by kind on each of the device's lines."""
    import jax

    steps, run = 8, engine.steps([prompt], max_new_tokens=16)
    for _ in range(4):
        next(run)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                next(run)
        run.close()
        (file,) = Path(folder).rglob("*.xplane.pb")
        if trace is not None:
            trace.write_bytes(gzip.compress(file.read_bytes(), 6))
        count, busy = collections.Counter(), collections.Counter()
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            if "GPU" not in plane.name:
                continue
            for line in plane.lines:
                if "Stream" not in line.name:
                    continue
                for event in line.events:
                    kind = next((k for k in ("MemcpyH2D", "MemcpyD2H", "MemcpyD2D") if k in event.name), "kernels")
                    count[kind] += 1
                    busy[kind] += event.duration_ns
    layers = steps * len(engine.config.moe_layers)
    found = {f"{kind} a layer": number / layers for kind, number in count.items()}
    return found | {f"{kind}, us a layer": ns / 1e3 / layers for kind, ns in busy.items()}


def measure(engine: Any, prompt: list[int], new: int) -> tuple[dict[str, Any], list[int]]:
    """-> figures of the second of two runs, which compiles nothing, and its tokens."""
    engine.generate([prompt], max_new_tokens=new)
    run = engine.generate([prompt], max_new_tokens=new)
    record = run.stats.summary()
    layers = len(engine.config.moe_layers) * new
    kept = ("ttft_s", "hit_rate", "cpu_experts", "device_experts", "demand_fetches", "compile_s", "peak_device_bytes")
    figures = {key: record[key] for key in kept} | {
        f"prefetch {k}": record["prefetch"][k] for k in ("issued", "useful")
    }
    figures |= {"tbt_ms": record["tbt_ms"] and record["tbt_ms"]["median"]}
    return figures | {f"{k} a layer (us)": 1e6 * v / layers for k, v in record["lanes"].items()}, run.token_ids[0]


def main() -> int:
    top = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    top.add_argument("--small", action="store_true", help="a tiny model (for a dry run)")
    top.add_argument("--layers", type=int, help="fewer layers than the published 27")
    top.add_argument("--json", type=Path, help="where the figures go")
    top.add_argument("--trace", type=Path, help="where jax's profile of a few steps goes")
    args = top.parse_args()
    from hybrimoe_jax.engine.config import EngineConfig
    from hybrimoe_jax.engine.device_memory import limit_allocator
    from hybrimoe_jax.engine.lanes import threads

    common: dict[str, Any] = {"cache_ratio": RATIO, "max_context": 1024, "prefill_chunk": 128}
    limit_allocator(EngineConfig())
    threads.split_threads(None, "overlapped")
    import jax

    began = time.perf_counter()
    model = random_model(args.layers, args.small)
    config = model.config
    about = {"layers": config.num_hidden_layers, "made in s": time.perf_counter() - began, "ratio": RATIO}
    about |= {"format": FORMAT, "experts MB": model.store.nbytes / 1e6, "device": jax.devices()[0].device_kind}
    print(f"{about}", flush=True)
    prompt = np.random.default_rng(1).integers(0, config.vocab_size, 128).tolist()
    facts: dict[str, Any] = {"model": about}
    costs = tokens = None

    runs: dict[str, dict[str, Any]] = {name: {"system": name} for name in SYSTEMS} | OTHERWISE
    for name, choices in runs.items():
        began = time.perf_counter()
        engine = model.engine(EngineConfig(**common, **choices, profile=costs))
        loaded = time.perf_counter() - began
        figures, new = measure(engine, prompt, 32)
        tokens = tokens or new
        facts[name] = {**figures, "same tokens": new == tokens, "loaded in s": loaded}
        print(name, {k: round(v, 3) if isinstance(v, float) else v for k, v in facts[name].items()}, flush=True)
        report(args.json, facts)
        if costs is None:
            costs = engine.costs
            facts["costs"] = costs.describe()
            facts["profile"] = profile(engine, prompt, args.trace)
            print("profile", {k: round(v, 2) for k, v in facts["profile"].items()}, flush=True)
            report(args.json, facts)
        engine.close()
        del engine
    print(json.dumps({"facts": facts}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
