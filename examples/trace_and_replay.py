"""One trace, many cache policies: routing is recorded once, then every policy is replayed on it.

    python examples/trace_and_replay.py [NEW_TOKENS]

A replay needs no model and no jax. The last line is Belady's rule, which knows the future: no policy has more hits.
"""

import sys
import tempfile
from pathlib import Path

import hybrimoe_jax
from hybrimoe_jax import EngineConfig
from hybrimoe_jax.engine.recording import EngineTrace
from hybrimoe_jax.simulate.cases import Case
from hybrimoe_jax.simulate.grid import run_case

POLICIES = ("random", "lru", "lfu", "mrs", "echo")


def main() -> None:
    new_tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    engine = hybrimoe_jax.load(options=EngineConfig(profile="a6000-paper"))  # nothing to measure at the start
    recorder = EngineTrace(engine)
    engine.record(trace=recorder)
    engine.generate([engine.tokenizer.encode("Enter the King,")], max_new_tokens=new_tokens, temperature=0.9)
    engine.close()

    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "run.npz")
        recorder.save(path)
        print(f"{'cache policy':14}{'hit rate':>9}{'fetched':>9}")
        for policy in POLICIES:
            show(policy, Case(path, "a6000-paper", "on-demand", 0.25, start="cold", parts=(("cache", policy),)))
        show("(the most)", Case(path, "a6000-paper", "belady", 0.25, start="cold"))


def show(name: str, case: Case) -> None:
    said = run_case(case)
    print(f"{name:14}{said['hit_rate']['mean']:9.1%}{said['demand_fetches']:9}")


if __name__ == "__main__":
    main()
