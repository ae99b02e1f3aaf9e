"""Watching rules from outside: what every contract's checks have in common.

A rule that is wrong would change what a run computes, or how long it seems to take, without a word. So rules that are
not the package's are watched wherever they run: what they are given cannot be changed by them, and what they answer is
checked. The package's own are proven by tests instead (`tests/test_decide_check.py`), which costs a run nothing.

The object stays what it is. Its methods are replaced, on the object, by ones that ask the class's and look at the
answer.
"""

from __future__ import annotations

import math
import operator
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NoReturn, cast

from hybrimoe_jax.errors import RuleError, UserError, said, shown

MOST_SHOWN = 8


def trusted(rule: Any, methods: Iterable[str]) -> bool:
    """Whether a rule's class and all its methods are the package's own."""
    own: Any = cast(Any, type(rule))
    parts: list[Any] = [own, *(getattr(own, method) for method in methods)]
    return all(getattr(part, "__module__", "").startswith("hybrimoe_jax.") for part in parts)


class Watch:
    """Asks one rule's methods and says what is wrong with an answer.

    Args: what: "cache", "scheduler" or "predictor". layer: of a cache policy.
    """

    methods: tuple[str, ...] = ()
    labels: Mapping[str, str] = {}
    """What messages call a method that a class rarely has of its own."""

    def __init__(self, what: str, rule: Any, layer: int | None = None):
        self.rule, self.layer = rule, layer
        self.name = f"{what} {type(rule).__module__}:{type(rule).__qualname__}"
        self._asked: dict[str, Callable[..., Any]] = {method: getattr(rule, method) for method in self.methods}
        for method in self.methods:
            setattr(rule, method, getattr(self, method))
        self.calls: dict[str, int] = {}
        rule.__dict__["_watched"] = self.counts  # a method, which no file of the rule's state holds

    def counts(self) -> Mapping[str, int]:
        """How often each method was asked."""
        return self.calls

    def ask(self, method: str, *arguments: Any) -> Any:
        """The rule's own answer; what its code does wrong becomes a `RuleError` that says where."""
        self.calls[method] = self.calls.get(method, 0) + 1
        try:
            return self._asked[method](*arguments)
        except UserError:
            raise
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            text = f"raised {said(error)} ({frame.filename}:{frame.lineno})"
            raise RuleError(self.name, self.labels.get(method, method), text, self.layer) from error

    def fault(self, method: str, broken: str, layer: int | None = None) -> NoReturn:
        raise RuleError(self.name, method, broken, self.layer if layer is None else layer)

    def expert(self, method: str, what: str, value: Any, num_experts: int, layer: int | None = None) -> int:
        """An expert's number as a plain int."""
        expert = value if type(value) is int else self.whole(method, what, value, layer)
        if not 0 <= expert < num_experts:
            self.fault(method, f"{what} expert {shown(expert)}; experts are 0..{num_experts - 1}", layer)
        return expert

    def whole(self, method: str, what: str, value: Any, layer: int | None = None) -> int:
        """A whole number, NumPy's too, as a plain int."""
        try:
            return operator.index(value)
        except TypeError:
            self.fault(method, f"{what} {shown(value)}, which is no whole number", layer)

    def number(self, method: str, value: Any) -> Any:
        """A finite number, as it is."""
        try:
            finite = math.isfinite(value)
        except (TypeError, ValueError, OverflowError):
            self.fault(method, f"gave {shown(value)}, which is no number")
        if not finite:
            self.fault(method, f"gave {shown(value)}, which is not finite")
        return value


def listed(experts: Collection[int]) -> str:
    """Experts for a message, in order as far as they go."""
    some = list(experts)
    text = ", ".join(map(str, some[:MOST_SHOWN]))
    return (text or "none") + (f" and {len(some) - MOST_SHOWN} more" if len(some) > MOST_SHOWN else "")
