"""What a trained model is worth, and what its routers do, on works that it has never seen in any edition.

Loss is in nats per BYTE, so that models with different tokenizers compare. Every id of a work is predicted once, from
at most `context` ids before it. Windows do not overlap: the first ids of each have little to go by.

Routing, per layer: the *share* of an expert is its part of all (token, expert) pairs, in units of the
uniform share 1/E. The *overlap* is the part of a token's k experts that the next token uses too.
Experts drawn independently by their shares
would overlap by chance: for k distinct experts that is sum_e q_e^2 / k, where q_e = k * share_e / E is the probability
that a token uses e.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers

from hybrimoe_jax.models.config import ModelConfig
from hybrimoe_jax.train import tokens
from hybrimoe_jax.train.corpus import Text
from hybrimoe_jax.train.loop import Params, make_forward


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Losses in nats per byte, and figures of each MoE layer.

    The least and largest expert share (uniform = 1), overlap and chance, and each expert's `load` in tokens.
    """

    loss: float
    works: dict[str, float]
    bytes: int
    tokens: int
    context: int
    least_share: list[float]
    largest_share: list[float]
    overlap: list[float]
    chance: list[float]
    load: list[list[int]]


def round_bf16(params: Params) -> Params:
    """Parameters as they are shipped: rounded to bfloat16, held in float32."""
    return jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(jnp.float32), params)


def evaluate(
    config: ModelConfig,
    params: Params,
    tokenizer: tokenizers.Tokenizer,
    works: Sequence[Text],
    context: int = 256,
    rows: int = 16,
) -> Evaluation:
    """Runs every work through the model in windows of `context` ids, `rows` windows at a time."""
    forward = make_forward(config)
    layers, count, top_k = len(config.moe_layers), config.num_experts, config.num_experts_per_tok

    @jax.jit
    def measure(params, ids, targets, valid):
        positions = jnp.where(valid, jnp.arange(context), context)
        logits, routings = forward(params, ids, positions)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        used = jnp.stack([jax.nn.one_hot(routings[i].ids, count).sum(1) for i in config.moe_layers])
        used = used.reshape(layers, rows, context, count) * valid[None, :, :, None]
        shared = jnp.sum(used[:, :, 1:] * used[:, :, :-1], axis=(1, 2, 3))
        return jnp.sum(losses * valid), used.sum((1, 2)), shared, jnp.sum(valid[:, 1:])

    empty = tokens.Window(np.zeros(context, np.int32), np.zeros(context, np.int32), np.zeros(context, bool))
    load, shared, pairs = np.zeros((layers, count)), np.zeros(layers), 0.0
    nats: dict[str, float] = {}
    predicted = 0
    for work in works:
        ids = tokens.encode(tokenizer, work)
        predicted += len(ids) - 1
        queue = tokens.windows(ids, context)
        for start in range(0, len(queue), rows):
            group = queue[start : start + rows]
            group += [empty] * (rows - len(group))
            loss, used, both, neighbours = measure(params, *(np.stack(part) for part in zip(*group)))
            nats[work.work] = nats.get(work.work, 0.0) + float(loss)
            load, shared, pairs = load + np.asarray(used), shared + np.asarray(both), pairs + float(neighbours)
    size = {work.work: len(work.text.encode()) for work in works}
    share = load / load.sum(1, keepdims=True) * count
    probability = share * top_k / count
    return Evaluation(
        loss=sum(nats.values()) / sum(size.values()),
        works={name: nats[name] / size[name] for name in nats},
        bytes=sum(size.values()),
        tokens=predicted,
        context=context,
        least_share=share.min(1).tolist(),
        largest_share=share.max(1).tolist(),
        overlap=(shared / max(pairs, 1) / top_k).tolist(),
        chance=(np.sum(probability**2, axis=1) / top_k).tolist(),
        load=load.astype(int).tolist(),
    )


def openings(texts: Sequence[Text], size: int = 4096) -> list[Text]:
    """The first `size` characters of each work: a sample of training text for expert frequencies."""
    return [dataclasses.replace(text, text=text.text[:size]) for text in texts]


def summary(result: Evaluation) -> dict[str, Any]:
    """The evaluation as one JSON-ready mapping."""
    return {
        "loss_nats_per_byte": round(result.loss, 4),
        "works": {name: round(value, 4) for name, value in result.works.items()},
        "bytes": result.bytes,
        "tokens": result.tokens,
        "context": result.context,
        "least_share": [round(v, 3) for v in result.least_share],
        "largest_share": [round(v, 3) for v in result.largest_share],
        "overlap": [round(v, 3) for v in result.overlap],
        "overlap_by_chance": [round(v, 3) for v in result.chance],
    }


def describe(values: Mapping[str, Any]) -> str:
    """A table for people of what `summary` returns."""
    lines = [
        f"held-out loss  {values['loss_nats_per_byte']:.4f} nats/byte over {values['bytes']} bytes "
        f"({', '.join(f'{k} {v:.3f}' for k, v in values['works'].items())}), windows of {values['context']}",
        "layer  least share  largest share  overlap  by chance",
    ]
    columns = zip(values["least_share"], values["largest_share"], values["overlap"], values["overlap_by_chance"])
    for layer, (least, largest, overlap, chance) in enumerate(columns):
        lines.append(f"{layer:5d}  {least:11.3f}  {largest:13.3f}  {overlap:7.3f}  {chance:9.3f}")
    return "\n".join(lines)
