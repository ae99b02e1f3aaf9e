"""No system takes less time than the bound, whatever the machine; and the bound is not empty."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from grids import examples
from hypothesis import given
from hypothesis import strategies as st

from hybrimoe_jax.decide import SYSTEMS, Planner
from hybrimoe_jax.decide.prefetch.prediction import RouterOutlook
from hybrimoe_jax.machine.costs import CostModel
from hybrimoe_jax.machine.virtual import VirtualMachine
from hybrimoe_jax.simulate.bound import CLAIRVOYANT, _most_kept, clairvoyant_policies, least_seconds
from hybrimoe_jax.simulate.replay import replay
from hybrimoe_jax.simulate.workload import Asked, Step

LAYERS, EXPERTS, TOP_K = 2, 6, 2
seconds = st.floats(0.01, 2.0)
machines = st.builds(
    CostModel, cpu_expert=seconds, cpu_token=seconds, cpu_first=seconds, device_expert=seconds, device_token=seconds,
    shared_base=seconds, shared_token=st.just(0.0), layer_base=seconds, layer_token=seconds, transfer_latency=seconds,
    bandwidth=st.just(1.0),
    bandwidth_cpu_busy=st.floats(0.2, 1.0), expert_bytes=st.just(1), source=st.just("a test"),
)  # fmt: skip
chosen = st.lists(st.integers(0, EXPERTS - 1), min_size=TOP_K, max_size=TOP_K, unique=True)


@st.composite
def workloads(draw):
    """Steps of one to three tokens, some of them chunks of prompts."""
    steps = []
    for context in range(draw(st.integers(1, 10))):
        tokens = draw(st.sampled_from([1, 1, 1, 3]))
        layers = []
        for layer in range(LAYERS):
            rows = draw(st.lists(chosen, min_size=tokens, max_size=tokens))
            loads: dict[int, int] = {}
            for expert in itertools.chain(*rows):
                loads[expert] = loads.get(expert, 0) + 1
            layers.append(Asked(layer, loads, None, RouterOutlook(np.array(rows))))
        phase = "decode" if tokens == 1 else draw(st.sampled_from(["decode", "prefill"]))
        steps.append(Step(phase, tokens, context, 0, layers))
    return steps


def taken(planner, costs, steps):
    return replay(planner, VirtualMachine(costs), steps).seconds


@examples(50)
@given(steps=workloads(), costs=machines, ratio=st.sampled_from([0.0, 0.34, 0.5, 1.0]), cold=st.booleans())
def test_no_system_is_below_the_bound(steps, costs, ratio, cold):
    pooled = [system.override(scope="pooled") for name, system in SYSTEMS.items() if name in ("on-demand", "hybrimoe")]
    streamed = [SYSTEMS["hybrimoe"].override(stream_prefill=True)]
    for system in (*SYSTEMS.values(), *pooled, *streamed):
        slots = system.slots_per_layer(ratio, LAYERS, EXPERTS)
        planner = Planner(system, LAYERS, EXPERTS, TOP_K, slots, costs, cold=cold)
        start_cold = cold and not planner.policies[0].fixed
        bound = least_seconds(steps, slots, costs, cold=start_cold, pooled=system.scope == "pooled")
        assert taken(planner, costs, steps) >= bound * (1 - 1e-9), system
    slots = [round(ratio * EXPERTS)] * LAYERS
    known = Planner(
        CLAIRVOYANT,
        LAYERS,
        EXPERTS,
        TOP_K,
        slots,
        costs,
        policies=clairvoyant_policies(steps, EXPERTS, slots, TOP_K),
        cold=cold,
    )
    assert taken(known, costs, steps) >= least_seconds(steps, slots, costs, cold=cold) * (1 - 1e-9)


@examples(60)
@given(
    stays=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 5)).filter(lambda s: s[1] < s[0]), max_size=8),
    room=st.integers(0, 3),
)
def test_as_many_stays_are_kept_as_fit(stays, room):
    def fits(some):
        return all(sum(begin <= t < end for end, begin in some) <= room for t in range(6))

    most = max(n for n in range(len(stays) + 1) if any(fits(c) for c in itertools.combinations(stays, n)))
    assert _most_kept(stays, room) == most


def decode(rows):
    return [
        Step(
            "decode",
            1,
            i,
            0,
            [Asked(layer, dict.fromkeys(row, 1), None, RouterOutlook(np.array([row]))) for layer in range(LAYERS)],
        )
        for i, row in enumerate(rows)
    ]


@pytest.mark.parametrize("cpu", [50.0, 0.001])
def test_it_is_tight_where_nothing_needs_deciding(cpu):
    """All resident and a slow CPU, or no slots and a slow link: one lane does everything, and that is the bound."""
    costs = CostModel(
        cpu_expert=cpu, cpu_token=0.0, cpu_first=0.0, device_expert=0.2, device_token=0.0, shared_base=0.1,
        shared_token=0.0, layer_base=0.3, layer_token=0.0, transfer_latency=100.0,
        bandwidth=1.0, bandwidth_cpu_busy=1.0, expert_bytes=1, source="a test",
    )  # fmt: skip
    steps = decode([[0, 1], [2, 3], [0, 1], [4, 5]])
    system, slots = ("device-only", EXPERTS) if cpu > 1 else ("cpu-only", 0)
    planner = Planner(system, LAYERS, EXPERTS, TOP_K, slots, costs)
    assert taken(planner, costs, steps) == pytest.approx(least_seconds(steps, [slots] * LAYERS, costs))


def test_the_clairvoyant_is_faster_than_the_systems():
    costs = CostModel(
        cpu_expert=1.0, cpu_token=0.0, cpu_first=0.0, device_expert=0.1, device_token=0.0, shared_base=0.1,
        shared_token=0.0, layer_base=0.5, layer_token=0.0, transfer_latency=0.0,
        bandwidth=2.0, bandwidth_cpu_busy=2.0, expert_bytes=1, source="a test",
    )  # fmt: skip
    steps = decode([[i % 3, 3 + i % 2] for i in range(40)])
    bound = least_seconds(steps, [3, 3], costs)
    planner = Planner(
        CLAIRVOYANT,
        LAYERS,
        EXPERTS,
        TOP_K,
        3,
        costs,
        policies=clairvoyant_policies(steps, EXPERTS, [3] * LAYERS, TOP_K),
    )
    known = taken(planner, costs, steps)
    others = [
        taken(Planner(name, LAYERS, EXPERTS, TOP_K, 3, costs), costs, steps) for name in ("hybrimoe", "on-demand")
    ]
    assert bound <= known < min(others)
