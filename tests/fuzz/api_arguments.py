"""Arguments of the public Python calls on one engine that is kept: `generate`, `stream_generate`, `logits`, `load`.

What stands for the reference's prompt and settings gives the reference's tokens; what is drawn is drawn alike twice.
After every call, refused or not, the next plain answer is the reference's.
"""

from __future__ import annotations

import enum
import random
from pathlib import Path
from typing import Any

import numpy as np
import tiny_checkpoint
from fuzz.mutate import ODD, brief
from fuzz.worker import Case, Wrong

TEXT = "the and"
NEW = 5
SAME = "the reference's"
DISGUISED = (np.complex64(5 + 2j), np.timedelta64(5, "ns"), np.array(True, object), np.ma.array(5, mask=True))
"""What Python turns into a number when it is asked to, and is none."""


class Word(str, enum.Enum):  # noqa: UP042 - StrEnum is the one that does no harm
    """A text whose `str` is another text."""

    E = "e"


VALUES: dict[str, tuple] = {
    "max_new_tokens": (
        np.int64(NEW),
        np.int32(NEW),
        2.5,
        None,
        "5",
        0,
        -1,
        10**9,
        True,
        [5],
        float("nan"),
        NEW,
        *DISGUISED,
    ),
    "temperature": (
        0,
        0.0,
        np.float32(0),
        0.7,
        -1,
        None,
        "hot",
        float("nan"),
        float("inf"),
        1e-310,
        1e308,
        True,
        [0],
        *DISGUISED,
    ),
    "top_k": (0, 1, 3, np.int64(3), 2.5, None, -1, "3", 10**9, 2**70, True),
    "top_p": (1, 1.0, 0.5, 0, -0.1, 1.1, None, "x", float("nan"), np.float64(0.5), 1e-310),
    "seed": (0, 1, np.int64(3), -1, 2.5, None, 2**70, "x"),
    "stop": ((), [], "", [""], "e", "###", ["###"], ["\u2603"], b"e", 5, [5], None, {"e": 1}, "a" * 10_000, Word.E),
}
EQUAL = {
    "max_new_tokens": (NEW, np.int64(NEW), np.int32(NEW)),
    "temperature": (0, 0.0),
    "top_k": (0, 1, 3, np.int64(3)),
    "top_p": (1, 1.0, 0.5, np.float64(0.5)),
    "seed": (0, 1, np.int64(3)),
    "stop": ((), [], "###", ["###"], ["\u2603"]),
}
"""Values with which the reference's greedy answer stays what it is."""
WHOLE, REAL = ("max_new_tokens", "top_k", "seed"), ("temperature", "top_p")


def never(name: str, value: Any) -> bool:
    """Whether a value of this argument can have no answer: a part of a thing, no number, text in its place."""
    if any(value is one for one in DISGUISED):
        return True
    if name in WHOLE:
        return isinstance(value, (str, bytes, list, dict)) or (isinstance(value, float) and value != value // 1)
    if name in REAL:
        return isinstance(value, (str, bytes, list, dict)) or (isinstance(value, float) and value != value)
    return name == "stop" and value in ("", [""], 5, [5], b"e")


OPTIONS = ("cache_ratio", "threads", "max_context", "max_batch", "prefill_chunk", "seed", "lookahead", "vram_budget")


class Kind:
    """A tiny converted model, loaded once."""

    def __init__(self, base: Path):
        import hybrimoe_jax

        self.folder = tiny_checkpoint.converted(base)
        options = {
            "threads": 1,
            "host_kernel": "reference",
            "max_context": 256,
            "profile": "laptop-8gb",
            "clock": "virtual",
        }
        self.options = options
        self.engine = hybrimoe_jax.load(self.folder, **options)
        self.ids = self.engine.tokenizer.encode(TEXT)
        self.reference = self.engine.generate([self.ids], max_new_tokens=NEW).token_ids[0]
        self.logits = self.engine.logits(self.ids)

    def prompts(self, rng: random.Random) -> tuple[Any, bool]:
        """A prompt, and whether it is the reference's in other clothes."""
        ids = self.ids
        same = (TEXT, [TEXT], ids, [ids], np.array(ids), [np.array(ids, np.int32)], tuple(ids), [tuple(ids)])
        other = (
            *ODD,
            [str(i) for i in ids],
            [[str(i) for i in ids]],
            np.array(ids, float),
            [[float(i) for i in ids]],
            [[[i] for i in ids]],
            [[*ids[:-1], 10**6]],
            [[*ids[:-1], -1]],
            [[*ids[:-1], 5.7]],
            [[*ids[:-1], True]],
            [ids, "text", None],
            [[]],
            ids * 1000,
            TEXT.encode(),
            bytearray(TEXT.encode()),
            memoryview(TEXT.encode()),
            np.array(ids, "timedelta64[ns]"),
            [[*ids[:-1], np.datetime64(5, "ns")]],
            Word.E,
            iter([ids]),
            {"prompt": TEXT},
            {1, 2},
            np.zeros((2, 2, 2), int),
            "\ud800",
            "\x00",
            lambda: 0,
            Path("x"),
        )
        return (rng.choice(same), True) if rng.random() < 0.5 else (rng.choice(other), False)

    def case(self, rng: random.Random, folder: Path) -> Case:
        if rng.random() < 0.15:
            name = rng.choice(OPTIONS)
            value = rng.choice((*ODD, np.int64(1), np.float32(0.5), 0.25, 64))
            given = self.options | {name: value}
            return Case(
                f"load({name}={brief(value)})", lambda: self.load(given), (name, name.replace("_", " "), "seed")
            )
        prompt, same = self.prompts(rng)
        call = rng.choice(("generate", "generate", "stream_generate", "logits", "steps"))
        arguments: dict[str, Any] = {"max_new_tokens": NEW}
        for name in rng.sample(list(VALUES), rng.choice((0, 1, 1, 2))):
            arguments[name] = rng.choice(VALUES[name] if rng.random() < 0.8 else ODD)
        said = f"{call}({brief(prompt)}, {brief(arguments)})"
        return Case(said, lambda: self.ask(call, prompt, arguments, same))

    def load(self, given: dict[str, Any]) -> None:
        import hybrimoe_jax

        with hybrimoe_jax.load(self.folder, **given) as engine:
            ids = engine.generate([self.ids], max_new_tokens=2).token_ids[0]
        if ids != self.reference[:2]:
            raise Wrong(f"{ids}, not {self.reference[:2]}")

    def ask(self, call: str, prompt: Any, arguments: dict[str, Any], same: bool) -> None:
        try:
            if call == "logits":
                found = self.engine.logits(prompt)
                if same and not np.allclose(found, self.logits, rtol=1e-3, atol=1e-3):
                    raise Wrong(f"logits differ by {np.abs(found - self.logits).max()} from the reference's")
                return
            given = {k: v for k, v in arguments.items() if k != "stop" or call != "steps"}
            found = self.tokens(call, prompt, given)
            if bad := [name for name, value in given.items() if never(name, value)]:
                raise Wrong(f"an answer with {bad[0]}={brief(given[bad[0]])}")
            known = all(
                any(v is w or (type(v) is type(w) and v == w) for w in EQUAL[k]) for k, v in given.items() if k in EQUAL
            )
            if same and known and set(given) <= set(EQUAL) and found != self.reference:
                raise Wrong(f"{found}, the reference is {self.reference}")
            if not all(isinstance(t, (int, np.integer)) and 0 <= t < self.engine.config.vocab_size for t in found):
                raise Wrong(f"tokens {brief(found)}")
            texts = [prompt] if isinstance(prompt, str) else prompt
            if isinstance(texts, list) and all(isinstance(t, str) for t in texts):
                encoded = [self.engine.tokenizer.encode(t) for t in texts]
                if found != self.tokens(call, encoded, given):
                    raise Wrong("a text is answered as something else than its tokens")
            if hasattr(prompt, "__next__"):
                return
            if found != self.tokens(call, prompt, given):
                raise Wrong("drawn with one seed, another answer the second time")
        finally:
            after = self.engine.generate([self.ids], max_new_tokens=NEW).token_ids[0]
            if after != self.reference:
                raise Wrong(f"the next plain answer is {after}, not {self.reference}")

    def tokens(self, call: str, prompt: Any, arguments: dict[str, Any]) -> list[int]:
        from hybrimoe_jax import stream_generate

        if call == "generate":
            return [t for row in self.engine.generate(prompt, **arguments).token_ids for t in row]
        if call == "stream_generate":
            return [chunk.token_id for chunk in stream_generate(self.engine, prompt, **arguments)]
        return [token for emitted in self.engine.steps(prompt, **arguments) for _, token in emitted.tokens]
