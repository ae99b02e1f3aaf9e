"""A cache policy of one's own: live on the model, then replayed from the run's trace without the model.

    python examples/own_policy.py [NEW_TOKENS]

On the command line the same policy is `--cache own_policy:Fading`, started from this folder.
"""

import sys

import hybrimoe_jax
from hybrimoe_jax import EngineConfig
from hybrimoe_jax.decide import CachePolicy
from hybrimoe_jax.engine.recording import EngineTrace
from hybrimoe_jax.simulate.recorded import replay_run

MACHINE, SHAPE = "a6000-paper", "qwen2-57b-a14b"


class Fading(CachePolicy):
    """Counts uses and lets the counts fade. The resident expert with the least heat makes room."""

    def update(self, scores, loads):
        """Called once per layer and step. `loads`: tokens of each chosen expert. `scores`: the router's, of all."""
        for expert in range(self.num_experts):
            self.heat[expert] = 0.95 * self.heat[expert] + loads.get(expert, 0)


def main() -> None:
    new_tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    print(f"{'policy':18}{'':8}{'hits':>6}{'misses':>8}{'fetched':>9}{'prefetched':>12}{'seconds':>10}")
    for policy in ("mrs", "lru", f"{__name__}:Fading"):
        options = EngineConfig(cache=policy, clock="virtual", profile=MACHINE, cost_shape=SHAPE)
        engine = hybrimoe_jax.load(options=options)
        recorder = EngineTrace(engine)
        engine.record(trace=recorder)
        live = engine.generate([engine.tokenizer.encode("My lord,")], max_new_tokens=new_tokens).stats
        engine.close()
        replayed = replay_run(recorder.recorder.trace())[1]

        counts = [live.summary()[name] for name in ("hits", "misses", "demand_fetches")]
        seconds = sum(step.seconds - step.compile_s for step in live.steps)
        row = "{:18}{:8}{:6}{:8}{:9}{:12}{:10.5f}"
        print(row.format(policy, "live", *counts, live.prefetch.issued, seconds))
        c = replayed.counters
        print(row.format("", "replay", c.hits, c.misses, c.fetched, c.prefetch_issued, replayed.seconds))


if __name__ == "__main__":
    main()
