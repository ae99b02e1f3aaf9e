"""Systems side by side: the same model, the same tokens, the same machine, other decisions.

    python examples/compare_systems.py [NEW_TOKENS]

The model runs here. The times are computed: they are those of the machine that the profile describes.
"""

import sys

import hybrimoe_jax
from hybrimoe_jax import EngineConfig

MACHINE = "a6000-paper"
SYSTEMS = ("hybrimoe", "ktransformers", "adapmoe", "llamacpp", "on-demand", "cpu-only")


def main() -> None:
    new_tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    tokens = set()
    print(f"on {MACHINE}, a quarter of the experts resident; times computed")
    print(
        f"{'system':14}{'hit rate':>9}{'by CPU':>8}{'by device':>11}{'fetched':>9}{'prefetched':>12}{'ms a token':>12}"
    )
    for system in SYSTEMS:
        engine = hybrimoe_jax.load(options=EngineConfig(system=system, clock="virtual", profile=MACHINE))
        result = engine.generate([engine.tokenizer.encode("Enter the King,")], max_new_tokens=new_tokens)
        engine.close()
        tokens.add(tuple(result.token_ids[0]))

        said = result.stats.summary()
        print(
            f"{system:14}{said['hit_rate']:9.1%}{said['cpu_experts']:8}{said['device_experts']:11}"
            f"{said['demand_fetches']:9}{said['prefetch']['issued']:12}{said['tbt_ms']['median']:12.2f}"
        )
    print("all systems gave the same tokens" if len(tokens) == 1 else "the systems gave different tokens: a bug")


if __name__ == "__main__":
    main()
