"""Calibrates a paced device, in a process of its own, and compares with what it was told to be. Args: file, slowdown.

Prints for each figure by how much it is off. Beside other work a thread is woken milliseconds late, so there are three
tries.
"""

import dataclasses
import json
import sys

import tiny

from hybrimoe_jax.engine import calibration
from hybrimoe_jax.engine.warmup import grid
from hybrimoe_jax.machine.costs import CostModel

FEW = dataclasses.replace(
    calibration.WHOLE,
    cpu=(*grid((1,), (1, 3)), (16, 1)),
    device=(*grid((1,), (0, 1, 2)), *grid((16,), (0, 2))),
    layer=(*grid((1, 16), (128,)), (1, 384)),
    repeats=(3, 3),
)


def figures(costs: CostModel) -> dict[str, float]:
    found = {f"{name} {load}": getattr(costs, name)(load) for name in ("cpu", "device", "shared") for load in (1, 16)}
    found |= {f"layer {at}": costs.layer(*at) for at in ((1, 128), (16, 128), (1, 384))}
    found |= {"first": costs.cpu(1, True)}
    return found | {f"transfer, CPU busy: {busy}": costs.transfer(busy) for busy in (False, True)}


def measured(engine, wanted: dict[str, float], tries: int = 3):
    """-> what `calibrate` finds, and by what share each figure is off; again where a busy machine disturbed it."""
    found = calibration.calibrate(engine, plan=FEW)
    off = {name: value / wanted[name] - 1 for name, value in figures(found.costs).items()}
    return (found, off) if tries == 1 or max(map(abs, off.values())) < 0.1 else measured(engine, wanted, tries - 1)


def main() -> None:
    file, slowdown = sys.argv[1:]
    engine = tiny.engine("qwen2_moe", profile=None, cache_ratio=0.5, device=f"paced:{file}:{slowdown}")
    calibration.ROUND_S = 0.0
    wanted = figures(CostModel.load(file).slowed(float(slowdown)))
    found, off = measured(engine, wanted)
    engine.close()
    print(json.dumps({"off": off, "device": found.origin.machine.device, "source": found.costs.source}))


if __name__ == "__main__":
    main()
