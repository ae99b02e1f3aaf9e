"""Synthetic routing for models of which no per-token trace is public, with its statistics stated.

Never to be taken for a measurement.

A layer's logits are a fixed popularity plus a state that drifts from token to token: z <- a z + sqrt(1 - a^2) noise,
tokens of a sequence in a row; the k largest are chosen and the softmax of all is the score. Predictions at distance d
are the coming layer's logits with noise. The three knobs were set by hand so that neighbours share 29 to 32 % of their
experts (DeepSeek-V2-Lite's real traces: 27 to 30 %) and predictions recall 77, 73 and 72 % at distances 1 to 3; a test
measures both.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from hybrimoe_jax import arguments
from hybrimoe_jax.errors import UserError, shown
from hybrimoe_jax.machine.shapes import get_shape
from hybrimoe_jax.trace.columns import Trace
from hybrimoe_jax.trace.facts import facts_of

PREFIX = "synthetic:"
LARGEST = 100
"""Skew, and noise: far more than leaves anything to chance."""


@dataclasses.dataclass(frozen=True)
class Knobs:
    """`skew`: spread of the popularity; `stay`: a above; `noise`: of predictions at distance 1.

    It grows with the fourth root of the distance.
    """

    skew: float
    stay: float
    noise: float


KNOBS = {"mixtral-8x7b": Knobs(0.2, 0.15, 0.4), "qwen2-57b-a14b": Knobs(0.5, 0.25, 0.4)}
"""Mixtral: a flatter popularity, as its public counts have it."""


def synthetic_of(text: str) -> Trace:
    """`NAME[:skew=S,stay=S,noise=N,sequences=N,tokens=N,seed=N]`: a shape's name, and what is not as usual."""
    name, _, rest = text.partition(":")
    where, counts, knobs = f"trace {PREFIX}{text}", {}, {}
    known = [*(field.name for field in dataclasses.fields(Knobs)), "sequences", "tokens", "seed"]
    for part in rest.split(",") if rest else ():
        key, _, value = part.partition("=")
        arguments.names(where, [key], known, "parameter ")
        count = key in known[-3:]
        try:
            (counts if count else knobs)[key] = int(value) if count else float(value)
        except ValueError:
            raise UserError(f"{where}: {key}={shown(value)} is not a number") from None
    if name not in KNOBS and not {"skew", "stay"} <= knobs.keys():
        raise UserError(f"{where}: there is synthetic routing of {', '.join(KNOBS)}; of others by skew and stay only")
    if not all(0 <= knobs.get(name, 0) <= LARGEST for name in ("skew", "noise")):
        raise UserError(f"{where}: skew and noise must be at least 0 and at most {LARGEST}")
    if not 0 <= knobs.get("stay", 0) < 1 or min(counts.get("sequences", 1), counts.get("tokens", 1)) < 1:
        raise UserError(f"{where}: stay must be at least 0 and below 1, sequences and tokens at least 1")
    usual = KNOBS.get(name, Knobs(0.0, 0.0, 0.4))
    return synthetic_trace(name, **counts, knobs=dataclasses.replace(usual, **knobs))


def synthetic_trace(
    name: str, sequences: int = 6, tokens: int = 128, distances: int = 6, seed: int = 0, knobs: Knobs | None = None
) -> Trace:
    """A trace of `sequences` x `tokens` tokens for a shape, with full scores and predictions.

    Args:
      knobs: those in `KNOBS` if None.
    """
    shape, knobs = get_shape(name), knobs or KNOBS[name]
    generator = np.random.default_rng(seed)
    layers, experts, count = shape.layers, shape.experts, sequences * tokens
    logits = _logits(layers, experts, count, tokens, knobs, generator)
    scores = _softmax(2 * logits)
    ids = np.argsort(-scores, axis=2)[:, :, : shape.top_k]
    weights = np.take_along_axis(scores, ids, 2)
    weights /= weights.sum(axis=2, keepdims=True)
    lookahead = {}
    for d in range(1, distances + 1):
        ahead = np.full((count, layers, experts), np.nan, np.float32)
        wrong = knobs.noise * d**0.25 * generator.standard_normal((count, layers - d, experts))
        ahead[:, : layers - d] = _softmax(2 * (logits[:, d:] + wrong))
        lookahead[d] = ahead.reshape(-1, experts)
    rows = count * layers
    token = np.repeat(np.arange(count, dtype=np.int32), layers)
    return Trace(
        facts_of(name, layers, experts, shape.top_k, shape.hidden, shape.moe_width),
        step=token,
        layer=np.tile(np.arange(layers, dtype=np.int32), count),
        phase=np.ones(rows, np.uint8),
        sequence=token // tokens,
        position=token % tokens,
        ids=ids.reshape(rows, -1).astype(np.int32),
        weights=weights.reshape(rows, -1).astype(np.float32),
        scores=scores.reshape(rows, -1).astype(np.float32),
        lookahead=lookahead,
        about={"source": "synthetic", "model": name, **dataclasses.asdict(knobs), "seed": seed},
    )


def _logits(layers: int, experts: int, count: int, tokens: int, knobs: Knobs, generator) -> np.ndarray:
    """[count, layers, experts] of sequences of `tokens` tokens."""
    popularity = knobs.skew * generator.standard_normal((layers, experts))
    logits = np.empty((count, layers, experts))
    state = np.zeros((layers, experts))
    for token in range(count):
        noise = generator.standard_normal((layers, experts))
        fresh = token % tokens == 0
        state = noise if fresh else knobs.stay * state + np.sqrt(1 - knobs.stay**2) * noise
        logits[token] = popularity + state
    return logits


def chosen(layers: int, experts: int, top_k: int, count: int, tokens: int, knobs: Knobs, seed: int) -> np.ndarray:
    """The experts alone, [count, layers, top_k], of routing like `synthetic_trace`'s."""
    logits = _logits(layers, experts, count, tokens, knobs, np.random.default_rng(seed))
    return np.argpartition(-logits, top_k - 1, axis=2)[:, :, :top_k]


def _softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shares / shares.sum(axis=-1, keepdims=True)
