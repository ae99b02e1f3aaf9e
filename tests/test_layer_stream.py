"""Prompts streamed layer by layer: the timeline against one told apart, what moves, and the live engine."""

import random

import numpy as np
import pytest
import tiny
from planner_cases import planner_of, prefetch

from hybrimoe_jax.decide import Planner, Prediction, get_system
from hybrimoe_jax.decide.plan import Fetch
from hybrimoe_jax.decide.prefetch.prediction import RouterOutlook
from hybrimoe_jax.machine.costs import CostModel
from hybrimoe_jax.machine.virtual import VirtualMachine
from hybrimoe_jax.simulate.replay import replay
from hybrimoe_jax.simulate.workload import Asked, Step
from hybrimoe_jax.trace.timeline import Timeline

LAYERS, EXPERTS, TOP_K = 5, 8, 2


def machine(transfer=1.0, device=0.5, token=0.1, shared=0.3, front=0.7, cpu=0.01) -> CostModel:
    return CostModel(
        cpu_expert=cpu, cpu_token=0.01, cpu_first=0.0, device_expert=device, device_token=token, shared_base=shared,
        shared_token=0.0, layer_base=front, layer_token=0.0, transfer_latency=0.0, bandwidth=1 / transfer,
        bandwidth_cpu_busy=0.5 / transfer, expert_bytes=1, source="a test",
    )  # fmt: skip


def chunk(loads: list[dict[int, int]], tokens: int = 9, phase: str = "prefill") -> Step:
    """One step that asks for these experts in each layer."""
    return Step(
        phase,
        tokens,
        tokens,
        0,
        [Asked(layer, asked, None, RouterOutlook(np.zeros((0, TOP_K)))) for layer, asked in enumerate(loads)],
    )


def random_chunk(generator: random.Random) -> Step:
    return chunk(
        [
            {
                e: generator.randint(1, 9)
                for e in sorted(generator.sample(range(EXPERTS), generator.randint(1, EXPERTS)))
            }
            for _ in range(LAYERS)
        ]
    )


def streamed_seconds(step: Step, residents: list[set[int]], costs: CostModel) -> float:
    """The chunk's time told apart: two buffers, a link that moves a layer's absent experts by id from the moment that
    the layer before it starts, and a device that takes residents by falling load and then whatever has landed, in the
    order of landing.
    """
    link = landed = 0.0
    now, landing = 0.0, {}

    def send(layer: int, at: float) -> None:
        nonlocal link
        link = max(link, at)
        for expert in range(EXPERTS):
            if expert not in residents[layer]:
                link += costs.transfer()
                landing[layer, expert] = link

    send(0, now)
    for layer, (_, loads, *_) in enumerate(step.layers):
        now += costs.layer(step.tokens)
        if layer + 1 < LAYERS:
            send(layer + 1, now)
        now += costs.shared(step.tokens)
        for expert in loads:
            if expert in residents[layer]:
                now += costs.device(loads[expert])
        # What is there already goes by load; the order does not change when the last of them is done.
        for landed, load in sorted((landing[layer, e], n) for e, n in loads.items() if e not in residents[layer]):
            now = max(now, landed) + costs.device(load)
    return now


@pytest.mark.parametrize("speed", [0.02, 0.3, 1.0, 4.0])
def test_the_timeline_is_that_of_one_told_apart(speed):
    generator = random.Random(speed)
    for _ in range(20):
        costs, step = machine(speed), random_chunk(generator)
        planner = Planner("freetoken", LAYERS, EXPERTS, TOP_K, generator.choice([0, 2, 7, 8]), costs)
        residents = [set(planner.resident(layer)) for layer in range(LAYERS)]
        result = replay(planner, VirtualMachine(costs), [step])
        assert result.seconds == pytest.approx(streamed_seconds(step, residents, costs), rel=1e-9)
        assert planner._next_clock == pytest.approx(result.seconds + costs.layer(9)), "the planner foresees it"
        assert [set(planner.resident(layer)) for layer in range(LAYERS)] == residents


def test_whole_layers_take_the_first_stream_and_then_the_longer_of_computing_and_streaming():
    """With one expert a layer nothing starts before its layer has landed, so the rule of thumb holds exactly."""
    generator = random.Random(0)
    for _ in range(30):
        costs = machine(generator.uniform(0.1, 3), shared=0.0, front=0.0)
        loads = [generator.randint(1, 20) for _ in range(LAYERS)]
        result = replay(
            Planner("freetoken", LAYERS, 1, 1, 0, costs), VirtualMachine(costs), [chunk([{0: n} for n in loads])]
        )
        compute, stream = [costs.device(n) for n in loads], costs.transfer()
        expected = stream + sum(max(c, stream) for c in compute[:-1]) + compute[-1]
        assert result.seconds == pytest.approx(expected)


def test_a_chunk_lies_between_the_busier_lane_and_the_rule_of_thumb():
    generator = random.Random(1)
    for _ in range(50):
        costs, step = machine(generator.uniform(0.02, 2), shared=0.0, front=0.0), random_chunk(generator)
        result = replay(Planner("freetoken", LAYERS, EXPERTS, TOP_K, 0, costs), VirtualMachine(costs), [step])
        compute = [sum(map(costs.device, asked.loads.values())) for asked in step.layers]
        stream = EXPERTS * costs.transfer()
        most = stream + sum(max(c, stream) for c in compute[:-1]) + compute[-1]
        assert max(sum(compute), LAYERS * stream * 0.5) <= result.seconds <= most + 1e-9


def test_while_a_layer_computes_the_next_one_crosses_the_link():
    costs, timeline = machine(transfer=0.1), Timeline()
    planner = Planner("freetoken", LAYERS, EXPERTS, TOP_K, 2, costs)
    replay(planner, VirtualMachine(costs, timeline), [chunk([dict.fromkeys(range(EXPERTS), 4)] * LAYERS)])
    moved = [(args["layer"], start, end) for start, end, _, args in timeline.events("link")]
    ran = [(args["layer"], start, end) for start, end, name, args in timeline.events("device") if "expert" in name]
    for layer in range(1, LAYERS):
        begin = min(start for at, start, _ in moved if at == layer)
        over = max(end for at, _, end in moved if at == layer)
        before = [(start, end) for at, start, end in ran if at == layer - 1]
        assert begin <= before[0][0] and over <= before[-1][1], "hidden behind the layer before"
        done = [end for at, _, end in ran if at == layer - 2]
        assert not done or begin >= max(done), "its buffer was another layer's"
    assert {args["kind"] for *_, args in timeline.events("link")} == {"stream"}


def test_nothing_enters_or_leaves_the_slots_and_every_transfer_is_counted():
    planner = Planner("freetoken", LAYERS, EXPERTS, TOP_K, 2, machine())
    first = planner.begin_step("prefill")
    assert first == tuple(range(2, EXPERTS))
    plan = planner.plan(0, {0: 3, 1: 1, 6: 2, 7: 5}, None, 9)
    assert (plan.hits, plan.misses, plan.cpu, plan.fetch, plan.awaited) == ((0, 1), (6, 7), (), (), ())
    assert (
        plan.device == (0, 1) and plan.double_buffered == (6, 7) and plan.next_layer_experts == tuple(range(2, EXPERTS))
    )
    assert planner.plan(LAYERS - 1, {0: 1}, None, 9).next_layer_experts == (), "there is no layer to come"
    planner.finish_step()
    c = planner.counters
    assert (c.layer_streamed, c.layer_streamed_used, c.fetched, c.device) == (12, 2 + 0, 0, 5)
    assert [planner.resident(layer) for layer in range(LAYERS)] == [{0, 1}] * LAYERS


@pytest.mark.parametrize("now", [0.0, 100.0])
def test_the_first_layer_is_on_the_link_from_the_moment_that_the_step_begins(now):
    """Six experts of 1 s each cross it in the order of their ids, two of them by the time that the layer starts."""
    planner = Planner("freetoken", LAYERS, EXPERTS, TOP_K, 2, machine(token=0.0))
    planner.begin_step("prefill", now)
    assert planner.plan(0, {2: 1, 7: 1}, None, 9, now + 2.0).schedule.device_seconds == pytest.approx(4.0 + 0.5)


def test_only_prompts_are_streamed_and_only_where_the_system_says_so():
    for system, phase in (("freetoken", "decode"), ("hybrimoe", "prefill")):
        planner = Planner(system, LAYERS, EXPERTS, TOP_K, 2, machine())
        assert not planner.streams(phase) and planner.begin_step(phase) == ()
        plan = planner.plan(0, {5: 2, 6: 1}, None, 3)
        assert not plan.double_buffered and not plan.next_layer_experts and planner.counters.layer_streamed == 0


def test_the_step_after_a_streamed_one_decodes_as_ever():
    costs = machine()
    planner, other = (Planner("freetoken", LAYERS, EXPERTS, TOP_K, 2, costs) for _ in range(2))
    planner.begin_step("prefill")
    planner.plan(0, {5: 2, 6: 1}, None, 3)
    planner.abandon_step()
    assert planner.begin_step("decode") == ()
    plans = [p.plan(1, {5: 1, 6: 1}, None, 1, 1000.0) for p in (planner, other)]
    assert plans[0] == plans[1]._replace(schedule=plans[0].schedule) and not plans[0].next_layer_experts


def test_an_expert_that_a_prefetch_pushes_out_meanwhile_is_fetched():
    planner = planner_of(
        "freetoken", LAYERS, EXPERTS, TOP_K, 1, machine(), prefetch="next-layer", guard="none", max_in_flight=1
    )
    planner.plan(0, {0: 1, 3: 1}, None, 1)
    assert [(p.layer, p.expert) for p in prefetch(planner, 0, [Prediction({5: 1})])] == [(1, 5)]
    planner.finish_step()
    planner.begin_step("prefill")
    ahead = planner.plan(0, {0: 1, 3: 2}, None, 9).next_layer_experts
    assert 5 not in ahead and 0 not in ahead, "one is on the link already, the other resident"
    victim = planner.landed(1, 5)
    layer, expert = victim
    planner.plan(1, {5: 1}, None, 9) if layer > 1 else None
    plan = planner.plan(layer, {expert: 4, 5: 1}, None, 9)
    assert plan.fetch == (Fetch(expert, None, True),) and expert not in planner.resident(layer)


def test_another_system_can_read_prompts_this_way_and_prefetches_in_decoding_only():
    costs = machine(transfer=0.3, cpu=4.0)
    system = get_system("hybrimoe").override(stream_prefill=True, predictor="previous")
    planner = Planner(system, LAYERS, EXPERTS, TOP_K, 2, costs)
    planner.begin_step("prefill")
    assert planner.depth(9) == 0 and planner.routers_wanted(9) == 0
    planner.plan(0, {0: 9, 4: 9}, None, 9)
    assert planner.prefetch(0, RouterOutlook(np.array([[0, 4]] * 9))) == ()
    planner.finish_step()
    assert planner.depth(9) == 3


def test_live_the_answer_is_the_dense_model_s_and_two_layers_are_alive_at_most(monkeypatch):
    config, _, _ = tiny.weights("qwen2_moe")
    prompts = tiny.prompts(config, (37, 20))
    dense = tiny.engine(executor="dense").generate(prompts, max_new_tokens=6)
    engine = tiny.engine(system="freetoken", cache_ratio=0.25, debug=True)
    link, order, alive = engine._parts.link, [], []
    start, take, end = link.stream, link.streamed, link.end_stream

    def stream(layer, experts):
        order.append(("stream", layer))
        start(layer, experts)
        alive.append(sum(map(bool, link._streamed.values())))

    monkeypatch.setattr(link, "stream", stream)
    monkeypatch.setattr(link, "streamed", lambda *key: (order.append(("use", key[0])), take(*key))[1])
    monkeypatch.setattr(link, "end_stream", lambda layer: (order.append(("end", layer)), end(layer))[1])
    answer = engine.generate(prompts, max_new_tokens=6)
    assert answer.token_ids == dense.token_ids
    chunks, layers, residents = 3, len(config.moe_layers), 2
    prefill = [s for s in answer.stats.steps if s.phase == "prefill"]
    assert len(prefill) == chunks and max(alive) <= 2
    assert [s.total("layer_streamed") for s in prefill] == [layers * (8 - residents)] * chunks
    assert all(s.total("layer_streamed") == 0 for s in answer.stats.steps if s.phase == "decode")
    assert all(not layer.cpu and layer.lanes.link > 0 for s in prefill for layer in s.layers)
    size = engine._parts.pool.expert_bytes
    assert prefill[0].total("bytes_h2d") == layers * (8 - residents) * size
    counters = engine.planner.counters
    assert counters.layer_streamed == answer.stats.summary()["layer_streamed"] == chunks * layers * (8 - residents)
    for layer in range(1, layers):
        assert order.index(("stream", layer)) < order.index(("use", layer - 1)) < order.index(("end", layer - 1))
    assert not link.busy
    engine.close()


def test_the_buffers_are_reserved():
    plain, streamed = (tiny.engine(system="freetoken", stream_prefill=on) for on in (False, True))
    expert = plain._parts.pool.expert_bytes
    assert streamed._parts.footprint.staging - plain._parts.footprint.staging == 2 * 8 * expert
    plain.close(), streamed.close()
