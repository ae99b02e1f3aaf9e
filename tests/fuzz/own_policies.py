"""Cache policies, schedulers and predictors: names with parameters, and classes that break their contract at random.

The reference is the answer of the dense model: a policy is refused, or it changes nothing in the tokens; in a replay
every activated expert is a hit or a miss, whatever the policy does.
"""

from __future__ import annotations

import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import own_rules
import tiny
from fuzz.mutate import ODD, WORDS, brief
from fuzz.trace_files import small
from fuzz.worker import Case, Wrong

NAMES = {
    "cache": (
        "lru",
        "lfu",
        "mrs",
        "arc",
        "slru",
        "belady",
        "echo",
        "own_rules:Fading",
        "json:JSONDecoder",
        "os:system",
    ),
    "scheduler": (
        "hybrid",
        "paper",
        "optimal",
        "greedy",
        "own_rules:Half",
        "own_rules:Popular",
        "json:loads",
        "no.module:X",
    ),
    "predictor": (
        "router-reuse",
        "co-activation",
        "corrected",
        "previous",
        "own_rules:Popular",
        "own_rules:Fading",
        "recorded:x",
    ),
}
PARAMETERS = (
    *("alpha", "p", "decay", "share", "window", "seed", "nodes", "rate", "smoothing", "learn"),
    *("step", "num_experts", "capacity", "x", ""),
)
PARAMETER_VALUES = (
    "0.3",
    "nan",
    "inf",
    "-1",
    "1e308",
    "6",
    "",
    "x",
    "...",
    "[1]",
    "None",
    "true",
    "9" * 5000,
    "1e999",
    "\x1b[2J",
)
METHODS = {
    own_rules.Fading: ("update", "victim", "initial", "observe", "value"),
    own_rules.Half: ("schedule",),
    own_rules.Popular: ("predict",),
}
PARTS = {own_rules.Fading: "cache", own_rules.Half: "scheduler", own_rules.Popular: "predictor"}
RAISED = (
    ValueError("x"),
    KeyError(5),
    RecursionError(),
    ZeroDivisionError(),
    StopIteration(),
    AssertionError(),
    MemoryError(),
)


def broken(rng: random.Random) -> tuple[str, type, str]:
    """A class one of whose methods returns something odd, raises, or meddles with its arguments, from some call on."""
    base = rng.choice(list(METHODS))
    method = rng.choice([m for m in METHODS[base] if hasattr(base, m)])
    how, first = rng.choice(("returns", "returns", "raises", "meddles")), rng.randrange(6)
    value, error, original = rng.choice((*ODD[:60], -1, 99, {0: 1}, [0, 0])), rng.choice(RAISED), getattr(base, method)
    calls = iter(range(10**9))

    def method_of(self, *args: Any, **more: Any) -> Any:
        if next(calls) < first:
            return original(self, *args, **more)
        if how == "raises":
            raise type(error)(*error.args)  # a new one: a traceback would keep every engine that it went through
        if how == "meddles":
            for argument in args:
                for name in ("clear", "pop"):
                    if hasattr(argument, name) and len(argument):
                        getattr(argument, name)()
                        break
            return original(self, *args, **more)
        return value

    signature = __import__("inspect").signature(original)
    method_of.__signature__ = signature  # type: ignore[attr-defined]
    made = type(f"Broken{base.__name__}", (base,), {method: method_of})
    told = {"returns": brief(value), "raises": repr(error), "meddles": "its arguments"}[how]
    return PARTS[base], made, f"{base.__name__}.{method} {how} {told} from call {first} on"


class Kind:
    """A trace to replay, and a tiny engine for each policy."""

    def __init__(self, base: Path):
        from hybrimoe_jax.trace.file import save_trace

        save_trace(small(6, 32, 4), base / "trace.npz")
        self.trace, self.activated = str(base / "trace.npz"), None
        self.activated = self.replayed({})
        self.prompt = tiny.prompts(tiny.weights("qwen2_moe")[0], (5,))
        with tiny.engine(executor="dense", max_context=64) as engine:
            self.reference = engine.generate(self.prompt, max_new_tokens=4).token_ids
        self.answered({})
        self.answered_by_torch({})

    def case(self, rng: random.Random, folder: Path) -> Case:
        run = rng.choice((self.replayed,) * 6 + (self.answered,) * 2 + (self.answered_by_torch,) * 2)
        if rng.random() < 0.5:
            part, rule, what = broken(rng)
        else:
            part = rng.choice(list(NAMES))
            name = rng.choice((*NAMES[part], *NAMES[rng.choice(list(NAMES))], *WORDS[:12]))
            some = rng.sample(PARAMETERS, rng.choice((0, 1, 1, 2)))
            said = ",".join(f"{key}={rng.choice(PARAMETER_VALUES)}" for key in some)
            rule = rng.choice((f"{name}:{said}", f"{name}:{said}", name, rng.choice(ODD)))
            what = f"{part}={brief(rule)}"
        return Case(f"{run.__name__}: {what}", lambda: run({part: rule}))

    def replayed(self, parts: dict[str, Any]) -> int:
        """Activated experts of a replay: hits and misses together."""
        from hybrimoe_jax.simulate.runs import replay

        found = replay(self.trace, machine="laptop-8gb", ratios=[0.3], starts=["cold"], shape="bundled", **parts)
        (record,) = found.records
        count = record["hits"] + record["misses"]
        if self.activated is not None and count != self.activated:
            raise Wrong(f"{count} activated experts are counted, there are {self.activated}")
        return count

    def answered(self, parts: dict[str, Any]) -> None:
        """Tokens of an engine with this policy."""
        with tiny.engine(max_context=64, cache_ratio=0.5, debug=True, **parts) as engine:
            self.check(engine)

    def answered_by_torch(self, parts: dict[str, Any]) -> None:
        """The same of the PyTorch engine, where there is one."""
        if find_spec("torch") is None:
            return self.answered(parts)
        from torch_models import offload

        with offload("qwen2_moe", max_context=64, cache_ratio=0.5, debug=True, **parts) as engine:
            self.check(engine)

    def check(self, engine: Any) -> None:
        found = engine.generate(self.prompt, max_new_tokens=4).token_ids
        if found != self.reference:
            raise Wrong(f"tokens {found}, the dense model's are {self.reference}")
