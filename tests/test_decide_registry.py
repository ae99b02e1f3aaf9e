"""How rules are named: built-ins, classes, parameters, "module:Class:param=1"; in one process and in many."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import subprocess
import sys
import threading

import own_rules
import pytest
from own_rules import Fading, Half, Popular

import hybrimoe_jax
from hybrimoe_jax.decide import CachePolicy
from hybrimoe_jax.decide.cache import MRS, policy_rule
from hybrimoe_jax.decide.prefetch.predictors import Previous
from hybrimoe_jax.decide.registry import Rule
from hybrimoe_jax.decide.schedule import PaperScheduler
from hybrimoe_jax.decide.systems import System, get_system
from hybrimoe_jax.engine.config import EngineConfig
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.simulate.cases import Case
from hybrimoe_jax.simulate.grid import run_cases

BY_NAME = {
    "cache": "own_rules:Fading:decay=0.5",
    "scheduler": "own_rules:Half:share=0.25",
    "predictor": "own_rules:Popular:step=2",
}
BY_OBJECT = {"cache": Fading(decay=0.5), "scheduler": Half(share=0.25), "predictor": Popular(step=2)}
BUILT_IN = {"cache": MRS, "scheduler": PaperScheduler, "predictor": Previous}


def test_a_name_a_class_and_an_object_are_the_same_rule():
    named, given = (get_system("hybrimoe").override(**parts) for parts in (BY_NAME, BY_OBJECT))
    assert named == given and {part: getattr(given, part) for part in BY_NAME} == BY_NAME
    assert given.cache.made_by is Fading and given.scheduler.parameters == {"share": 0.25}
    assert get_system("hybrimoe").override(scheduler=Half(0.25)) == get_system("hybrimoe").override(
        scheduler="own_rules:Half:share=0.25"
    )

    class Third(Half):
        def __init__(self, first, share=0.5):
            super().__init__(share)

    assert Third(1, 0.25).as_rule().parameters == {"first": 1, "share": 0.25}
    built_in = get_system("hybrimoe").override(**BUILT_IN)
    assert (built_in.cache, built_in.scheduler, built_in.predictor) == ("mrs", "paper", "previous")
    assert get_system("hybrimoe").override(cache=MRS(alpha=0.3)).cache == "mrs:alpha=0.3"
    assert get_system("hybrimoe").override(predictor="router-input").predictor == "router-input"


class Typed(Fading):
    def __init__(self, *model, on=False, word: str = "a", limit: int | None = 3, open=None, **common):
        super().__init__(*model, **common)


@pytest.mark.parametrize(
    ("text", "parameters"),
    [
        ("lfu:decay=0.5", {"decay": 0.5}),
        ("lfu:decay=1", {"decay": 1.0}),
        ("lfu", {}),
        ("mrs:p=3,alpha=1e-1", {"p": 3, "alpha": 0.1}),
        ("mrs:p=None", {"p": None}),
        (f"{__name__}:Typed:on=true,word=1,limit=4", {"on": True, "word": "1", "limit": 4}),
        (f"{__name__}:Typed:on=False,word=None,limit=None", {"on": False, "word": "None", "limit": None}),
        (f"{__name__}:Typed:open=-2", {"open": -2}),
        (f"{__name__}:Typed:open=None", {"open": None}),
        (f"{__name__}:Typed:open=[1]", {"open": "[1]"}),
    ],
)
def test_parameters_are_read_as_they_are_annotated(text, parameters):
    rule = policy_rule(text)
    assert rule.parameters == parameters and list(map(type, rule.parameters.values())) == [
        type(value) for value in parameters.values()
    ]
    assert policy_rule(str(rule)) == rule, "what is written is read again"


@pytest.mark.parametrize(
    ("value", "written"), [(0.5, "0.5"), (None, "None"), ("a", "a"), ("a,b", "..."), ([1], "..."), (True, "True")]
)
def test_a_name_says_what_a_parameter_is_or_that_it_cannot(value, written):
    rule = policy_rule(Fading(decay=value)) if isinstance(value, float) else Rule(Fading, {"decay": value})
    assert rule == f"own_rules:Fading:decay={written}" and rule.said == f"decay={written}"


def test_an_engine_takes_all_of_them_and_a_system_for_a_name():
    options = EngineConfig(**BY_OBJECT)
    assert (options.cache, options.scheduler, options.predictor) == tuple(BY_NAME.values())
    mine = hybrimoe_jax.system("mine", base="on-demand", cache=Fading)
    assert (mine.name, mine.scheduler, mine.cache) == ("mine", "device-only", "own_rules:Fading")
    assert EngineConfig(system=mine, prefetch="impact").chosen_system == mine.override(prefetch="impact")
    assert json.loads(json.dumps([mine.cache])) == ["own_rules:Fading"]


def test_an_object_can_be_copied():
    policy = Fading(8, 4, 2, decay=0.5)
    policy.observe(None, {3: 1})
    twin = copy.deepcopy(policy)
    policy.observe(None, {3: 1})
    assert twin.heat[3] == 1 and policy.heat[3] == 1.5


class Thin(CachePolicy):
    def update(self, loads):
        pass


class Fussy(CachePolicy):
    def __init__(self, layers):
        pass

    def update(self, scores, loads):
        pass


class NoSchedule(PaperScheduler.__base__):
    pass


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("cache", "own_rules:Fading:speed=1", r"cache own_rules:Fading has no parameter 'speed' \(known: decay\)"),
        ("cache", "own_rules:Fading:decay=much", "decay='much' is not a number"),
        ("cache", "own_rules:Fading:decay=...", "decay stands for a value that a name cannot hold"),
        ("cache", Fading(speed=1), "making it failed .TypeError: .*unexpected keyword argument 'speed'"),
        ("cache", Fading(8, 4, 2), r"was made for one model; give the class, or Fading\(...\) with its own parameters"),
        ("cache", Half, "'own_rules:Half': Half is not a class derived from hybrimoe_jax.decide.CachePolicy"),
        ("cache", "own_rules:split", "split is not a class"),
        ("cache", "__main__:Nowhere", "module __main__ has no Nowhere: define the class first"),
        ("cache", Thin, r"Thin.update must take \(self, scores, loads\): too many positional arguments"),
        ("cache", Fussy, "making it failed .TypeError"),
        ("scheduler", NoSchedule, "NoSchedule lacks the method schedule of hybrimoe_jax.decide.Scheduler"),
        ("scheduler", 3, "scheduler 3 is neither a name nor a class .known: paper, "),
        ("scheduler", "optimal:nodes=many", "nodes='many' is not a whole number"),
        ("predictor", Fading, "is not a class derived from hybrimoe_jax.decide.Predictor"),
        ("predictor", "previous:rate=2", r"predictor previous has no parameter 'rate' \(known: none\)"),
    ],
)
def test_what_is_none_is_refused_in_one_line(part, value, message):
    with pytest.raises(UserError, match=message) as refused:
        EngineConfig(**{part: value})
    assert "\n" not in str(refused.value)


def test_a_system_of_one_s_own_is_checked():
    with pytest.raises(UserError, match="'hybrimoe' is there already"):
        hybrimoe_jax.system("hybrimoe", cache="lru")
    with pytest.raises(UserError, match=r"system 'mine' has no part 'cash' .did you mean cache"):
        hybrimoe_jax.system("mine", cash="lru")


def local():
    """A class that only this function knows, which uses a global function, a base of the same kind and `super`."""

    class Base(CachePolicy):
        def update(self, scores, loads):
            self.heat = [float(expert in loads) for expert in range(self.num_experts)]

    class Local(Base):
        weight = 2

        @classmethod
        def times(cls, heat, by=3, *, plus=1):
            return cls.weight * heat * by + plus

        def update(self, scores, loads):
            super().update(scores, loads)
            self.heat = [doubled(self.times(heat)) - self.update.less for heat in self.heat]

        update.less = 2  # an attribute of the function

    return Local


def doubled(heat):
    return 2 * heat


def test_a_class_that_no_other_process_could_import_goes_there_whole():
    found = pickle.loads(pickle.dumps(hybrimoe_jax.system("mine", cache=local()))).cache
    assert found == f"{__name__}:local.<locals>.Local"
    policy = found.made_by(4, 2, 1)
    policy.observe(None, {1: 1})
    assert policy.heat == [0, 12, 0, 0] and isinstance(policy, CachePolicy)
    assert pickle.loads(pickle.dumps(policy_rule(Fading))).made_by is Fading, "others go by name"


def test_what_cannot_be_sent_is_said():
    lock = threading.Lock()

    class Locked(Fading):
        def update(self, scores, loads):
            with lock:
                super().update(scores, loads)

    with pytest.raises(UserError, match=r"Locked cannot be sent to other processes .*take one process .jobs 1."):
        pickle.dumps(policy_rule(Locked))


NOTEBOOK = """
from hybrimoe_jax.decide import CachePolicy
import hybrimoe_jax as hj
from hybrimoe_jax.simulate.cases import Case
from hybrimoe_jax.simulate.grid import run_cases
from own_rules import Half

class Mine(CachePolicy):
    def update(self, scores, loads):
        self.heat = [fresh(heat, expert in loads) for expert, heat in enumerate(self.heat)]

def fresh(heat, used):
    return 0.5 * heat + used

mine = hj.system("mine", cache=Mine, scheduler=Half(share=0.5))
cases = [Case("synthetic:mixtral-8x7b", "a6000-paper", mine, ratio, steps=2) for ratio in (0.25, 0.5)]
one, two = ([record["hit_rate"]["mean"] for record in run_cases(cases, jobs)] for jobs in (1, 2))
assert one == two, (one, two)
print(one)
"""


def test_a_class_of_a_notebook_runs_in_worker_processes(tmp_path):
    """As typed into an interpreter: there is no file that a worker could import it from, nor may one run it again."""
    done = subprocess.run(
        [sys.executable, "-"], input=NOTEBOOK, capture_output=True, text=True, cwd=own_rules.__file__.rpartition("/")[0]
    )
    assert done.returncode == 0, done.stderr
    low, high = json.loads(done.stdout)
    assert 0 < low < high


def test_a_case_takes_a_system_and_rules(tmp_path):
    mine = hybrimoe_jax.system("mine", **BY_OBJECT)
    common = dict(trace="synthetic:mixtral-8x7b", profile="a6000-paper", ratio=0.25, steps=2)
    records = list(
        run_cases([Case(system=mine, **common), Case(system="hybrimoe", parts=tuple(BY_OBJECT.items()), **common)])
    )
    assert [record["system"] for record in records] == ["mine", "hybrimoe"]
    choices = [{part: record["choices"][part] for part in BY_NAME} for record in records]
    assert choices == [BY_NAME, BY_NAME] and json.dumps(records)
    assert records[0]["hit_rate"] == records[1]["hit_rate"]


def test_a_recorded_system_is_read_from_its_names():
    mine = hybrimoe_jax.system("mine", **BY_OBJECT)
    assert System(**json.loads(json.dumps(dataclasses.asdict(mine)))) == mine
