"""The virtual machine: against the planner's own prediction, and against a replay written apart."""

import dataclasses
import itertools
import random

import pytest
from grids import examples
from hypothesis import given
from hypothesis import strategies as st
from planner_cases import planner_of, prefetch

from hybrimoe_jax.decide import SCHEDULERS, SYSTEMS, Planner, predict
from hybrimoe_jax.machine.costs import CostModel
from hybrimoe_jax.machine.link import LinkLane
from hybrimoe_jax.machine.virtual import VirtualMachine
from hybrimoe_jax.trace.timeline import Timeline

LAYERS, EXPERTS, TOP_K = 3, 8, 2

COSTS = CostModel(
    cpu_expert=2.0, cpu_token=0.5, cpu_first=0.5, device_expert=0.5, device_token=0.1, shared_base=0.5,
    shared_token=0.0, layer_base=1.0, layer_token=0.25, transfer_latency=0.25,
    bandwidth=0.5, bandwidth_cpu_busy=0.3, expert_bytes=1,
    source="a test",
)  # fmt: skip


class Naive:
    """The machine again, told another way: three lanes with work left, and time that jumps to whatever ends next."""

    def __init__(self, costs):
        self.costs, self.now, self.link, self.here = costs, 0.0, [], []

    def jump(self, lanes):
        """Moves time to the next end of any lane's work (name -> seconds left) or of the transfer under way."""
        rate = 1 / self.costs.transfer(lanes.get("cpu", 0) > 0)
        ends = [left for left in lanes.values() if left > 0]
        if self.link:
            ends.append(self.link[0][1] / rate)
        step = min(ends)
        self.now += step
        for name, left in lanes.items():
            lanes[name] = 0.0 if left - step < 1e-12 else left - step
        if self.link:
            self.link[0][1] -= step * rate
            if self.link[0][1] < 1e-12:
                self.here.append(self.link.pop(0)[0])

    def wait(self, seconds):
        lanes = {"device": seconds}
        while lanes["device"]:
            self.jump(lanes)

    def landed(self):
        ready, self.here = self.here, []
        return ready

    def run(self, plan, loads, tokens, wanted):
        self.link += [[(plan.layer, f.expert), 1.0] for f in plan.fetch] + [[key, 1.0] for key in wanted]
        absent = {(plan.layer, f.expert) for f in (*plan.fetch, *plan.awaited)}
        lanes = {
            "cpu": sum(self.costs.cpu(loads[e], i == 0) for i, e in enumerate(plan.cpu)),
            "device": self.costs.shared(tokens),
        }
        queue = list(plan.schedule.device)
        while any(lanes.values()) or queue:
            key = (plan.layer, queue[0]) if queue else None
            if not lanes["device"] and queue and (key not in absent or key in self.here):
                lanes["device"] = self.costs.device(loads[queue.pop(0)])
            else:
                self.jump(lanes)
        self.here = [key for key in self.here if key not in absent]


@pytest.mark.parametrize("system", ["hybrimoe", "adapmoe", "on-demand", "ktransformers"])
@pytest.mark.parametrize("seed", range(6))
def test_the_same_events_as_a_machine_that_counts_every_moment(system, seed):
    """Two planners see the same routing, each under its own machine's clock: same plans, same landings, same times."""
    generator = random.Random(seed)
    slots = generator.randint(0, 4)
    pair = [
        planner_of(system, LAYERS, EXPERTS, TOP_K, slots, COSTS, scheduler=s)
        for s in [generator.choice([None, "paper"])] * 2
    ]
    machine, naive = VirtualMachine(COSTS), Naive(COSTS)
    for _ in range(12):
        for layer in range(LAYERS):
            tokens = generator.choice([1, 1, 3])
            loads, scores = predict([[generator.random() for _ in range(EXPERTS)] for _ in range(tokens)], TOP_K)
            ahead = [predict([[generator.random() for _ in range(EXPERTS)]], TOP_K) for _ in range(2)]
            machine.front(layer, tokens, 0, False)
            naive.wait(COSTS.layer(tokens))
            told = machine.landed(), naive.landed()
            assert sorted(told[0]) == sorted(told[1])
            for planner in pair:
                for key in told[0]:
                    planner.landed(*key)
            plans = [planner.plan(layer, loads, scores, tokens, machine.now) for planner in pair]
            assert plans[0] == plans[1]
            wanted = [prefetch(planner, layer, ahead) for planner in pair]
            machine.run(plans[0], loads, tokens)
            naive.run(plans[1], loads, tokens, [(p.layer, p.expert) for p in wanted[0]])
            for p in wanted[0]:
                machine.prefetch(p.layer, p.expert)
            assert machine.now == pytest.approx(naive.now, rel=1e-9)
        for planner in pair:
            planner.finish_step()
    moved = pair[0].counters
    assert system == "ktransformers" or slots == 0 or moved.fetched + moved.prefetch_issued > 0


@st.composite
def problems(draw):
    times = st.floats(0.01, 4.0)
    fast = draw(st.floats(0.2, 20))
    costs = CostModel(
        *(draw(times) for _ in range(9)),
        transfer_latency=draw(times),
        bandwidth=fast,
        bandwidth_cpu_busy=fast * draw(st.floats(0.2, 1)),
        expert_bytes=1,
    )
    loads = draw(st.dictionaries(st.integers(0, EXPERTS - 1), st.integers(1, 9), min_size=1))
    return costs, loads, draw(st.integers(0, EXPERTS)), draw(st.sampled_from(sorted(SCHEDULERS)))


@examples(150)
@given(problems())
def test_with_nothing_in_flight_a_layer_takes_what_was_planned(problem):
    costs, loads, slots, rule = problem
    planner = planner_of("hybrimoe", 1, EXPERTS, TOP_K, slots, costs, scheduler=rule)
    machine = VirtualMachine(costs)
    plan = planner.plan(0, loads, None, 9)
    machine.run(plan, loads, 9)
    assert machine.now == pytest.approx(plan.makespan, rel=1e-9)
    assert machine.device <= machine.now + 1e-9 and machine.cpu <= machine.now + 1e-9
    assert machine.link == pytest.approx(plan.schedule.link_seconds, rel=1e-9) or not plan.fetch


@pytest.mark.parametrize("system", SYSTEMS)
def test_lanes_do_one_thing_at_a_time_and_their_events_add_up(system):
    generator, timeline = random.Random(3), Timeline()
    planner = Planner(system, LAYERS, EXPERTS, TOP_K, 0 if system == "cpu-only" else 3, COSTS)
    machine = VirtualMachine(COSTS, timeline)
    for _ in range(10):
        for layer in range(LAYERS):
            loads, scores = predict([generator.random() for _ in range(EXPERTS)], TOP_K)
            machine.front(layer, 1, 0, False)
            for key in machine.landed():
                planner.landed(*key)
            machine.run(planner.plan(layer, loads, scores, 1, machine.now), loads, 1)
            ahead = predict([generator.random() for _ in range(EXPERTS)], TOP_K)
            for p in prefetch(planner, layer, [ahead]):
                machine.prefetch(p.layer, p.expert)
        planner.finish_step()
    for lane in ("cpu", "device", "link"):
        events = timeline.events(lane)
        assert all(later[0] >= earlier[1] - 1e-9 for earlier, later in itertools.pairwise(events))
        done = sum(end - start for start, end, *_ in events)
        assert getattr(machine, lane) == pytest.approx(done, rel=1e-6, abs=5.0 if lane == "link" else 1e-9)
    assert timeline.span <= machine.now + 1e-9


def test_a_transfer_changes_its_rate_when_the_cpu_stops():
    costs = dataclasses.replace(
        COSTS, transfer_latency=0.0, bandwidth=0.5, bandwidth_cpu_busy=0.25
    )  # 2 s alone, 4 s beside
    lane = LinkLane(costs)
    lane.cpu_until = 2.0  # a half of it by then, the other half in 1 s
    lane.send(("fetch", 0, 0), 0.0)
    lane.send(("fetch", 0, 1), 0.0)
    assert lane.advance(2.5) == []
    assert lane.advance(10.0) == [(("fetch", 0, 0), 0.0, 3.0), (("fetch", 0, 1), 3.0, 5.0)]
    assert lane.busy == 5.0


def test_two_links_carry_two_transfers_at_once():
    times = {}
    for links in (1, 2):
        planner = Planner("on-demand", 1, EXPERTS, TOP_K, 4, COSTS, cold=True)
        machine = VirtualMachine(COSTS, links=links)
        plan = planner.plan(0, {0: 1, 1: 1, 2: 1, 3: 1}, None, 1)
        machine.run(plan, {0: 1, 1: 1, 2: 1, 3: 1}, 1)
        times[links] = machine.now
    transfer = COSTS.transfer()
    assert times[1] == pytest.approx(4 * transfer + COSTS.device(1))
    assert times[2] == pytest.approx(2 * transfer + 2 * COSTS.device(1))


def test_what_is_drained_never_lands():
    machine = VirtualMachine(COSTS)
    machine.prefetch(1, 3)
    machine.drain()
    machine.now = 100.0
    assert machine.landed() == []
