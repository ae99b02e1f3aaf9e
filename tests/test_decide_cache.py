"""Cache policies: one contract for all of them, then what each is for."""

import collections

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrimoe_jax.decide.cache import (
    LFU,
    LRU,
    MRS,
    POLICIES,
    S3FIFO,
    SLRU,
    Belady,
    Echo,
    Static,
    build_policies,
    policy_class,
    policy_rule,
)
from hybrimoe_jax.errors import UserError

EXPERTS, TOP_K = 8, 2

steps = st.lists(
    st.tuples(
        st.none() | st.lists(st.floats(0.0, 1.0), min_size=EXPERTS, max_size=EXPERTS),
        st.dictionaries(st.integers(0, EXPERTS - 1), st.integers(1, 9), min_size=1, max_size=4),
    ),
    max_size=12,
)


def one_hot(**scores: float) -> list[float]:
    """A score vector from e0=0.5, e3=0.2, ...; zero elsewhere."""
    vector = [0.0] * EXPERTS
    for name, score in scores.items():
        vector[int(name[1:])] = score
    return vector


@pytest.mark.parametrize("name", POLICIES)
class TestContract:
    """Every policy."""

    def test_initial_fills_the_capacity_with_the_most_frequent(self, name):
        policy = policy_class(name)(EXPERTS, 3, TOP_K, frequencies=[1, 9, 0, 4, 9, 2, 0, 0])
        assert policy.initial() == [1, 4, 3]
        assert policy_class(name)(EXPERTS, 3, TOP_K).initial() == [0, 1, 2]
        assert policy_class(name)(EXPERTS, 0, TOP_K).initial() == []

    @given(
        history=steps,
        resident=st.sets(st.integers(0, EXPERTS - 1)),
        protected=st.sets(st.integers(0, EXPERTS - 1)),
    )
    def test_the_victim_is_resident_unprotected_and_no_hotter_than_the_rest(self, name, history, resident, protected):
        policy = policy_class(name)(EXPERTS, 4, TOP_K)
        for scores, loads in history:
            policy.observe(scores, loads)
        victim = policy.victim(resident, protected)
        if policy.fixed or not resident - protected:
            assert victim is None
        else:
            assert victim in resident - protected
            if policy.comparable:
                assert policy.value(victim) == min(policy.value(e) for e in resident - protected)

    @given(history=steps)
    def test_expected_is_the_value_after_the_predicted_step(self, name, history):
        policy = policy_class(name)(EXPERTS, 4, TOP_K)
        for scores, loads in history:
            policy.observe(scores, loads)
        scores, loads = one_hot(e1=0.6, e5=0.3), {1: 1, 5: 1}
        expected = [policy.expected(e, scores[e], loads.get(e, 0)) for e in range(EXPERTS)]
        assert all(expected[e] >= policy.expected(e, 0.0, 0) for e in loads)
        assert all(policy.expected(e, 0.0, 0) <= policy.value(e) for e in range(EXPERTS)), "nobody warms up unused"
        policy.observe(scores, loads)
        if name in (
            "mrs",
            "lru",
            "lfu",
            "lfru",
            "static",
        ):  # the others' values hang on more than this expert's own uses
            assert expected == pytest.approx([policy.value(e) for e in range(EXPERTS)])

    def test_two_that_saw_the_same_decide_the_same(self, name):
        a, b = (policy_class(name)(EXPERTS, 4, TOP_K) for _ in range(2))
        for policy in (a, b):
            policy.observe(one_hot(e0=0.5, e3=0.4, e6=0.1), {0: 1, 3: 1})
            policy.observe(None, {3: 2, 7: 1})
        assert a.victim({0, 3, 6, 7}, {7}) == b.victim({7, 6, 3, 0}, {7})

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((EXPERTS, 9, TOP_K), "9 slots"),
            ((EXPERTS, -1, TOP_K), "-1 slots"),
            ((EXPERTS, 4, 9), "top-k 9"),
            ((EXPERTS, 4, 0), "top-k 0"),
        ],
    )
    def test_impossible_shapes_are_refused(self, name, arguments, message):
        with pytest.raises(UserError, match=message):
            policy_class(name)(*arguments)
        with pytest.raises(UserError, match="3 frequencies for 8"):
            policy_class(name)(EXPERTS, 4, TOP_K, frequencies=[1, 2, 3])
        assert policy_class(name)(EXPERTS, EXPERTS, EXPERTS).initial() == list(range(EXPERTS))


def test_lru_evicts_the_longest_unused():
    policy = LRU(EXPERTS, 3, TOP_K)
    for expert in (0, 1, 2, 0):
        policy.observe(None, {expert: 1})
    assert policy.victim({0, 1, 2}, ()) == 1


def test_lfu_counts_steps_not_tokens():
    policy = LFU(EXPERTS, 3, TOP_K)
    for loads in ({0: 50}, {1: 1}, {1: 1}):
        policy.observe(None, loads)
    assert policy.victim({0, 1}, ()) == 0


ZEROS = [0.0] * EXPERTS


@pytest.mark.parametrize(
    ("name", "steps", "resident", "victim"),
    [
        ("lfu", [(None, {1: 1}), (None, {0: 1})], (0, 1), 1),  # the least recently used
        ("mrs", [(ZEROS, {2: 1}), (ZEROS, {0: 1}), (ZEROS, {1: 1})], (0, 1, 2), 2),
        ("lru", [(None, {2: 1, 0: 1, 1: 1})], (2, 1), 1),  # then the lowest id, in whichever order
        ("lru", [(None, {2: 1, 0: 1, 1: 1})], (1, 2), 1),
        ("mrs", [([0.5, *ZEROS[1:]], {0: 1})], (0, 7, 6), 6),
        ("mrs:p=1", [([0.5, 0.5, *ZEROS[2:]], {0: 1, 1: 1})], (0, 1), 1),  # TopP keeps the lower id
        ("mrs:p=2", [([0.2, 0.5, 0.2, 0.2, *ZEROS[4:]], {3: 1, 2: 1, 0: 1})], (0, 2, 3), 2),
        ("slru", [(None, {2: 1, 1: 1})], (2, 1), 1),
        ("s3-fifo", [], (5, 3), 3),
    ],
)
def test_between_equals(name, steps, resident, victim):
    rule = policy_rule(name)
    policy = rule.made_by(EXPERTS, 2, TOP_K, **rule.parameters)
    for scores, loads in steps:
        policy.observe(scores, loads)
    assert policy.victim(list(resident), ()) == victim


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "static"])
def test_a_miss_worth_as_much_as_the_victim_is_kept(name):
    policy = policy_class(name)(EXPERTS, 2, TOP_K)
    assert policy.value(0) == policy.value(1) and policy.admits(0, 1)


def test_lfu_with_decay_forgets():
    keeps, forgets = LFU(EXPERTS, 2, TOP_K), LFU(EXPERTS, 2, TOP_K, decay=0.5)
    for loads in [{0: 1}] * 3 + [{1: 1}] * 2:
        keeps.observe(None, loads)
        forgets.observe(None, loads)
    assert (keeps.victim({0, 1}, ()), forgets.victim({0, 1}, ())) == (1, 0)


def test_mrs_is_the_formula_of_the_paper():
    policy = MRS(EXPERTS, 4, TOP_K, alpha=0.3, p=3)
    policy.observe([0.4, 0.3, 0.15, 0.1, 0.05, 0, 0, 0], {0: 1, 1: 1})
    assert [policy.value(e) for e in range(5)] == pytest.approx([0.12, 0.09, 0.045, 0, 0])  # the fourth is cut by TopP
    policy.observe([0.0, 0.5, 0.0, 0.3, 0.2, 0, 0, 0], {1: 1, 3: 1})
    assert [policy.value(e) for e in range(5)] == pytest.approx([0.084, 0.213, 0.0315, 0.09, 0.06])
    policy.observe([0.1, 0.5, 0.2, 0.1, 0.1, 0, 0, 0], {1: 1, 2: 1})  # of three at the cut the first is kept
    assert [policy.value(e) for e in range(5)] == pytest.approx([0.0888, 0.2991, 0.08205, 0.063, 0.042])


def test_mrs_defaults_are_a_half_and_twice_top_k():
    policy = MRS(EXPERTS, 4, TOP_K)
    policy.observe([0.3, 0.25, 0.2, 0.15, 0.1, 0, 0, 0], {0: 1, 1: 1})
    assert [policy.value(e) for e in range(5)] == pytest.approx([0.15, 0.125, 0.1, 0.075, 0])
    policy = MRS(EXPERTS, 4, TOP_K, p=EXPERTS + 1)  # more than there are are all
    policy.observe([1 / EXPERTS] * EXPERTS, {0: 1, 1: 1})
    assert [policy.value(e) for e in range(EXPERTS)] == [0.5 / EXPERTS] * EXPERTS


def test_mrs_keeps_what_almost_made_it_where_lru_does_not():
    """Expert 2 is never chosen but always close behind; expert 1 was chosen once."""
    mrs, lru = MRS(EXPERTS, 2, 1), LRU(EXPERTS, 2, 1)
    for policy in (mrs, lru):
        policy.observe(one_hot(e1=0.9), {1: 1})
        for _ in range(4):
            policy.observe(one_hot(e0=0.55, e2=0.45), {0: 1})
    assert mrs.victim({1, 2}, ()) == 1
    assert lru.victim({1, 2}, ()) == 2


def test_mrs_without_scores_uses_the_shares_of_the_loads():
    policy = MRS(EXPERTS, 4, TOP_K)
    policy.observe(None, {0: 3, 5: 1})
    assert (policy.value(0), policy.value(5)) == pytest.approx((0.375, 0.125))


def test_parameters_are_written_behind_the_name():
    known = {
        "mrs:alpha=0.3,p=6": (MRS, {"alpha": 0.3, "p": 6}),
        "lru": (LRU, {}),
        "echo:window=64": (Echo, {"window": 64}),
    }
    for name, made in known.items():
        rule = policy_rule(name)
        assert (rule, rule.made_by, rule.parameters) == (name, *made)


def test_what_queues_say_an_expert_is_worth():
    """0 and 1 are old residents, 3 and 4 newcomers, 2 left; then 0, 3 and 2 are used, then 1."""
    slru, fifo = (made(EXPERTS, 4, 1, share=0.5) for made in (SLRU, S3FIFO))
    for policy in (slru, fifo):
        policy.loaded([0, 1])
        policy.moved(2, None), policy.moved(3, None), policy.moved(4, 2)
    assert [fifo.value(e) for e in range(6)] == [1, 1, 1, 0, 0, 0]  # the ghost queue remembers 2
    assert [fifo.expected(e, 0.5, 1) for e in range(6)] == [2, 2, 2, 1, 1, 1] and fifo.expected(2, 0.5, 0) == 1
    for policy in (slru, fifo):
        policy.observe(None, {0: 5}), policy.observe(None, {3: 1}), policy.observe(None, {2: 1})
    assert [fifo.value(e) for e in range(6)] == [2, 1, 1, 1, 0, 0]
    assert [slru.value(e) for e in range(6)] == [1 + 4, 0, 3, 2 + 4, 0, 0]
    assert (slru.expected(1, 0.5, 1), slru.expected(3, 0.5, 0)) == (8, 6)
    slru.observe(None, {1: 1})
    assert [slru.value(e) for e in range(4)] == [1, 4 + 5, 3, 2 + 5]  # two of four slots are protected
    slru.moved(None, 3)
    assert slru.value(3) == 2


def test_a_step_that_belady_was_not_told_of_is_refused():
    policy = Belady(EXPERTS, 4, 1, future=[[0], [1]])
    policy.observe(None, {0: 1})
    assert policy.value(1) == -2 and policy.value(0) == float("-inf")
    with pytest.raises(UserError, match="step 2 needs expert 3, which its future does not say"):
        policy.observe(None, {3: 1})
    assert [p.value(0) for p in Belady.for_layers(EXPERTS, [2, 2], 1, future=[[[0]], [[0]]])] == [-1, -1.5]


def test_random_evicts_every_resident_as_often():
    policy, victims = policy_class("random")(EXPERTS, 4, TOP_K), collections.Counter[int | None]()
    for _ in range(400):
        policy.observe(None, {0: 1})
        victims[policy.victim({1, 3, 4, 6}, {3})] += 1
    assert victims.keys() == {1, 4, 6} and min(victims.values()) > 100


@pytest.mark.parametrize(
    "name", ["mrs:alpha=1.0,p=1", "lfu:decay=1.0", "slru:share=0", "slru:share=1", "s3-fifo:share=1", "echo:window=1"]
)
def test_the_ends_of_a_range_belong_to_it(name):
    assert [policy.capacity for policy in build_policies(name, EXPERTS, [3, 0], TOP_K)] == [3, 0]


def test_static_never_evicts():
    policy = Static(EXPERTS, 2, TOP_K, frequencies=range(EXPERTS))
    for expert in range(4):
        policy.observe(None, {expert: 1})
    assert policy.victim(set(policy.initial()), ()) is None and policy.initial() == [7, 6]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MRS(8, 4, 2, alpha=0.0), "alpha 0.0"),
        (lambda: MRS(8, 4, 2, alpha=1.5), "alpha 1.5"),
        (lambda: MRS(8, 4, 2, p=0), "p 0"),
        (lambda: LFU(8, 4, 2, decay=0.0), "decay 0.0"),
        (lambda: LFU(8, 4, 2, decay=1.5), "decay 1.5"),
        (lambda: SLRU(8, 4, 2, share=-0.1), "share -0.1"),
        (lambda: S3FIFO(8, 4, 2, share=1.1), "share 1.1"),
        (lambda: SLRU(8, 4, 2, share=1.5), "share 1.5"),
        (lambda: S3FIFO(8, 4, 2, share=0.0), "share 0.0"),
        (lambda: Echo(8, 4, 2, window=0), "window 0"),
        (lambda: policy_class("fifo"), "'fifo' is unknown.*mrs, lru, lfu, .*package.module:Class"),
        (lambda: policy_class("belady"), "knows the future"),
        (lambda: policy_class("mrs:alpha=7"), "alpha 7.0 is outside"),
        (lambda: policy_class("no_such_module_here:Policy"), "importing no_such_module_here failed"),
        (lambda: policy_class("collections:Nothing"), "module collections has no Nothing"),
        (lambda: policy_class("collections:OrderedDict"), "not a class derived from"),
    ],
)
def test_bad_parameters_are_refused(build, message):
    with pytest.raises(UserError, match=message):
        build()
