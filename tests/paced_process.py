"""Engines on paced devices, for `test_paced_engine`: XLA's pool has two threads here, so it is a process of its own.

`python paced_process.py ASKED FOLDER` prints one JSON object. ASKED is JSON: null for `overlap`, or the arguments of
`counts`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from unittest import mock

os.environ.update(NPROC="2", JAX_PLATFORMS="cpu")

import jax
import jax.numpy as jnp
import tiny

from hybrimoe_jax.engine.lanes.host import HostExecutor
from hybrimoe_jax.engine.lanes.paced_link import PacedLink
from hybrimoe_jax.engine.lanes.pacing import sleep_until
from hybrimoe_jax.machine.costs import CostModel
from hybrimoe_jax.machine.profile import FOLDER

LANE_S = 50e-3
FAMILY = "qwen2_moe"
ONE = "one_layer"
tiny.CONFIGS[ONE] = {**tiny.CONFIGS[FAMILY], "num_hidden_layers": 1}


def equal_lanes() -> CostModel:
    """A host expert, a layer's shared experts and a transfer take as long; all else takes nothing."""
    costs = tiny.costs(tiny.weights(ONE)[0])
    nothing = dict.fromkeys(
        "cpu_first cpu_token device_expert device_token shared_token layer_base layer_token transfer_latency".split(),
        0.0,
    )
    bandwidth = costs.expert_bytes / LANE_S
    lanes = {"cpu_expert": LANE_S, "shared_base": LANE_S, "bandwidth": bandwidth, "bandwidth_cpu_busy": bandwidth}
    return CostModel(**{**costs.describe(), **nothing, **lanes})


def overlap(folder: Path) -> dict[str, float]:
    """Seconds of a layer whose lanes are busy for `LANE_S` each, in the best of some steps.

    As it is, and where one lane waits for another.

    Of the two experts that a token takes, neither resident, the CPU computes one and the other is fetched.
    """
    equal_lanes().save(folder / "lanes.json")
    engine = tiny.engine(
        ONE, profile=None, device=f"paced:{folder / 'lanes.json'}", prefetch="none", cache_ratio=0.0
    )  # fmt: skip
    prompt = tiny.prompts(engine.config, (4,))
    seen = {"as it is": _layer(engine, prompt)}
    submit, copy = HostExecutor.submit, PacedLink._copy

    def host_after_device(self, *args, **kwargs):
        jax.block_until_ready(tick(jnp.zeros(64)))  # programs run in the order in which they were dispatched
        return submit(self, *args, **kwargs)

    def link_after_host(self, transfer):
        sleep_until(self.clock.host.free)
        transfer.issued = self.clock.now()
        copy(self, transfer)

    def link_after_device(self, transfer):
        transfer.issued = max(transfer.issued + LANE_S, self.clock.now())
        copy(self, transfer)

    lanes = [
        ("host after device", HostExecutor, "submit", host_after_device),
        ("link after host", PacedLink, "_copy", link_after_host),
        ("link after device", PacedLink, "_copy", link_after_device),
    ]
    for what, owner, name, serialised in lanes:
        with mock.patch.object(owner, name, serialised):
            seen[what] = _layer(engine, prompt)
    engine.close()
    return seen


tick = jax.jit(lambda x: jax.lax.fori_loop(0, 100, lambda _, y: jnp.sin(y), x))


MACHINE, SLOWDOWN, SHAPE = "a6000-paper", 20, "deepseek-v2-lite"
COUNTS = ("hits", "misses", "cpu_experts", "device_experts", "demand_fetches")


def counts(systems: list[str], runs: int, copies_wait: bool, slots: str, folder: Path) -> dict[str, dict]:
    """By system the counts of the virtual clock and of each paced run, and whether all gave the same tokens."""
    machine = MACHINE
    if copies_wait:
        machine = str(folder / "waits.json")
        raw = json.loads((FOLDER / f"{MACHINE}.json").read_text())
        Path(machine).write_text(json.dumps({**raw, "copies_wait": True}))
    common, found = {"cost_shape": SHAPE, "cache_ratio": 0.25, "slots": slots}, {}
    for system in systems:
        options = [{"clock": "virtual", "profile": MACHINE}]
        options += [{"profile": None, "device": f"paced:{machine}:{SLOWDOWN}"}] * runs
        made = [_counted(system, {**common, **chosen}) for chosen in options]
        found[system] = {
            "virtual": made[0][0],
            "paced": [seen for seen, _ in made[1:]],
            "same_tokens": all(tokens == made[0][1] for _, tokens in made),
        }
    return found


def _counted(system: str, options: dict) -> tuple[dict[str, int], list]:
    engine = tiny.engine(FAMILY, system=system, **options)
    result = engine.generate(tiny.prompts(engine.config, (12,)), max_new_tokens=24)
    engine.close()
    record = result.stats.summary()
    return {name: record[name] for name in COUNTS} | {"prefetches": record["prefetch"]["issued"]}, result.token_ids


def _layer(engine, prompt) -> float:
    """Of decode steps."""
    engine.generate(prompt, max_new_tokens=2)
    stats = engine.generate(prompt, max_new_tokens=6).stats
    steps = [step for step in stats.steps if step.phase == "decode" and not step.compile_s]
    assert {(len(layer.cpu), len(layer.fetched)) for step in steps for layer in step.layers} == {(1, 1)}
    return min(step.seconds / len(step.layers) for step in steps)


def main() -> None:
    asked, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    print(json.dumps(overlap(folder) if asked is None else counts(**asked, folder=folder)))


if __name__ == "__main__":
    main()
