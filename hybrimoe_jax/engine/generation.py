"""From prompts to tokens: chunked prefill of a ragged batch, then one token a row and step.

It ends when every row has stopped.

Rows are padded on the right; a padding token has a position past the cache's end, so it writes nothing, is routed
nowhere and nothing attends to it. A row's answer does not depend on its neighbours.
"""

from __future__ import annotations

import dataclasses
import html
import numbers
import textwrap
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np

from hybrimoe_jax import arguments
from hybrimoe_jax.engine.finite import check_logits, check_token
from hybrimoe_jax.engine.inputs import SMALLEST_SPAN, StepInput, bucket
from hybrimoe_jax.engine.sampling import Sampler, Sampling
from hybrimoe_jax.engine.stats import RunStats, StepStats
from hybrimoe_jax.engine.streaming import ReplyText
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.progress import Progress

SMALLEST_CHUNK = 16
LOGIT_ROWS = 16
"""Tokens whose logits `BaseEngine.logits` holds on the device at once."""


@dataclasses.dataclass
class Generation:
    """What `Engine.generate` returns.

    Attributes:
      token_ids: of each prompt, the new tokens.
      finish_reasons: of each prompt, why it stopped: "eos", "length", "stop" or "interrupted".
      stats: of the call.
      tokenizer: makes texts of the tokens; None where the checkpoint has none.
      stop: the strings that were to end a text.
    """

    token_ids: list[list[int]]
    finish_reasons: list[str]
    stats: RunStats
    tokenizer: Any = dataclasses.field(default=None, repr=False, compare=False)
    stop: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    @property
    def texts(self) -> list[str]:
        """Of each prompt, the new text: without the end-of-sequence token, and up to a stop string.

        UserError where the checkpoint has no tokenizer.
        """
        if self.tokenizer is None:
            raise UserError("this checkpoint has no tokenizer: the tokens are in token_ids")
        return [self._text(ids, reason) for ids, reason in zip(self.token_ids, self.finish_reasons)]

    @property
    def text(self) -> str:
        """The new text of a single prompt; UserError where there were several."""
        if len(self.token_ids) != 1:
            raise UserError(f"there are {len(self.token_ids)} texts: see texts")
        return self.texts[0]

    def _text(self, ids: list[int], reason: str) -> str:
        text = self.tokenizer.decode(ids[:-1] if reason == "eos" else ids)
        if reason == "stop":
            text = text[: min(place for word in self.stop if (place := text.find(word)) >= 0)]
        return text

    def __repr__(self) -> str:
        """One line: how many tokens, why they ended, how the first text begins."""
        rows = [f"{len(ids)} tokens ({reason})" for ids, reason in zip(self.token_ids, self.finish_reasons)]
        more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
        begins = f": {textwrap.shorten(self.texts[0], 50)!r}" if self.tokenizer and self.token_ids else ""
        return f"<Generation of {', '.join(rows[:3])}{more}{begins}>"

    def _repr_html_(self) -> str:
        shown = self.texts if self.tokenizer else [" ".join(map(str, ids)) for ids in self.token_ids]
        style = "white-space: pre-wrap; border-left: 3px solid #999; padding-left: .6em"
        texts = "".join(
            f'<div style="{style}">{html.escape(text)}</div><p>{len(ids)} tokens, {html.escape(reason)}</p>'
            for text, ids, reason in zip(shown, self.token_ids, self.finish_reasons)
        )
        return texts + f"<p>{html.escape(self.stats.in_short())}</p>"


@dataclasses.dataclass
class Emitted:
    """What one step gave: (row, token id) pairs, and the step's record.

    `finished` maps a row to its reason, "eos" or "length".
    """

    tokens: list[tuple[int, int]]
    finished: dict[int, str]
    stats: StepStats


Steps = Generator[Emitted, int | Sequence[int] | None, RunStats]
"""A run, step by step; takes the rows that are to stop, and ends with its statistics."""


def show_steps(run: Steps, progress: Progress, most_new: int) -> Steps:
    """The same run; shows how much of the prompts is read, then how many of `most_new` tokens are made."""
    read = made = 0
    stopped = None
    while True:
        try:
            emitted = run.send(stopped)
        except StopIteration as end:
            return end.value
        if emitted.stats.phase == "prefill":
            read += emitted.stats.tokens
            progress.to(read)
            made += len(emitted.tokens)
        else:
            if read:
                progress.restart("generating", most_new)
                read = 0
            made += len(emitted.tokens)
            progress.to(made)
        stopped = yield emitted


def collect(run: Steps, tokens: list[list[int]], reasons: list[str], stop: Sequence[str], tokenizer: Any) -> RunStats:
    """Runs to the end, and fills in each row's tokens and why it ended: "stop" once its text has a stop string."""
    stopped, replies = None, [ReplyText(tokenizer, stop) for _ in tokens] if stop else []
    while True:
        try:
            emitted = run.send(stopped)
        except StopIteration as end:
            return end.value
        stopped = []
        for row, token in emitted.tokens:
            tokens[row].append(token)
            reason = emitted.finished.get(row)
            if stop:
                _, reason = replies[row].push(token, reason)
            reasons[row] = reason or reasons[row]
            if reason == "stop":
                stopped.append(row)


def capacity_for(prompts, new_tokens: int, max_context: int) -> int:
    """Cache capacity: a power of two of at least 256, so that few executables serve all lengths, within max_context."""
    return min(max_context, bucket(max(map(len, prompts)) + new_tokens, SMALLEST_SPAN))


def prefill_chunks(prompts, chunk: int, capacity: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Cuts a ragged batch into (ids [B, T], positions [B, T], last [B]); T is `chunk` or a smaller power of two.

    `last[b]` is the place of row b's final prompt token in this chunk, -1 where the chunk does not hold it.
    """
    lengths = np.array([len(p) for p in prompts])
    for start in range(0, int(lengths.max()), chunk):
        width = min(chunk, bucket(int(lengths.max()) - start, min(SMALLEST_CHUNK, chunk)))
        ids = np.zeros((len(prompts), width), np.int32)
        positions = np.full((len(prompts), width), capacity, np.int32)
        last = np.full(len(prompts), -1)
        for row, prompt in enumerate(prompts):
            part = prompt[start : start + width]
            ids[row, : len(part)] = part
            positions[row, : len(part)] = np.arange(start, start + len(part))
            if start < len(prompt) <= start + width:
                last[row] = len(prompt) - 1 - start
        yield ids, positions, last


def generate_steps(
    forward: Callable[[StepInput, list], tuple[np.ndarray, list, StepStats]],
    init_cache,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    sampling: Sampling,
    eos: Sequence[int],
    chunk: int,
    max_context: int,
) -> Generator[Emitted, int | Sequence[int] | None]:
    """Yields one `Emitted` a step. A row stops after an end-of-sequence token (which it emits) or `new_tokens`.

    The consumer may stop a row early by sending its number, or a list of them (stop strings).
    """
    batch = len(prompts)
    capacity = capacity_for(prompts, new_tokens, max_context)
    caches = init_cache(batch, capacity)
    sampler = Sampler(sampling, batch)
    lengths = np.array([len(p) for p in prompts])
    made = np.zeros(batch, int)
    live = np.ones(batch, bool)
    next_ids = np.zeros(batch, np.int32)
    ends, greedy = frozenset(eos), sampling.temperature == 0

    def choose(result: np.ndarray, rows) -> tuple[list, dict]:
        """From logits [B, V], or the tokens [B] themselves."""
        tokens, finished = [], {}
        for row in rows:
            token = check_token(int(result[row])) if result.ndim == 1 else sampler(row, check_logits(result[row]))
            next_ids[row] = token
            made[row] += 1
            tokens.append((row, token))
            if token in ends:
                finished[row] = "eos"
            elif made[row] == new_tokens:
                finished[row] = "length"
        live[list(finished)] = False
        return tokens, finished

    def hand_over(emitted: Emitted):
        stopped = yield emitted
        for row in () if stopped is None else arguments.several("rows", stopped, numbers.Integral):
            live[arguments.whole("row", row, 0, batch - 1)] = False

    for ids, positions, last in prefill_chunks(prompts, chunk, capacity):
        step = StepInput(ids, positions, capacity, "prefill", np.maximum(last, 0), greedy=greedy, checked=True)
        result, caches, stats = forward(step, caches)
        rows = np.flatnonzero(last >= 0).tolist()
        tokens, finished = choose(result, rows)
        yield from hand_over(Emitted(tokens, finished, stats))
    while live.any():
        positions = np.where(live, lengths + made - 1, capacity).astype(np.int32)[:, None]
        follow = new_tokens - int(made[live].min()) - 1 if greedy else None
        last = np.zeros(batch, np.int64)
        step = StepInput(next_ids[:, None].copy(), positions, capacity, "decode", last, follow, tuple(eos), greedy)
        step.checked = True
        result, caches, stats = forward(step, caches)
        tokens, finished = choose(result, np.flatnonzero(live).tolist())
        yield from hand_over(Emitted(tokens, finished, stats))
