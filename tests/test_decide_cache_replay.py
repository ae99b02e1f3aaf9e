"""Policies in replay against what they are by definition: exhaustive search, sequential reference programs, a slow form
of echo.
"""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
from grids import examples
from hypothesis import example, given
from hypothesis import strategies as st

from hybrimoe_jax.bench.cache import Visit, cache_of, replay, slots_for
from hybrimoe_jax.decide.cache import POLICIES, Belady, Echo, echo, policy_class
from hybrimoe_jax.errors import UserError

EXPERTS = 5
steps = st.lists(st.sets(st.integers(0, EXPERTS - 1), min_size=1, max_size=2), max_size=7)


def one_layer(policy, needs, slots, bypass=False):
    visits = [Visit(0, sorted(experts)) for experts in needs]
    return replay([policy], visits, [cache_of([policy], slots, bypass=bypass)])[0]


def fewest_misses(needs, slots, bypass) -> int:
    """By trying every choice of what to keep.

    After a step the cache holds what it needed (unless bypassed) and any of the rest.
    """
    needs = tuple(frozenset(experts) for experts in needs)

    @functools.cache
    def best(step: int, resident: frozenset) -> int:
        if step == len(needs):
            return 0
        missed = needs[step] - resident
        pool = resident | needs[step]
        must = frozenset() if bypass else needs[step]
        kept = {must | set(some) for n in range(slots + 1) for some in itertools.combinations(pool - must, n)}
        kept = {frozenset(k) for k in kept if len(k) <= slots and (resident & needs[step]) <= k}
        return len(missed) + min(best(step + 1, k) for k in kept)

    return best(0, frozenset())


@examples(60)
@given(needs=steps, slots=st.integers(2, 4))
def test_belady_has_the_fewest_misses_there_are(needs, slots):
    found = one_layer(Belady(EXPERTS, slots, 2, future=needs), needs, slots, False)
    assert found.misses == fewest_misses(needs, slots, False)


@examples(60)
@example(needs=[{0}, {1, 3}, {0}, {3}], slots=2)  # a free slot must not go to an expert that is never used again
@given(needs=steps, slots=st.integers(2, 4))
def test_belady_with_bypass_is_never_below_the_fewest(needs, slots):
    found = one_layer(Belady(EXPERTS, slots, 2, future=needs), needs, slots, True)
    assert fewest_misses(needs, slots, True) <= found.misses <= sum(map(len, needs))
    if needs == [{0}, {1, 3}, {0}, {3}] and slots == 2:
        assert found.misses == 3


def test_belady_with_bypass_is_a_heuristic_and_near():
    needs = [{0}, {1, 2}, {0}, {1, 2}, {0, 2}]
    assert fewest_misses(needs, 2, True) == 4
    assert one_layer(Belady(EXPERTS, 2, 2, future=needs), needs, 2, True).misses == 5
    rng, above, least = np.random.default_rng(0), 0, 0
    for _ in range(150):
        needs = [set(rng.choice(EXPERTS, 2, replace=False).tolist()) for _ in range(9)]
        fewest = fewest_misses(needs, 3, True)
        above += one_layer(Belady(EXPERTS, 3, 2, future=needs), needs, 3, True).misses - fewest
        least += fewest
    assert above / least < 0.01


def random_routing(tokens: int, layers: int, experts: int, k: int, seed: int = 0):
    """[T][L] lists; skewed, with phrases that come back."""
    rng = np.random.default_rng(seed)
    phrases = [rng.random((6, layers, experts)) ** 3 for _ in range(4)]
    rows = []
    while len(rows) < tokens:
        phrase = phrases[rng.integers(len(phrases))] + 0.3 * rng.random((6, layers, experts))
        rows += [np.argsort(-step, axis=1)[:, :k].tolist() for step in phrase]
    return rows[:tokens]


def visits_of(rows):
    return [Visit(layer, ids) for step in rows for layer, ids in enumerate(step)]


def run(name, rows, experts, k, slots, *, pooled=False, **parameters):
    layers = len(rows[0])
    policies = policy_class(name).for_layers(experts, [slots] * layers, k, **parameters)
    return replay(policies, visits_of(rows), [cache_of(policies, slots, pooled=pooled)])[0]


@pytest.mark.parametrize("pooled", [False, True])
def test_no_policy_has_fewer_misses_than_belady(pooled):
    rows = random_routing(150, 3, 12, 3)
    future = [[step[layer] for step in rows] for layer in range(3)]
    best = Belady.for_layers(12, [4] * 3, 3, future=future)
    bound = replay(best, visits_of(rows), [cache_of(best, 4, pooled=pooled)])[0]
    for name, policy in POLICIES.items():
        if policy.comparable or not pooled:
            found = run(name, rows, 12, 3, 4, pooled=pooled)
            assert found.misses >= bound.misses, name
            assert found.hits + found.misses == bound.hits + bound.misses == 150 * 3 * 3
    if pooled:
        apart = Belady.for_layers(12, [4] * 3, 3, future=future)
        assert bound.misses <= replay(apart, visits_of(rows), [cache_of(apart, 4)])[0].misses, "any split is a pool too"


def test_the_best_are_told_apart_where_text_repeats_itself():
    rows = random_routing(400, 3, 12, 3)
    misses = {name: run(name, rows, 12, 3, 5).misses for name in ("random", "lru", "mrs", "echo")}
    assert misses["echo"] < 0.9 * min(misses["lru"], misses["mrs"]) and misses["mrs"] < misses["random"]


def test_pooled_lru_is_lru_over_all_experts():
    rows = random_routing(80, 3, 8, 2)
    order: dict[tuple[int, int], None] = {}  # least recent first
    misses = 0
    for step in rows:
        for layer, ids in enumerate(step):
            misses += sum((layer, e) not in order for e in ids)
            held = [key for key in order if key not in {(layer, e) for e in ids}]
            order = dict.fromkeys(held + [(layer, e) for e in sorted(ids, reverse=True)])
            while len(order) > 9:
                del order[next(iter(order))]
    assert abs(run("lru", rows, 8, 2, 3, pooled=True).misses - misses) <= 0.02 * misses  # equals break ties otherwise


def test_queues_cannot_share_slots():
    with pytest.raises(UserError, match="SLRU mean nothing in other layers"):
        run("slru", random_routing(3, 2, 8, 2), 8, 2, 3, pooled=True)


def test_caches_that_share_their_policies_decide_as_if_alone():
    rows = random_routing(120, 2, 12, 3)
    for name in ("lru", "lfru", "mrs", "random"):
        together = policy_class(name).for_layers(12, [8, 8], 3)
        found = replay(together, visits_of(rows), [cache_of(together, slots) for slots in (3, 5, 8)])
        assert [outcome.misses for outcome in found] == [run(name, rows, 12, 3, slots).misses for slots in (3, 5, 8)]
    queues = policy_class("slru").for_layers(12, [8, 8], 3)
    with pytest.raises(ValueError, match="sees residents"):
        replay(queues, [], [cache_of(queues, 3), cache_of(queues, 5)])


def test_slots_hold_a_step_at_least():
    assert [slots_for(r, 64, 6) for r in (0.01, 0.125, 0.25, 1)] == [6, 8, 16, 64]


def s3_fifo_by_the_paper(needs, slots, small_slots):
    """Misses of S3-FIFO as its paper tells it, one request at a time, in a trace where no step needs more than one
    expert.
    """
    small, main, ghost, uses, misses = [], [], [], {}, 0
    for (expert,) in needs:
        if expert in uses:
            uses[expert] = min(3, uses[expert] + 1)
            continue
        misses += 1
        while len(small) + len(main) >= slots:
            if small and (len(small) >= small_slots or not main):
                oldest = small.pop(0)
                if uses[oldest]:
                    uses[oldest] = 0
                    main.append(oldest)
                else:
                    ghost.append(oldest)
                    del uses[oldest]
            else:
                oldest = main.pop(0)
                if uses[oldest]:
                    uses[oldest] -= 1
                    main.append(oldest)
                else:
                    del uses[oldest]
        del ghost[: max(0, len(ghost) - max(1, slots - small_slots))]
        (main if expert in ghost else small).append(expert)
        if expert in ghost:
            ghost.remove(expert)
        uses[expert] = 0
    return misses


def slru_by_its_definition(needs, slots, protected_slots):
    """Misses of SLRU in such a trace: each segment by least recent use, the protected one evicted last."""
    used, probation, protected, misses = {}, set(), set(), 0
    for moment, (expert,) in enumerate(needs):
        used[expert] = moment
        if expert in probation | protected:
            probation.discard(expert)
            protected.add(expert)
            while len(protected) > protected_slots:
                oldest = min(protected, key=used.__getitem__)
                protected.remove(oldest)
                probation.add(oldest)
            continue
        misses += 1
        if len(probation) + len(protected) >= slots:
            segment = probation or protected
            segment.remove(min(segment, key=used.__getitem__))
        probation.add(expert)
    return misses


@pytest.mark.parametrize("slots", [3, 4, 6])
@pytest.mark.parametrize("share", [0.1, 0.4, 1.0])
def test_queues_are_those_of_their_papers(slots, share):
    rng, limit = np.random.default_rng(slots), int(share * slots)
    needs = [[expert] for expert in np.minimum(rng.geometric(0.2, 400), 12).tolist()]
    fifo, slru = (policy_class(name)(13, slots, 1, share=share) for name in ("s3-fifo", "slru"))
    assert one_layer(fifo, needs, slots).misses == s3_fifo_by_the_paper(needs, slots, max(1, limit))
    assert one_layer(slru, needs, slots).misses == slru_by_its_definition(needs, slots, limit)


def test_slru_keeps_what_was_used_twice():
    slru = policy_class("slru")(8, 3, 1, share=0.67)
    assert one_layer(slru, [[0], [0], [1], [1], [2], [3], [4], [0], [1]], 3) == (
        4,
        5,
        0,
    )  # 2, 3 and 4 pass through one slot


def nearest_of(likeness):
    """The steps most like this one, and 1.0; NaN where another was as like as the last of them."""
    ranked = sorted(likeness.items(), key=lambda one: -one[1])
    kept, others = ranked[: echo.NEAREST], ranked[echo.NEAREST :]
    return dict(kept), math.nan if others and kept[-1][1] - others[0][1] < 1e-6 else 1.0


def echo_by_definition(rows, num_experts, k, capacity, window):
    """Values of every expert after every visit, from the formulas alone: O(steps^2). NaN where equals are cut."""
    constant = echo.HORIZON * max(1.0, capacity / k)
    discounts = [math.exp(-h / constant) for h in range(math.ceil(3 * constant))]
    layers, values = len(rows[0]), []
    sets = [[set(ids) for ids in step] for step in rows]

    def shared(t, m, upto):
        return 0 if m < 0 else sum(len(sets[t][i] & sets[m][i]) for i in range(upto))

    for t, step in enumerate(sets):
        for layer, ids in enumerate(step):
            usual = np.zeros(num_experts)
            for scale in echo.TIME_SCALES:
                keep = 1 - 1 / scale
                weights = [keep ** (t - m) for m in range(t + 1)]
                for e in range(num_experts):
                    usual[e] += sum(w for m, w in enumerate(weights) if e in sets[m][layer]) / sum(weights)
            usual *= sum(discounts) / len(echo.TIME_SCALES)
            whole = k * (layer + 1) + k * (echo.OWN + layers * echo.PAST / (1 - echo.PAST_DECAY))
            likeness = {}
            for m in range(max(0, t - window), t):
                past = sum(
                    echo.PAST * echo.PAST_DECAY ** (d - 1) * shared(t - d, m - d, layers)
                    for d in range(1, m + 1)
                    if m - d >= max(0, t - d - window)
                )
                here = shared(t, m, layer + 1) + echo.OWN * len(ids & sets[m][layer])
                if here + past > 0:
                    likeness[m] = (here + past) / whole
            if not likeness:
                values.append(usual)
                continue
            best = max(likeness.values())
            likeness, certain = nearest_of(likeness)
            total, value = 0.0, np.zeros(num_experts)
            for m, f in likeness.items():
                if f > best - echo.CUT / echo.SHARPNESS:
                    w = math.exp(echo.SHARPNESS * (f - best))
                    total += w
                    for h, discount in enumerate(discounts[: t - m], 1):
                        value[list(sets[m + h][layer])] += w * discount
            floor = math.exp(echo.SHARPNESS * (echo.FLOOR - best))
            values.append(certain * (value + floor * usual) / (total + floor))
    return values


@pytest.mark.parametrize(
    ("num_experts", "layers", "window", "nearest"),
    [(10, 3, 200, 64), (70, 2, 200, 64), (10, 1, 8, 64), (10, 2, 1, 64), (130, 1, 200, 64), (10, 2, 200, 2)],
)
def test_echo_is_its_formula(num_experts, layers, window, nearest, monkeypatch):
    """Also beyond 64 experts, where masks take several words, and in a window that wraps around."""
    monkeypatch.setattr(echo, "NEAREST", nearest)
    rows = random_routing(60, layers, num_experts, 3)
    alone = [Echo(num_experts, 6, 3, window=window)]
    policies = alone if layers == 1 else Echo.for_layers(num_experts, [6] * layers, 3, window=window)
    expected = echo_by_definition(rows, num_experts, 3, 6, window)
    assert np.isfinite(expected).sum() > 40 * layers * num_experts
    for visit, want in zip(visits_of(rows), expected, strict=True):
        policies[visit.layer].observe(None, dict.fromkeys(visit.experts, 1))
        have = np.array([policies[visit.layer].value(e) for e in range(num_experts)])
        np.testing.assert_allclose(np.where(np.isnan(want), np.nan, have), want, rtol=3e-3, atol=3e-3)


def test_frequencies_stay_in_range_and_forget_at_their_pace():
    """Scale 2: each step weighs half of the next one. After 333 steps all are scaled down."""
    frequencies, used = echo.Frequencies(4, 2.0), {1: 330, 2: 398}
    for step in range(400):
        frequencies.add([0, *(expert for expert, last in used.items() if last == step)])
        shares = [count / frequencies.steps for count in frequencies.counts]
        known = [0.5 ** (1 + step - used[e]) if step >= used[e] else 0 for e in used]
        assert shares == pytest.approx([1, *known, 0], rel=1e-3 if step > 20 else 1)
    assert frequencies.steps < 1e100


@pytest.mark.parametrize("loads", [{}, dict.fromkeys(range(4), 1), dict.fromkeys(range(5), 1)], ids=len)
def test_echo_asks_for_what_is_usual_where_a_step_says_nothing(loads):
    """Of no expert, or of more than twice top-k; with twice top-k it looks for earlier steps like this one."""
    policies = Echo.for_layers(8, [4, 4], 2)
    for first, then in [(3, 7), (2, 6)] * 3 + [(3, 7)]:
        policies[0].observe(None, {first: 1, 0: 1})
        policies[1].observe(None, {then: 1, 1: 1})
    policies[0].observe(None, {2: 1, 0: 1})
    policies[1].observe(None, loads)
    uses = [sum(f.counts[e] / f.steps for f in policies[1]._usual) / 2 for e in range(8)]
    usual = [share * policies[1].discounts.sum() for share in uses]
    assert (policies[1].heat == pytest.approx(usual)) is (len(loads) != 4)


def test_echo_recalls_what_followed():
    """A, B, noise ..., A: what followed A before is worth more than what is frequent."""
    policy = Echo(16, 4, 2)
    for experts in ((0, 1), (2, 3), *[(8, 9)] * 3, (10, 11), (8, 9), (0, 1)):
        policy.observe(None, dict.fromkeys(experts, 1))
    assert min(policy.value(2), policy.value(3)) > 2 * policy.value(10)


def test_echo_ignores_steps_of_many_tokens():
    """A prompt activates nearly all experts: a step alike to all others, which would drown them."""
    rows = random_routing(40, 1, 12, 2)
    quiet, told = (Echo(12, 4, 2) for _ in range(2))
    for (ids,) in rows:
        quiet.observe(None, dict.fromkeys(ids, 1))
        told.observe(None, dict.fromkeys(ids, 1))
    told.observe(None, dict.fromkeys(range(12), 9))
    for policy in (quiet, told):
        for (ids,) in rows[:3]:
            policy.observe(None, dict.fromkeys(ids, 1))
    order = [sorted(range(12), key=policy.value, reverse=True)[:3] for policy in (quiet, told)]
    assert order[0] == order[1]


def test_echo_takes_the_same_work_at_every_step():
    policies = Echo.for_layers(16, [4, 4], 2, window=32)
    memory = policies[0].memory
    sizes = set()
    for visit in visits_of(random_routing(200, 2, 16, 2)):
        policies[visit.layer].observe(None, dict.fromkeys(visit.experts, 1))
        sizes.add((memory.masks.nbytes, len(memory._here), len(memory._past)))
    assert len(sizes) == 1 and policies[1].memory is memory
