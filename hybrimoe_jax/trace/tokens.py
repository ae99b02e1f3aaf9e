"""A trace by tokens instead of by steps: one table, and the trace as it would be if every token were a step of its own.

T tokens, L MoE layers, k experts per token. Tokens are in the order of (sequence, step, position): one sequence after
another, also where several ran in one batch.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.npz import most_bytes
from hybrimoe_jax.trace.columns import Trace
from hybrimoe_jax.trace.facts import TraceFacts

REPLAYED = "prefill, replayed token by token"


class Tokens(NamedTuple):
    """Every token's experts.

    `step`, `sequence`, `position`, `phase` are [T]; `ids` [T, L, k] is -1, `weights` [T, L, k] NaN where not recorded.
    """

    step: np.ndarray
    sequence: np.ndarray
    position: np.ndarray
    phase: np.ndarray
    ids: np.ndarray
    weights: np.ndarray | None


class Recording(NamedTuple):
    """What a predictor counts of a trace.

    `ids` [T, L, k]; `follows` [T - 1], whether each token but the first is the next one of its predecessor.
    """

    facts: TraceFacts
    ids: np.ndarray
    follows: np.ndarray


def load_recording(path: str | None) -> Recording | None:
    """The recording in a trace's file; None for None."""
    if path is None:
        return None
    from hybrimoe_jax.trace.importers import open_trace

    trace = open_trace(path)
    tokens = by_token(trace, f"trace {path}")
    return Recording(trace.facts, tokens.ids, (np.diff(tokens.sequence) == 0) & (np.diff(tokens.position) == 1))


def token_of_row(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """(number of each row's token [R], a row of each token [T])."""
    columns = (trace.sequence, trace.step, trace.position)
    order = np.lexsort(columns[::-1])
    new = np.ones(len(trace), bool)
    new[1:] = False
    for column in columns:
        new[1:] |= column[order[1:]] != column[order[:-1]]
    token = np.empty(len(trace), np.int64)
    token[order] = np.cumsum(new) - 1
    return token, order[new]


def by_token(trace: Trace, where: str = "trace") -> Tokens:
    """The table of a trace's tokens.

    UserError, beginning with `where`, where nearly all of it would be of layers that were not recorded.
    """
    token, first = token_of_row(trace)
    shape = (len(first), trace.facts.layers, trace.facts.top_k)
    if 4 * math.prod(shape) > most_bytes(4 * trace.ids.size):
        raise UserError(
            f"{where}: only {len(trace)} rows of {len(first)} tokens in {trace.facts.layers} layers; a table of its "
            "tokens would be nearly empty: give a trace with all layers"
        )
    ids = np.full(shape, -1, np.int32)
    ids[token, trace.layer] = trace.ids
    weights = None
    if trace.weights is not None:
        weights = np.full(shape, np.nan, np.float32)
        weights[token, trace.layer] = trace.weights
    step, sequence, position, phase = (
        trace.step[first],
        trace.sequence[first],
        trace.position[first],
        trace.phase[first],
    )
    return Tokens(step, sequence, position, phase, ids, weights)


def one_token_steps(trace: Trace) -> Trace:
    """The same routing with a step for every token: what decoding one sequence at a time would have asked for.

    Phases stay what they were. Where a prefill step is split, `about["replayed"]` says so: results from it are not of
    decoding.
    """
    token, first = token_of_row(trace)
    order = np.lexsort((trace.layer, token))
    split = len(np.unique(prefill := trace.step[first][trace.phase[first] == 0])) < len(prefill)
    about = {**trace.about, "replayed": REPLAYED} if split else dict(trace.about)
    return dataclasses.replace(trace.select(order), step=token[order].astype(np.int32), about=about)
