"""Policies in replay against what they are by definition: exhaustive search, sequential reference programs."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
from grids import examples
from hypothesis import example, given
from hypothesis import strategies as st
from routing_cases import random_routing, visits_of

from hybrimoe_jax.bench.cache import Visit, cache_of, replay, slots_for
from hybrimoe_jax.decide.cache import POLICIES, Belady, policy_class
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
