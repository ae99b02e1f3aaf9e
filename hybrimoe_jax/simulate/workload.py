"""A routing trace as the steps that a planner is asked to plan.

Three ways to read one: as it was recorded (what a live run did); token by token (decoding one sequence after another;
where the rows are a prompt's they are "prefill, replayed token by token"); and as prompts (n consecutive tokens in one
step). A layer that a trace lacks for a step is left out. What it lacks is not made up: without full scores the selected
experts' weights stand in, all others being zero (MRS with p = k), and without weights there are none.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from hybrimoe_jax.decide.prefetch.prediction import RouterOutlook
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.trace.columns import Trace
from hybrimoe_jax.trace.tokens import one_token_steps


class Asked(NamedTuple):
    """One MoE layer of one step: tokens per expert, mean scores (or None), and what a predictor may see, row by row."""

    layer: int
    loads: dict[int, int]
    scores: Sequence[float] | None
    shown: RouterOutlook


class Step(NamedTuple):
    """One forward pass: `tokens` in it, `context` places to attend to, the `sequence` its first token belongs to."""

    phase: str
    tokens: int
    context: int
    sequence: int
    layers: Sequence[Asked]


def recorded_steps(trace: Trace) -> Iterator[Step]:
    """The steps that ran, in order."""
    for _, group in itertools.groupby(trace.records(), key=lambda record: record.step):
        records = list(group)
        first, layers = records[0], []
        for record in records:
            ahead = [record.lookahead[d] for d in range(1, 1 + len(record.lookahead)) if d in record.lookahead]
            layers.append(_asked(record.layer, record.ids, record.scores, record.weights, ahead, trace.facts.experts))
        context = int(first.position.max()) + 1
        yield Step(first.phase, len(first.ids), context, int(first.sequence[0]), layers)


def _asked(layer: int, ids: np.ndarray, scores, weights, ahead, experts: int) -> Asked:
    """What rows of tokens ask of a layer, as the live engine counts it."""
    if len(ids) == 1:
        loads = dict.fromkeys(ids[0].tolist(), 1)
        return Asked(layer, loads, _mean_scores(ids, scores, weights, experts), RouterOutlook(ids, scores, ahead))
    counts = np.bincount(ids.ravel(), minlength=experts)
    loads = {expert: int(counts[expert]) for expert in np.flatnonzero(counts).tolist()}
    return Asked(layer, loads, _mean_scores(ids, scores, weights, experts), RouterOutlook(ids, scores, ahead))


def _mean_scores(ids: np.ndarray, scores, weights, experts: int) -> list[float] | None:
    if scores is not None:
        return (scores[0] if len(scores) == 1 else scores.mean(axis=0)).tolist()
    if weights is None or np.isnan(weights).any():
        return None
    return (np.bincount(ids.ravel(), weights.ravel(), minlength=experts) / len(ids)).tolist()


class TokenSteps:
    """A trace token by token; `steps` may be asked for any sequences, as often as wanted.

    Attributes: `sequences`: their numbers, in order; `phase`: what the results are called.
    """

    def __init__(self, trace: Trace):
        tokens = one_token_steps(trace)
        self.facts = trace.facts
        if not len(tokens):
            raise UserError("the trace holds no tokens")
        phases = np.unique(trace.phase)
        self.phase = "prefill, replayed token by token" if 1 not in phases else "decode"
        if len(phases) == 2:  # a live run: what it decoded counts, its prompt is context
            tokens = tokens.select(tokens.phase == 1)
        self._tokens = tokens
        starts = np.flatnonzero(np.diff(tokens.step, prepend=-1))
        self._starts: list[int] = [*starts.tolist(), len(tokens)]
        self._sequence = tokens.sequence[starts]
        self._ids, self._layer = tokens.ids.tolist(), tokens.layer.tolist()
        self._weights = None if tokens.weights is None else tokens.weights.tolist()
        self.has_scores, self.has_lookahead = tokens.scores is not None, bool(tokens.lookahead)
        self._position = tokens.position[starts].tolist()
        self.sequences = list(dict.fromkeys(self._sequence.tolist()))
        seen = dict.fromkeys(self.sequences, 0)
        self._rank = np.zeros(len(self._sequence), np.int64)  # which of its sequence's tokens each one is
        for number, sequence in enumerate(self._sequence.tolist()):
            self._rank[number] = seen[sequence]
            seen[sequence] += 1

    def __len__(self) -> int:
        return len(self._sequence)

    def frequencies(self, sequences: Sequence[int]) -> list[list[int]]:
        """[layer][expert]: how often each expert was chosen in these sequences."""
        facts, tokens = self.facts, self._tokens
        rows = np.isin(tokens.sequence, sequences)
        flat = (tokens.layer[rows, None].astype(np.int64) * facts.experts + tokens.ids[rows]).ravel()
        return np.bincount(flat, minlength=facts.layers * facts.experts).reshape(facts.layers, -1).tolist()

    def count(self, sequences: Sequence[int]) -> int:
        """Steps of these sequences."""
        return int(np.isin(self._sequence, sequences).sum())

    def steps(self, sequences: Sequence[int], most: int | None = None, each: int | None = None) -> Iterator[Step]:
        """One step a token, sequence by sequence; the first `each` of every sequence, the first `most` of all."""
        chosen = np.isin(self._sequence, sequences)
        if each is not None:
            chosen &= self._rank < each
        for number in np.flatnonzero(chosen)[:most].tolist():
            start, stop = self._starts[number], self._starts[number + 1]
            layers = [self._asked_row(row) for row in range(start, stop)]
            yield Step("decode", 1, self._position[number] + 1, int(self._sequence[number]), layers)

    def _asked_row(self, row: int) -> Asked:
        tokens, ids = self._tokens, self._ids[row]
        shown = None if tokens.scores is None or np.isnan(tokens.scores[row, 0]) else tokens.scores[row : row + 1]
        if shown is not None:
            scores = shown[0].tolist()
        elif self._weights is not None:
            scores = [0.0] * self.facts.experts
            for expert, weight in zip(ids, self._weights[row]):
                scores[expert] = weight
        else:
            scores = None
        ahead = []
        for distance in sorted(tokens.lookahead):
            predicted = tokens.lookahead[distance][row]
            if np.isnan(predicted[0]):
                break
            ahead.append(predicted[None])
        outlook = RouterOutlook(tokens.ids[row : row + 1], shown, ahead)
        return Asked(self._layer[row], dict.fromkeys(ids, 1), scores, outlook)

    def prompts(self, sequences: Sequence[int], length: int, most: int) -> list[Step]:
        """Up to `most` windows of `length` consecutive tokens, spread evenly, each one step.

        A window that does not fit a sequence runs on into the next.
        """
        chosen = np.flatnonzero(np.isin(self._sequence, sequences))
        count = len(chosen) // length
        places = np.unique(np.linspace(0, count - 1, min(most, count)).astype(int)) if count else []
        return [self._window(chosen[i * length : (i + 1) * length]) for i in places]

    def _window(self, numbers: np.ndarray) -> Step:
        tokens = self._tokens
        rows = np.concatenate([np.arange(self._starts[n], self._starts[n + 1]) for n in numbers.tolist()])
        layers = []
        for layer in range(self.facts.layers):
            mine = rows[tokens.layer[rows] == layer]
            if len(mine):
                ids = tokens.ids[mine]
                scores = None if tokens.scores is None else tokens.scores[mine]
                weights = None if tokens.weights is None else tokens.weights[mine]
                ahead = [a[mine] for _, a in sorted(tokens.lookahead.items()) if not np.isnan(a[mine]).any()]
                if scores is not None and np.isnan(scores).any():
                    scores = None
                layers.append(_asked(layer, ids, scores, weights, ahead, self.facts.experts))
        return Step("prefill", len(numbers), len(numbers), int(self._sequence[numbers[0]]), layers)
