"""Text from the bundled model, and what the expert cache did for it on a machine with a GPU.

    python examples/generate_and_watch.py [NEW_TOKENS]

The text is made here. The counts and times are those of the named machine, computed by its profile (the virtual clock).
"""

import sys

import hybrimoe_jax
from hybrimoe_jax import EngineConfig

PROMPT = "To be, or not to be"


def main() -> None:
    new_tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    engine = hybrimoe_jax.load(options=EngineConfig(cache_ratio=0.25, clock="virtual", profile="a6000-paper"))

    print(PROMPT, end="")
    for chunk in hybrimoe_jax.stream_generate(
        engine, PROMPT, max_new_tokens=new_tokens, temperature=0.8, top_p=0.95, seed=1
    ):
        print(chunk.text, end="", flush=True)

    stats = engine.stats
    assert stats is not None
    print("\n\nMoE layer    hits  misses  by the CPU  by the device  fetched")
    for number in range(len(engine.config.moe_layers)):
        layers = [layer for step in stats.steps for layer in step.layers if layer.layer == number]
        cells = [sum(layer.hits for layer in layers), sum(layer.misses for layer in layers)]
        cells += [sum(len(getattr(layer, lane)) for layer in layers) for lane in ("cpu", "device", "fetched")]
        print("{:9}{:8}{:8}{:12}{:15}{:9}".format(number, *cells))
    print(f"hit rate {stats.hit_rate:.1%}; {stats.prefetch.useful} of {stats.prefetch.issued} prefetches were useful")
    engine.close()


if __name__ == "__main__":
    main()
