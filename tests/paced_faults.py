"""What fails once on a paced device, for `test_paced_engine`: XLA's pool has two threads here.

`python paced_faults.py FOLDER` prints a JSON object for each fault: what the broken call raised, and whether the next
two answers were the dense model's.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.update(NPROC="2", JAX_PLATFORMS="cpu")

import pytest
import tiny
from test_faults import answer, fail_once

from hybrimoe_jax.decide.planner import Planner
from hybrimoe_jax.decide.residency.residency import Residency
from hybrimoe_jax.engine.lanes import host
from hybrimoe_jax.engine.lanes.transfer import Link

PLACES = {
    "an expert is copied": ("adapmoe", Link, "_copy", 5),
    "a layer is planned": ("adapmoe", Planner, "plan", 8),
    "a prefetch gets a slot": ("adapmoe", Residency, "admit_landed", 1),
    "the host computes": ("ktransformers", host, "run_experts", 6),
}


def main(folder: Path) -> None:
    tiny.costs(tiny.weights("qwen2_moe")[0]).save(folder / "m.json")
    dense = tiny.engine(executor="dense")
    wanted = answer(dense)
    dense.close()
    for place, (system, owner, name, call) in PLACES.items():
        paced = f"paced:{folder / 'm.json'}:2"
        engine = tiny.engine(system=system, cache_ratio=0.5, debug=True, profile=None, device=paced)
        for error in (RuntimeError, MemoryError, KeyboardInterrupt):
            raised = None
            with pytest.MonkeyPatch.context() as patch:
                fail_once(patch, owner, name, call, error)
                for _ in range(50):
                    try:
                        answer(engine)
                    except BaseException as seen:
                        raised = f"{type(seen).__name__}: {seen}"
                        break
            exact = [answer(engine) == wanted for _ in range(2)]
            print(json.dumps({"place": place, "error": error.__name__, "raised": raised, "exact": exact}), flush=True)
        engine.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
