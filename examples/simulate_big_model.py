"""A model that does not fit here: Qwen2-57B-A14B on the paper's machine, simulated.

    python examples/simulate_big_model.py [TOKENS [TRACE]]

Only the model's sizes and a routing trace are needed. Without a trace the routing is made up, with stated statistics.
"""

import sys

from hybrimoe_jax.simulate.cases import cases_of
from hybrimoe_jax.simulate.grid import run_cases
from hybrimoe_jax.simulate.records import table


def main() -> None:
    tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    trace = sys.argv[2] if len(sys.argv) > 2 else "synthetic:qwen2-57b-a14b"
    cases = cases_of(
        [trace],
        "a6000-paper",
        ["hybrimoe", "ktransformers", "adapmoe", "llamacpp"],
        [0.25, 0.5],
        fmt="int4-g64",
        starts=["warm"],
        steps=tokens // 2,  # of each half of the trace's sequences
    )
    print(table(list(run_cases(cases))))


if __name__ == "__main__":
    main()
