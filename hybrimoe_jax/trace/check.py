"""The content checks of a routing trace: every rule is one vectorised test, and the first row that breaks any is named.

R rows, E experts, k experts per token; the arrays have passed the checks of type and shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.trace.facts import TraceFacts

LARGEST = 2**31 - 1
"""Of a step, a sequence or a position: they are kept in 32 bits."""

Rule = tuple[np.ndarray, Callable[[int], str]]


def check_rows(arrays: Mapping[str, np.ndarray], facts: TraceFacts, where: str) -> None:
    """Raises UserError naming the first bad row (its step, layer, sequence and position), and what is wrong in it."""
    for rules in (_rules, _step_rules):  # the second kind asks for rows that are sound in themselves
        first, said = None, None
        for bad, message in rules(arrays, facts):
            row = int(np.argmax(bad))
            if bad[row] and (first is None or row < first):
                first, said = row, message(row)
        if first is not None:
            place = ", ".join(f"{name} {arrays[name][first]}" for name in ("step", "layer", "sequence", "position"))
            raise UserError(f"{where}: record {first} ({place}): {said}")


def _rules(arrays: Mapping[str, np.ndarray], facts: TraceFacts) -> Iterator[Rule]:
    step, layer = arrays["step"].astype(np.int64), arrays["layer"].astype(np.int64)
    phase, ids = arrays["phase"], arrays["ids"]
    for name in ("step", "sequence", "position"):
        yield arrays[name] < 0, lambda row, name=name: f"{name} is negative"
        yield arrays[name] > LARGEST, lambda row, name=name: f"{name} is above {LARGEST}"
    yield (layer < 0) | (layer >= facts.layers), lambda row: f"layer is outside 0..{facts.layers - 1}"
    order = step * (1 + facts.layers) + layer
    yield _after(order[1:] < order[:-1]), lambda row: "comes after a later step or layer"
    yield (phase < 0) | (phase > 1), lambda row: f"phase is {phase[row]} (0 is prefill, 1 decode)"
    changed = _after((step[1:] == step[:-1]) & (phase[1:] != phase[:-1]))
    yield changed, lambda row: "its phase differs from the phase of its step"
    if "batch" in arrays:
        yield from _batch_rules(arrays["batch"].astype(np.int64), step, arrays["sequence"])
    yield (
        _repeated(order, arrays["sequence"], arrays["position"]),
        lambda row: "the same token twice in this step and layer",
    )
    outside = (ids < 0) | (ids >= facts.experts)
    yield (
        np.any(outside, axis=1),
        lambda row: f"expert id {ids[row][outside[row]][0]} is outside 0..{facts.experts - 1}",
    )
    ordered = np.sort(ids, axis=1)
    yield (ordered[:, 1:] == ordered[:, :-1]).any(axis=1), lambda row: f"an expert twice among {ids[row].tolist()}"
    if "weights" in arrays:
        weights = arrays["weights"]
        yield _unfit(weights), lambda row: f"weights {weights[row].tolist()} are not all finite and non-negative"
    for name, scores in arrays.items():
        if name != "scores" and not name.startswith("lookahead_"):
            continue
        yield _unfit(scores), lambda row, name=name: f"{name} are not all finite and non-negative"
        if name != "scores":
            distance = int(name.rpartition("_")[2])
            past = ~np.isnan(scores).all(axis=1) & (layer + distance >= facts.layers)
            yield past, lambda row, name=name: f"{name} predicts a layer past the last, {facts.layers - 1}"


def _batch_rules(batch: np.ndarray, step: np.ndarray, sequence: np.ndarray) -> Iterator[Rule]:
    yield (batch < 0) | (batch > LARGEST), lambda row: f"batch is outside 0..{LARGEST}"
    for name, column in (("step", step), ("sequence", sequence)):
        _, first, group = np.unique(column, return_index=True, return_inverse=True)
        yield batch != batch[first][group], lambda row, name=name: f"batch {batch[row]} is not that of its {name}"


def _unfit(values: np.ndarray) -> np.ndarray:
    """Rows [R] with a number that is negative or not finite; NaN throughout is no such row, but one without values."""
    unfit = np.logical_or(~np.isfinite(values), values < 0).any(axis=1)
    return np.logical_and(unfit, ~np.isnan(values).all(axis=1))


def _after(bad: np.ndarray) -> np.ndarray:
    """A test of neighbours, [R - 1], placed on the second of the two."""
    return np.concatenate([[False], bad])


def _step_rules(arrays: Mapping[str, np.ndarray], facts: TraceFacts) -> Iterator[Rule]:
    order = arrays["step"].astype(np.int64) * (1 + facts.layers) + arrays["layer"]
    yield _other_tokens(arrays, order), lambda row: "not the tokens of its step's first layer; rows are missing"


def _other_tokens(arrays: Mapping[str, np.ndarray], order: np.ndarray) -> np.ndarray:
    """First rows of the records whose tokens, by number and hash, are not those of their step's first record."""
    starts = np.append(0, np.flatnonzero(np.diff(order)) + 1)
    sizes = np.diff(np.append(starts, len(order)))
    token = arrays["sequence"].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + arrays["position"].astype(np.uint64)
    mixed = (token ^ (token >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = np.add.reduceat(mixed ^ (mixed >> np.uint64(32)), starts)
    step = arrays["step"][starts]
    leader = np.maximum.accumulate(np.where(np.append(True, np.diff(step) != 0), np.arange(len(starts)), 0))
    bad = np.zeros(len(order), bool)
    bad[starts] = (sizes != sizes[leader]) | (hashes != hashes[leader])
    return bad


def _repeated(order: np.ndarray, sequence: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Rows whose (step, layer, sequence, position) an earlier row has."""
    index = np.lexsort((position, sequence, order))
    same = np.ones(len(index) - 1, bool)
    for column in (order, sequence, position):
        same &= column[index[1:]] == column[index[:-1]]
    repeated = np.zeros(len(index), bool)
    repeated[index[1:]] = same
    return repeated
