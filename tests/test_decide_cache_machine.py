"""A hypothesis state machine that treats every policy as the planner does: steps, misses kept or not, prefetches that
land in between.
"""

from __future__ import annotations

import pytest
from grids import examples
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from hybrimoe_jax.decide.cache import POLICIES, policy_class

EXPERTS, TOP_K = 7, 2
expert = st.integers(0, EXPERTS - 1)


class Cache(RuleBasedStateMachine):
    """One layer. `shadow` is told the same in the same order: a policy must decide by that alone."""

    name = "lru"

    @initialize(capacity=st.integers(0, EXPERTS), cold=st.booleans(), bypass=st.booleans())
    def start(self, capacity, cold, bypass):
        self.policy, self.shadow = (policy_class(self.name)(EXPERTS, capacity, TOP_K) for _ in range(2))
        self.capacity, self.bypass, self.needed = capacity, bypass, set()
        loaded = [] if cold and not self.policy.fixed else self.policy.initial()
        self.resident = set(loaded)
        for policy in (self.policy, self.shadow):
            policy.loaded(loaded)

    def enter(self, wanted, protected, ask):
        """Whether a slot was found for `wanted`."""
        victim = None
        if len(self.resident) >= self.capacity:
            victim = self.policy.victim(self.resident, protected) if self.resident else None
            again = self.policy.victim(set(self.resident), set(protected)) if self.resident else None
            assert victim == again, "asking changes nothing"
            assert victim is None or victim in self.resident - protected
            assert victim is not None or self.policy.fixed or not self.resident - protected
            if victim is None or (ask and self.bypass and not self.policy.admits(wanted, victim)):
                return
            self.resident.remove(victim)
        self.resident.add(wanted)
        for policy in (self.policy, self.shadow):
            policy.moved(wanted, victim)

    @rule(loads=st.dictionaries(expert, st.integers(1, 3), min_size=1, max_size=5), scored=st.booleans())
    def step(self, loads, scored):
        self.needed = set(loads)
        scores = [loads.get(e, 0) / 10 + e / 100 for e in range(EXPERTS)] if scored else None
        for policy in (self.policy, self.shadow):
            policy.observe(scores, loads)
        for wanted in loads:
            if wanted not in self.resident:
                before = self.resident & self.needed
                self.enter(wanted, self.needed, ask=True)
                assert before <= self.resident, "nothing a step needs is evicted in it"

    @rule(wanted=expert)
    def prefetch(self, wanted):
        if wanted not in self.resident:
            self.enter(wanted, self.needed, ask=False)

    @invariant()
    def sane(self):
        if hasattr(self, "policy"):
            assert len(self.resident) <= self.capacity
            for e in range(EXPERTS):
                assert float(self.policy.value(e)) == self.policy.value(e)  # a number, not NaN
                assert self.policy.expected(e, 0.1, 1) >= self.policy.expected(e, 0.0, 0)
            if self.resident:
                assert self.policy.victim(self.resident, self.needed) == self.shadow.victim(self.resident, self.needed)


@pytest.mark.parametrize("name", POLICIES)
def test_policies_as_the_planner_treats_them(name):
    machine = type("Cache", (Cache,), {"name": name})
    run_state_machine_as_test(machine, settings=settings(examples(40), stateful_step_count=25))
