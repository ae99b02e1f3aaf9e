"""Cache policies watched: victims resident and not needed, finite heat, one step a step."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, cast

from hybrimoe_jax.decide.cache.policy import CachePolicy
from hybrimoe_jax.decide.watch import Watch, listed, trusted
from hybrimoe_jax.errors import shown


class PolicyWatch(Watch):
    """One layer's policy. Every method is the contract's, see `CachePolicy`."""

    methods = ("observe", "victim", "value", "expected", "admits", "initial", "loaded", "moved")
    labels: Mapping[str, str] = {"observe": "update"}
    rule: CachePolicy

    def observe(self, scores: Sequence[float] | None, loads: Mapping[int, int]) -> None:
        """Whatever the class does in `update` or here, it leaves a finite heat for every expert."""
        policy = self.rule
        before = policy.step
        self.ask("observe", None if scores is None else list(scores), dict(loads))
        own = "observe" if type(policy).observe is not CachePolicy.observe else "update"
        if policy.step != before + 1:
            self.fault(own, f"left the step at {policy.step} after {before}; it counts them one by one (call super)")
        self._check_heat(own)

    def victim(self, resident: Iterable[int], protected: Collection[int]) -> int | None:
        here, kept = frozenset(resident), frozenset(protected)
        self._check_heat("victim")
        found = self.ask("victim", here, kept)
        if found is None:
            return None
        victim = self.expert("victim", "gave", found, self.rule.num_experts)
        if victim not in here:
            self.fault("victim", f"gave expert {victim}, which is not resident (resident: {listed(sorted(here))})")
        if victim in kept:
            self.fault("victim", f"gave expert {victim}, which must stay (needed or promised: {listed(sorted(kept))})")
        return victim

    def value(self, expert: int) -> float:
        return self.number("value", self.ask("value", expert))

    def expected(self, expert: int, score: float, load: int) -> float:
        return self.number("expected", self.ask("expected", expert, score, load))

    def admits(self, expert: int, victim: int) -> bool:
        return bool(self.ask("admits", expert, victim))

    def initial(self) -> list[int]:
        found = self.ask("initial")
        if not isinstance(found, Iterable):
            self.fault("initial", f"gave {shown(found)}, which is no list of experts")
        given = cast(Iterable[Any], found)
        experts = [self.expert("initial", "gave", expert, self.rule.num_experts) for expert in given]
        twice = [expert for i, expert in enumerate(experts) if expert in experts[:i]]
        if twice:
            self.fault("initial", f"gave expert {twice[0]} twice")
        return experts

    def loaded(self, experts: Sequence[int]) -> None:
        self.ask("loaded", list(experts))

    def moved(self, entered: int | None, left: int | None) -> None:
        self.ask("moved", entered, left)

    def _check_heat(self, method: str) -> None:
        heat, experts = self.rule.heat, self.rule.num_experts
        if len(heat) != experts:
            self.fault(method, f"left the heat of {len(heat)} experts; the layer has {experts}")
        try:
            if math.isfinite(sum(heat)):
                return
            wrong = next((expert for expert, value in enumerate(heat) if not math.isfinite(value)), None)
        except (TypeError, ValueError):
            self.fault(method, f"left a heat that is no number: {heat!r:.80}")
        if wrong is not None:
            self.fault(method, f"left expert {wrong} the heat {heat[wrong]}; heat is finite")


def watch_policies(policies: Sequence[CachePolicy], every: bool = False) -> Sequence[CachePolicy]:
    """The same objects, of all layers in order; `every`: the package's own, too."""
    for layer, policy in enumerate(policies):
        mine = trusted(policy, (*PolicyWatch.methods, "update"))
        if (every or not mine) and "_watched" not in policy.__dict__:
            PolicyWatch("cache", policy, layer)
    return policies
