"""The file of a cache state: whatever rules hold comes back as it was; other files and others' states are refused."""

from __future__ import annotations

import dataclasses
import json
import random
from collections import OrderedDict, deque

import numpy as np
import pytest
from cache_state_cases import costs, planner_for, short_trace

from hybrimoe_jax.decide.cache import LRU
from hybrimoe_jax.decide.cache_state import load_state, take_state
from hybrimoe_jax.decide.packing import pack, unpack
from hybrimoe_jax.decide.prefetch.prediction import RouterOutlook
from hybrimoe_jax.decide.registry import Rule
from hybrimoe_jax.decide.systems import get_system
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.machine.virtual import VirtualMachine
from hybrimoe_jax.simulate.replay import replay, settle
from hybrimoe_jax.simulate.workload import recorded_steps
from hybrimoe_jax.trace.file import save_trace


@pytest.fixture(scope="module")
def trace():
    return short_trace()


def test_states_of_others_are_refused_in_one_line(trace, tmp_path):
    planner = planner_for("hybrimoe", trace.facts)
    take_state(planner, trace.facts, routers="aa").save(tmp_path / "s.npz")
    state, facts = load_state(tmp_path / "s.npz"), trace.facts
    system = get_system("hybrimoe")
    state.check(facts, system, [5] * 4, "aa")
    refused = [
        (
            (dataclasses.replace(facts, layers=5), system),
            "it is of toy, 4 MoE layers of 16 experts, 3 a token; this model is",
        ),
        ((dataclasses.replace(facts, model_type="other"), system), "this model is other"),
        ((facts, system.override(cache="lru")), "its cache is 'mrs'; this run's is 'lru'"),
        ((facts, system.override(predictor="previous")), "its predictor is 'router-reuse'; this run's is 'previous'"),
        ((facts, system, [5, 5, 4, 5]), "it is of 5 slots in layer 2; this run has 4"),
        ((facts, system, None, "bb"), "of another checkpoint of this shape: its routers differ"),
    ]
    for arguments, said in refused:
        with pytest.raises(UserError, match=rf"^cache state .*s\.npz: .*{said}"):
            state.check(*arguments)


def test_files_that_are_no_state_are_refused(trace, tmp_path):
    path = tmp_path / "s.npz"
    with pytest.raises(UserError, match="cannot be read"):
        load_state(path)
    save_trace(trace, path)
    with pytest.raises(UserError, match="not a cache state; `generate --save-cache-state FILE` writes one"):
        load_state(path)
    path.write_bytes(b"PK nothing")
    with pytest.raises(UserError, match=r"not a cache state \(BadZipFile: File is not a zip file\)"):
        load_state(path)
    planner = planner_for("hybrimoe", trace.facts)
    state = take_state(planner, trace.facts)
    changes = {"version": (2, r"version 2 is not supported \(this program reads 1\)"), "slots": (None, "damaged"),
               "resident": ([[99]] * 4, "damaged"), "learned": (["nothing", 0], "damaged")}  # fmt: skip
    for name, (value, said) in changes.items():
        dataclasses.replace(state, meta={**state.meta, name: value}).save(path)
        with pytest.raises(UserError, match=said):
            load_state(path).restore(planner, trace.facts)


@pytest.mark.parametrize("damaged", ["learned", "resident"])
def test_a_refused_state_leaves_a_planner_as_it_was(trace, damaged):
    """What it had learned, too, though most of the state was good."""
    whole, fresh = (planner_for("hybrimoe", trace.facts) for _ in range(2))
    machine = VirtualMachine(costs())
    replay(whole, machine, list(recorded_steps(trace))[:16])
    settle(whole, machine)
    state, before = take_state(whole, trace.facts), take_state(fresh, trace.facts).digest
    meta = json.loads(json.dumps(state.meta))
    if damaged == "learned":
        meta["learned"][2][-1][1] = ["object", 10**6, "Nonsense", {}]  # the last of the objects
    else:
        meta["resident"][3] = list(range(16))
    with pytest.raises(UserError, match=r"it is damaged .(it holds a Nonsense|more residents than slots)"):
        dataclasses.replace(state, meta=meta).restore(fresh, trace.facts)
    assert take_state(fresh, trace.facts).digest == before
    state.restore(fresh, trace.facts)
    assert take_state(fresh, trace.facts).digest == state.digest != before


class Everything:
    """All kinds of values that an object may hold."""

    def __init__(self, seed: int):
        rng = np.random.default_rng(seed)
        self.numbers = [True, None, seed, -0.5, float("inf"), float("-inf"), "text", np.float32(seed), np.int64(seed)]
        self.array, self.again = rng.random((2, 3)), None
        self.sets = (set(rng.integers(0, 9, 4).tolist()), frozenset({seed, 7}))
        self.queue, self.order = deque(range(seed, seed + 5), maxlen=3), OrderedDict({seed: None, 1: [2]})
        self.tables = {(1, 2): {"a": np.arange(seed)}, "deep": [[seed]]}
        self.chance, self.generator = random.Random(seed), np.random.default_rng(seed)
        self.seen, self.own = RouterOutlook(np.array([[seed]]), None, [np.ones(2)]), len
        self.rule = Rule(LRU, {})  # a text, and more
        self.shared = self.queue


def test_whatever_an_object_holds_comes_back_as_it_was():
    first, second = Everything(5), Everything(6)
    first.again = first.array
    first.chance.random(), first.generator.random()
    place = second.array
    node, arrays = pack(first, "it")
    unpack(json.loads(json.dumps(node, allow_nan=False)), arrays, second)
    assert second.array is second.again is place and second.shared is second.queue, "one object stays one"
    assert second.chance.random() == first.chance.random() and second.generator.random() == first.generator.random()
    assert (second.own, second.queue.maxlen, list(second.order)) == (len, 3, [5, 1])
    assert type(second.rule) is Rule and second.rule == first.rule
    for name in ("numbers", "sets", "queue", "order"):
        assert getattr(second, name) == getattr(first, name) and type(getattr(second, name)) is type(
            getattr(first, name)
        )
    assert [*map(type, second.numbers)] == [*map(type, first.numbers)] and [*map(type, second.sets)] == [set, frozenset]
    assert second.tables["deep"] == [[5]] and second.tables[1, 2]["a"].tolist() == [0, 1, 2, 3, 4]
    assert type(second.seen) is RouterOutlook and second.seen.ids.tolist() == [[5]] and second.seen.scores is None
    np.testing.assert_array_equal(second.array, first.array)
    with pytest.raises(ValueError, match="it holds a Everything, where there is a Rule"):
        unpack(node, arrays, Rule(LRU, {}))
    with pytest.raises(UserError, match=r"it: numbers\[0\] is an array of objects, which a file cannot hold"):
        first.numbers = [np.array([None])]
        pack(first, "it")


class Opaque(LRU):
    """Holds what no file can."""

    def __init__(self, *args, **common):
        super().__init__(*args, **common)
        self.rows = iter([1])


def test_a_rule_that_holds_what_a_file_cannot_is_named(trace):
    planner = planner_for(get_system("hybrimoe").override(cache=Opaque), trace.facts)
    with pytest.raises(UserError, match=r"\['policies'\]\[0\].rows is a list_iterator, which a file cannot hold"):
        take_state(planner, trace.facts)
