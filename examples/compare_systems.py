"""Systems side by side: the same model, the same tokens, the same machine, other decisions.

    python examples/compare_systems.py [NEW_TOKENS]

The bundled model runs here and its routing is real. Times are computed: those of the profile's machine, with layers and
experts as large as the named model's.
"""

import sys

from hybrimoe_jax import EngineConfig
from hybrimoe_jax.engine.load import read_model

MACHINE, SHAPE = "a6000-paper", "qwen2-57b-a14b"
SYSTEMS = ("hybrimoe", "ktransformers", "adapmoe", "llamacpp", "on-demand", "cpu-only")


def main() -> None:
    new_tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    tokens, model = set(), read_model()  # the bundled model; its weights are read once
    print(f"experts of {SHAPE} on {MACHINE}, a quarter of them resident; times computed")
    row = "{:14}{:>9}{:>8}{:>11}{:>9}{:>12}{:>12}"
    print(row.format("system", "hit rate", "by CPU", "by device", "fetched", "prefetched", "ms a token"))
    for system in SYSTEMS:
        options = EngineConfig(system=system, clock="virtual", profile=MACHINE, cost_shape=SHAPE)
        engine = model.engine(options)
        result = engine.generate([engine.tokenizer.encode("Enter the King,")], max_new_tokens=new_tokens)
        engine.close()
        tokens.add(tuple(result.token_ids[0]))

        said = result.stats.summary()
        counts = [said[name] for name in ("cpu_experts", "device_experts", "demand_fetches")]
        cells = [f"{said['hit_rate']:.1%}", *counts, said["prefetch"]["issued"], f"{said['tbt_ms']['median']:.2f}"]
        print(row.format(system, *cells))
    print("all systems gave the same tokens" if len(tokens) == 1 else "the systems gave different tokens: a bug")


if __name__ == "__main__":
    main()
