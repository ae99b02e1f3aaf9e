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
from hybrimoe_jax.decide.cache.queues import S3FIFO
from hybrimoe_jax.decide.cache_state import load_state, take_state
from hybrimoe_jax.decide.learned import _same
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
    more = [("slots", [], "slots of 0 layers"), ("slots", [5, 5, "5", 5], "of '5' slots in layer 2"),
            ("back_off", -5, "its back_off is -5"), ("back_off", 8, "its back_off is 8"),
            ("back_off", True, "its back_off is True"), ("learned", None, "its learned is None")]  # fmt: skip
    for some in ("12", [0.5], [float("inf")], [True], [1, 1], None):
        more.append(("resident", [some, [], [], []], "the residents of layer 0 are"))
    for name, value, said in [*[(name, *change) for name, change in changes.items()], *more]:
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


INF, NAN = ["float", "inf"], ["float", "nan"]
WRONG = [
    ({}, 0, "heat", [["list", 999, [0.0] * 15], None, ["list", 999, [NAN] * 16], ["list", 999, ["x"] * 16], ["own"]]),
    ({}, 0, "last_used", [["list", 999, [0] * 17], ["list", 999, [10**30] * 16], ["tuple", 999, [-1] * 16], {"a": 1}]),
    ({}, 0, "step", [-1, 0.5, True, "0", None, 10**400]),
    ({}, 0, "alpha", [0.25, None, "0.5", True]),
    ({}, 0, "p", [None, 7, 6.5]),
    ({}, 0, "num_experts", [15, 16.5, "16"]),
    ({}, 0, "capacity", [99, None]),
    ({}, 0, "frequencies", [["list", 999, [1.0]], ["list", 999, [INF] * 16]]),
    ({}, 0, "observe", [5]),
    ({}, 0, "__class__", [5]),
    ({"cache": "lfru"}, 0, "uses", [["list", 999, [1] * 16]]),
    ({"cache": "slru"}, 0, "_safe", [["list", 999, []], ["dict", 999, [[99, None]]]]),
    ({"cache": "s3-fifo"}, 0, "_uses", [["dict", 999, []], ["dict", 999, [[0, 9]]], None]),
    ({"cache": "echo"}, 0, "memory", [None, ["object", 999, "Memory", {}]]),
    ({"cache": "random"}, 0, "_random", [None, ["random", 999, 1], ["random", 999, ["tuple", 998, [3, 1, None]]]]),
    ({}, 4, "top_k", [4, None]),
    ({}, 4, "distances", ["3", INF]),
    ({"predictor": "corrected"}, 4, "_seen", [None, ["array", 999, "nothing"], ["array", 999, "array_0"]]),
    ({"predictor": "co-activation"}, 4, "_before", [["dict", 999, [[9, 1]]], ["list", 999, []]]),
    ({"predictor": "previous"}, 4, "_chosen", [["dict", 999, [[0, ["named", 998, "RouterOutlook", [1, None]]]]]]),
    ({}, 5, "decay", [0.5, "x"]),
    ({}, 5, "_hits", [["list", 999, [1.0] * 4], ["list", 999, [INF] * 4], ["list", 999, []], 0]),
    ({}, 5, "predicted", [["list", 999, [1.5] * 4], ["same", 999], ["same", 0]]),
    ({}, 5, "came_true", [["list", 999, [7] * 4]]),
]  # fmt: skip


def nodes_of(meta) -> list:
    """The policies of the four layers, the predictor and the accuracy, as they stand in `meta`."""
    (_, policies), (_, predictor), (_, accuracy) = meta["learned"][2]
    return [*policies[2], predictor, accuracy]


@pytest.mark.parametrize(("parts", "at", "name", "values"), WRONG, ids=[f"{w[1]}-{w[2]}" for w in WRONG])
def test_what_a_rule_never_is_is_refused_and_nothing_is_changed(trace, parts, at, name, values):
    """Neither in a fresh planner nor in one that has taken other states before."""
    system = get_system("hybrimoe").override(**parts)
    planner, clean = (planner_for(system, trace.facts) for _ in range(2))
    state = take_state(clean, trace.facts)
    replay(planner, machine := VirtualMachine(costs()), list(recorded_steps(trace))[:9])
    settle(planner, machine)
    before = take_state(planner, trace.facts).digest
    for value in values:
        meta = json.loads(json.dumps(state.meta))
        nodes_of(meta)[at][3][name] = value
        with pytest.raises(UserError, match=r"^cache state: it is damaged \(.*\); save it again$"):
            dataclasses.replace(state, meta=meta).restore(planner, trace.facts)
        assert take_state(planner, trace.facts).digest == before
    meta = json.loads(json.dumps(state.meta))
    del nodes_of(meta)[at][3]["top_k" if at < 5 else "decay"]
    with pytest.raises(UserError, match="it lacks "):
        dataclasses.replace(state, meta=meta).restore(planner, trace.facts)
    state.restore(planner, trace.facts)
    assert take_state(planner, trace.facts).digest == state.digest != before


@pytest.mark.parametrize("place", [(2, 0, 1), (2, 0, 1, 2, 1), (2, 1, 1), (2, 2, 1), (2, 0, 1, 2)])
@pytest.mark.parametrize("value", [None, ["list", 999, []], ["own"], ["same", 0], ["dict", 999, []], []])
def test_objects_that_a_state_leaves_out_are_refused(trace, place, value):
    planner = planner_for("hybrimoe", trace.facts)
    meta = json.loads(json.dumps((state := take_state(planner, trace.facts)).meta))
    holder = meta["learned"]
    for part in place[:-1]:
        holder = holder[part]
    holder[place[-1]] = value
    with pytest.raises(UserError, match=r"it is damaged \(.*\); save it again$"):
        dataclasses.replace(state, meta=meta).restore(planner, trace.facts)
    state.restore(planner, trace.facts)


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


def test_a_setting_of_numpys_is_of_the_same_type():
    assert _same(np.float64(1), np.float64(1)) and not _same(np.complex128(1), np.float64(1))


def test_queues_of_another_layer_still_find_a_victim():
    """A state whose layers were exchanged is sound layer by layer."""
    policy = S3FIFO(8, 3, 2)
    policy.loaded([1, 2])
    for expert in (1, 5, 1):
        policy.moved(expert, None)
    policy.update(None, {1: 1})
    for _ in range(3):
        victim = policy.victim([1, 2, 5], [])
        assert victim in (1, 2, 5)
        policy.moved(None, victim)
