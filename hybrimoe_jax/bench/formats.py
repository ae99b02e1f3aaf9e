"""What a weight format costs: size, error of the logits, and perplexity, with and without calibration.

One model (the bundled one by default) reads one text that it was not trained on, in windows of 256 tokens, once for
each format: its routed experts rounded to the format and, where the format says so, their inputs too; everything
else stays as it is. Compared with float32:

    rms, max    difference of the logits, over the float32 logits' root mean square; all tokens, all the vocabulary
    KL          mean over tokens of the next-token distribution's divergence from float32's, in nats: less noisy
    perplexity  exp(nats per token), and its change, with the standard error over windows

Held-out text: scenes of *Macbeth*, *Twelfth Night* and *Henry V*; calibration text: scenes of twelve plays of the
training text. Both in `assets/text`, in the public domain.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hybrimoe_jax.checkpoint.calibrate import calibrated, windows
from hybrimoe_jax.checkpoint.hugging_face import from_arrays
from hybrimoe_jax.checkpoint.reader import open_checkpoint
from hybrimoe_jax.checkpoint.weights import Experts, PackedExperts, Weights
from hybrimoe_jax.encoding import read_text
from hybrimoe_jax.engine.load import bundled_model
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.layout import check_format
from hybrimoe_jax.formats.packing import ExpertLayout, Format, dequantise, pack_expert
from hybrimoe_jax.models.config import ModelConfig
from hybrimoe_jax.models.packed import rounded_activations
from hybrimoe_jax.train.export import read_model
from hybrimoe_jax.train.loop import Params, make_forward

TEXTS = Path(__file__).parent.parent / "assets" / "text"
DEFAULT = (
    "f32",
    "bf16",
    "int8-g32",
    "int8-g64",
    "int8-g64-a8",
    "int4-g32",
    "int4-g64",
    "int4z-g64",
    "int4-g64-a8",
)
BARS = {8: 0.001, 4: 0.02}
"""Largest change of perplexity, as a share, by bits."""
CONTEXT, ROWS = 256, 16


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured, and on what.

    `model`: a converted checkpoint (None: the bundled one); `text` is read, `calibration` calibrates (None: the files
    shipped); `calibrate`: also measure every 4-bit format rounded with calibration.
    """

    formats: tuple[str, ...] = DEFAULT
    calibrate: bool = True
    model: Path | None = None
    text: Path | None = None
    calibration: Path | None = None


@dataclasses.dataclass(frozen=True)
class Reading:
    """A model's losses in nats [W, T] and its logits [W, T, V] on the text."""

    losses: np.ndarray
    logits: np.ndarray


def run(options: Options, progress: Callable) -> dict[str, Any]:
    """Measures, prints a table and returns the record.

    Raises UserError for a text too short and for a format that is not known.
    """
    for name in options.formats:
        check_format(name)
    folder = options.model or bundled_model()
    text = read_text(options.text or TEXTS / "held-out.txt")
    calibration = read_text(options.calibration or TEXTS / "calibration.txt") if options.calibrate else ""
    config, params, tokenizer = read_model(folder)
    ids = tokenizer.encode(text).ids
    count = (len(ids) - 1) // CONTEXT
    if count < 1:
        raise UserError(f"the text has {len(ids)} tokens; give one of at least {CONTEXT + 1}")
    weights = as_weights(open_checkpoint(folder).raw_config, config, params)
    sample = None
    runs = [(name, False) for name in options.formats]
    if options.calibrate:
        own = tokenizer.encode(calibration).ids
        sample = windows(own, config.max_position_embeddings)
        runs += [(name, True) for name in options.formats if name.startswith("int4")]
    exact = read(config, params, ids, count, None)
    rows = []
    for name, with_text in progress(runs, len(runs), "measuring"):
        began = time.perf_counter()
        changed = rounded(weights, params, name, sample if with_text else None)
        seconds = time.perf_counter() - began
        reading = read(config, changed, ids, count, None if name in ("f32", "bf16") else Format.parse(name))
        rows.append(
            {
                "format": name,
                "calibrated": with_text,
                **size(config, name),
                **compare(exact, reading),
                "rounding_s": round(seconds, 2),
            }
        )
    spent = len(tokenizer.decode(ids[1 : count * CONTEXT + 1]).encode())
    record = {
        "model": folder.name,
        "tokens": count * CONTEXT,
        "bytes": spent,
        "context": CONTEXT,
        "calibration_tokens": 0 if sample is None else sample.size,
        "nats_per_byte_f32": round(float(exact.losses.sum()) / spent, 5),
        "formats": rows,
        "bars": {name: met(rows, bits) for name, bits in (("int8 within 0.1 %", 8), ("int4 within 2 %", 4))},
    }
    print(table(record))
    return record


def as_weights(raw: dict[str, Any], config: ModelConfig, params: Params) -> Weights:
    """The model in memory as the shards that a conversion walks over."""
    layers = [params["experts"][str(i)] for i in config.moe_layers]
    stacks = [(np.asarray(layer["gate_up"]), np.asarray(layer["down"])) for layer in layers]
    return from_arrays(raw, {name: np.asarray(leaf) for name, leaf in params["dense"].items()}, stacks)


def rounded(weights: Weights, params: Params, name: str, sample: np.ndarray | None) -> Params:
    """The parameters with routed experts rounded to a format.

    Where windows `sample` are given, they are rounded by what they do on these.
    """
    if name == "f32":
        return params
    if name == "bf16":
        narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(jnp.float32), params["experts"])
        return {**params, "experts": narrow}
    format = Format.parse(name)
    if sample is not None:
        weights = calibrated(weights, format, sample)
    experts = {}
    for shard in weights.shards:
        if shard.experts is None:
            continue
        triples = [values(shard.experts, e, format) for e in range(shard.experts.count)]
        experts[str(shard.layer)] = {
            "gate_up": jnp.asarray(np.stack([np.concatenate(t[:2]) for t in triples])),
            "down": jnp.asarray(np.stack([t[2] for t in triples])),
        }
    return {**params, "experts": experts}


def values(experts: Experts, expert: int, format: Format) -> tuple[np.ndarray, ...]:
    """What a rounded expert's codes stand for: gate [F, D], up [F, D], down [D, F]."""
    if isinstance(experts, PackedExperts):
        return experts.read(expert)
    gate, up, down = (np.asarray(m, np.float32) for m in experts.read(expert))
    return tuple(map(dequantise, pack_expert(gate, up, down, format).matrices))


def read(config: ModelConfig, params: Params, ids: Sequence[int], count: int, format: Format | None) -> Reading:
    """Runs `count` windows of the text, each from its own window only."""

    def seen(rows: jax.Array) -> jax.Array:
        return rounded_activations(rows, format) if format is not None and format.a8 else rows

    forward = make_forward(config, seen=seen)

    @jax.jit
    def measure(params, inputs, targets):
        logits, _ = forward(params, inputs, jnp.broadcast_to(jnp.arange(CONTEXT), inputs.shape))
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets), logits

    text = np.asarray(ids[: count * CONTEXT + 1], np.int32)
    inputs, targets = text[:-1].reshape(count, CONTEXT), text[1:].reshape(count, CONTEXT)
    losses, logits = [], []
    for start in range(0, count, ROWS):
        part = [a[start : start + ROWS] for a in (inputs, targets)]
        filled = len(part[0])
        part = [np.pad(a, ((0, ROWS - filled), (0, 0))) for a in part]  # one shape, one compilation
        loss, logit = measure(params, *part)
        losses.append(np.asarray(loss)[:filled])
        logits.append(np.asarray(logit)[:filled])
    return Reading(np.concatenate(losses), np.concatenate(logits))


@jax.jit
def _differences(exact, other):
    """Logits [T, V] of one window -> sums of squares and differences.

    They are the sum of squares of one, of the difference, its maximum, and the summed divergence.
    """
    error = other - exact
    p, q = jax.nn.log_softmax(exact), jax.nn.log_softmax(other)
    return jnp.sum(exact**2), jnp.sum(error**2), jnp.max(jnp.abs(error)), jnp.sum(jnp.exp(p) * (p - q))


def compare(exact: Reading, other: Reading) -> dict[str, float]:
    """How far a reading lies from the float32 one; see the module's text."""
    parts = np.array([_differences(a, b) for a, b in zip(exact.logits, other.logits, strict=True)], np.float64)
    scale = math.sqrt(parts[:, 0].sum() / exact.logits.size)
    change = (other.losses - exact.losses).mean(axis=1)
    error = change.std(ddof=1) / math.sqrt(len(change)) if len(change) > 1 else math.nan
    return {
        "logits_rms": float(math.sqrt(parts[:, 1].sum() / exact.logits.size) / scale),
        "logits_max": float(parts[:, 2].max() / scale),
        "kl": float(parts[:, 3].sum() / exact.losses.size),
        "perplexity": float(math.exp(other.losses.mean())),
        "change": float(math.expm1(change.mean())),
        "change_error": float(error),
    }


def size(config: ModelConfig, name: str) -> dict[str, float]:
    """Bytes of a routed expert, and bits for each of its weights, scales and padding included."""
    weights = 3 * config.hidden_size * config.moe_width
    if name in ("f32", "bf16"):
        nbytes = weights * (4 if name == "f32" else 2)
    else:
        nbytes = ExpertLayout(Format.parse(name), config.hidden_size, config.moe_width).nbytes
    return {"expert_bytes": nbytes, "bits_per_weight": round(8 * nbytes / weights, 3)}


def met(rows: list[dict[str, Any]], bits: int) -> bool | None:
    """Whether every format of so many bits keeps within its bar; None where none was measured."""
    changes = [row["change"] for row in rows if row["format"].startswith(f"int{bits}")]
    return all(abs(change) <= BARS[bits] for change in changes) if changes else None


def table(record: dict[str, Any]) -> str:
    """For people."""
    lines = [
        f"{record['model']}: {record['tokens']} tokens ({record['bytes']} bytes) in windows of {record['context']}; "
        f"float32 {record['nats_per_byte_f32']:.4f} nats per byte",
        "format           calibrated  expert kB  bits/weight  logits rms      max      KL  perplexity     "
        "change   +-      rounding s",
    ]
    for row in record["formats"]:
        lines.append(
            f"{row['format']:15s}  {'yes' if row['calibrated'] else '':10s}  {row['expert_bytes'] / 1e3:9.1f}  "
            f"{row['bits_per_weight']:11.2f}  {row['logits_rms']:10.5f}  {row['logits_max']:7.4f}  {row['kl']:6.4f}  "
            f"{row['perplexity']:10.4f}  {100 * row['change']:+8.3f} %  {100 * row['change_error']:5.3f}  "
            f"{row['rounding_s']:10.1f}"
        )
    marks = {True: "met", False: "MISSED", None: "not measured"}
    lines.append("bars: " + ", ".join(f"{name} {marks[value]}" for name, value in record["bars"].items()))
    return "\n".join(lines)
