"""`python scripts/gpu_memory.py`: does the device hold what a vram_budget says, and no more?

Random DeepSeek-V2-Lite of few layers under a budget: the allocator's limit and its peak against the budget, and what
was stated against what was in use. Then memory is taken away while the engine runs: it must give up slots once and give
the same tokens. With `--json FILE` for `gpu_checks`.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

import gpu_model
import numpy as np
from gpu_report import report

GIB = 2**30


def main() -> int:
    top = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    top.add_argument("--small", action="store_true", help="a tiny model (for a dry run)")
    top.add_argument("--json", type=Path, help="where the figures go")
    args = top.parse_args()
    from hybrimoe_jax.engine.config import EngineConfig
    from hybrimoe_jax.engine.device_memory import limit_allocator
    from hybrimoe_jax.engine.lanes import threads

    budget = GIB // 16 if args.small else 3 * GIB
    common: dict[str, Any] = {"max_context": 1024, "prefill_chunk": 128 if args.small else 512}
    options = EngineConfig(vram_budget=budget, **common)
    limit_allocator(options)
    threads.split_threads(None, "overlapped")
    import jax

    facts: dict[str, Any] = {}
    device = jax.devices()[0]
    model = gpu_model.random_model(None if args.small else 6, args.small)
    prompt = np.random.default_rng(1).integers(0, model.config.vocab_size, 120).tolist()
    engine = model.engine(options)
    tokens = engine.generate([prompt], max_new_tokens=24).token_ids
    held, stats = engine._parts.footprint, device.memory_stats() or {}
    facts["budget"] = {
        "budget": budget,
        "stated": held.total,
        "slots": sum(engine._parts.slots),
        "workspace": held.workspace,
    }
    facts["budget"] |= {key: stats[key] for key in ("bytes_limit", "peak_bytes_in_use", "bytes_in_use") if key in stats}
    print(facts["budget"], flush=True)
    facts["out of memory"] = {"tokens are the same": True, "slots given up": 0, "said": ""}
    if stats:
        slots, hog = sum(engine._parts.slots), []
        for size in (256 << 20, 16 << 20, 1 << 20):  # what is left of the budget, in ever smaller pieces
            try:
                while True:
                    hog.append(jax.block_until_ready(jax.device_put(np.zeros(size, np.uint8), device)))
            except jax.errors.JaxRuntimeError:
                pass
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            again = engine.generate([prompt], max_new_tokens=24).token_ids
        facts["out of memory"] = {
            "tokens are the same": again == tokens,
            "slots given up": slots - sum(engine._parts.slots),
            "said": " ".join(str(warning.message) for warning in said),
        }
    print(facts["out of memory"], flush=True)
    engine.close()
    report(args.json, facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
