"""The Flax MoE module with slots and host experts, jitted alone, against the same block with every expert computed
densely.

Callbacks want jax without asynchronous dispatch on the CPU backend, which is decided once per process: this file's
cases run in one process of their own, as a program that prints one JSON object for each.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from grids import few

FAMILIES = ("qwen2_moe", "mixtral", "deepseek_v2")
ROWS = (1, 16)
SPLITS = {"all on the host": (), "all in slots": tuple(range(8)), "half and half": (1, 3, 4, 6), "one slot": (5,)}
CASES = [(family, rows, split) for family in FAMILIES for rows in ROWS for split in SPLITS]
FEW = [
    ("qwen2_moe", 16, "half and half"),
    ("qwen2_moe", 1, "all on the host"),
    ("mixtral", 1, "half and half"),
    ("mixtral", 16, "all in slots"),
    ("deepseek_v2", 16, "one slot"),
]


@functools.cache
def build(family: str):
    """-> the block of the first MoE layer with tiny weights, its experts [(gate_up [E, 2F, D], down [E, D, F])], D."""
    import tiny

    from hybrimoe_jax.models.parameters import merge, split
    from hybrimoe_jax.models.registry import build_model

    config, dense, experts = tiny.weights(family)
    graphdef, abstract = split(build_model(config))
    model = merge(graphdef, {name: dense[name] for name in abstract})
    return next(layer.ffn for layer in model.model.layers if layer.is_moe), experts[0], config.hidden_size


class Host:
    """Host experts in plain numpy, with a count of calls."""

    def __init__(self, gate_up, down):
        self.gate_up, self.down, self.calls = gate_up, down, 0

    def __call__(self, layer, x, ids, weights):
        import numpy as np

        self.calls += 1
        assert layer == 7, "the layer's number reaches the host"
        out = np.zeros_like(x)
        for row, column in zip(*np.nonzero(ids >= 0), strict=True):
            gate, up = np.split(self.gate_up[ids[row, column]] @ x[row], 2)
            out[row] += weights[row, column] * (self.down[ids[row, column]] @ (gate / (1 + np.exp(-gate)) * up))
        return out


def measure(family: str, rows: int, split: str) -> dict:
    import jax
    import numpy as np

    from hybrimoe_jax.models.hybrid import HybridMoE, register_host
    from hybrimoe_jax.models.moe import DenseExperts
    from hybrimoe_jax.models.parameters import merge
    from hybrimoe_jax.models.parameters import split as split_module

    block, (gate_up, down), width = build(family)
    x = np.random.default_rng(rows).standard_normal((rows, width), np.float32)
    graphdef, params = split_module(HybridMoE(block))
    routing = jax.tree.map(np.asarray, block.route(x))
    want = np.asarray(block(0, x, DenseExperts([(gate_up, down)])))

    held = SPLITS[split]
    slot_weights = np.zeros((len(held), rows), np.float32)
    for i, expert in enumerate(held):
        chosen, place = np.nonzero(routing.ids == expert)
        slot_weights[i, chosen] = routing.weights[chosen, place]
    ids = np.where(np.isin(routing.ids, held), -1, routing.ids).astype(np.int32)
    host = Host(gate_up, down)
    operands = (np.int32(register_host(host)), np.int32(7), ids, routing.weights) if (ids >= 0).any() else None
    slots = tuple((gate_up[expert], down[expert]) for expert in held)
    jitted = jax.jit(lambda params, *args: merge(graphdef, params)(*args))
    answers = [np.asarray(jitted(params, None, x, slot_weights, slots, operands)) for _ in range(3)]
    partial = jitted(params, None, x, slot_weights, slots, None)
    continued = np.asarray(jitted(params, partial, x, slot_weights[:0], (), operands))
    scale = np.abs(want).max()
    return {
        "errors": [float(np.abs(answer - want).max() / scale) for answer in [*answers, continued]],
        "repeats": all(np.array_equal(answers[0], answer) for answer in answers),
        "host": operands is not None,
        "calls": host.calls,
    }


@pytest.fixture(scope="module")
def results(request):
    """One process for the cases that are asked for."""
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    cases = [tuple(item.callspec.params[name] for name in ("family", "rows", "split")) for item in items]
    folder = str(Path(__file__).parent)
    path = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path},
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(cases), done.stderr[-2000:]
    return dict(zip(cases, map(json.loads, lines), strict=True))


@pytest.mark.parametrize(("family", "rows", "split"), few(FEW, CASES))
def test_slots_and_host_together_give_the_dense_block(family, rows, split, results):
    """`continued` among the errors: slots first, the host's part added by a second call that must not add the
    shared experts again."""
    result = results[family, rows, split]
    assert max(result["errors"]) < 2e-6
    assert result["repeats"], "repeated calls of one executable differ"
    assert (result["calls"] > 0) == result["host"]


def test_a_host_is_held_weakly_and_handles_are_not_shared():
    from hybrimoe_jax.models import hybrid

    class Quiet:
        pass

    first, second = Quiet(), Quiet()
    handles = hybrid.register_host(first), hybrid.register_host(second)
    assert hybrid._HOSTS[handles[0]] is first and hybrid._HOSTS[handles[1]] is second
    del first
    gc.collect()
    assert handles[0] not in hybrid._HOSTS and hybrid._HOSTS[handles[1]] is second


if __name__ == "__main__":
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    for case in json.load(sys.stdin):
        print(json.dumps(measure(*case)), flush=True)
