"""Text as it is made: `stream_generate` yields after every token.

Stop strings are held back until they are certain.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Sequence
from typing import Any

from hybrimoe_jax.engine.request import check_stop, one_prompt, read_stop
from hybrimoe_jax.engine.stats import StepStats
from hybrimoe_jax.engine.turns import Shared
from hybrimoe_jax.errors import UserError, shown


@dataclasses.dataclass
class StreamChunk:
    """One token's worth. `text` may be empty (half a character, or the start of what may become a stop string)."""

    text: str
    token_id: int
    finish_reason: str | None
    stats: StepStats


class StopBuffer:
    """Passes text through, holding back a tail that may be the beginning of a stop string."""

    def __init__(self, stop: str | Sequence[str] | None):
        self._stop, self._held = read_stop(stop), ""

    def push(self, text: str) -> tuple[str, bool]:
        """-> (text safe to show, whether a stop string is complete)."""
        self._held += text
        found = [i for i in (self._held.find(word) for word in self._stop) if i >= 0]
        if found:
            shown, self._held = self._held[: min(found)], ""
            return shown, True
        longest = max((len(word) for word in self._stop), default=0)
        for size in range(min(longest - 1, len(self._held)), 0, -1):
            tail = self._held[-size:]
            if any(word.startswith(tail) for word in self._stop):
                shown, self._held = self._held[:-size], tail
                return shown, False
        shown, self._held = self._held, ""
        return shown, False

    def flush(self) -> str:
        shown, self._held = self._held, ""
        return shown


class ReplyText:
    """One reply's text as its tokens come, until a stop string is complete: the same rule for whoever reads it.

    Args: tokenizer: with `stream`, or `decode` alone; None gives no text.
    """

    def __init__(self, tokenizer: Any, stop: str | Sequence[str] | None):
        self._decoder: Any = None
        if tokenizer is not None:
            self._decoder = tokenizer.stream() if hasattr(tokenizer, "stream") else _Growing(tokenizer.decode)
        self._buffer = StopBuffer(stop)

    def push(self, token: int, reason: str | None) -> tuple[str, str | None]:
        """-> (text that is certain now, why the reply ends here); `reason`: why it does without stop strings."""
        text = "" if self._decoder is None or reason == "eos" else self._decoder.push(token)
        if reason is not None and self._decoder is not None:
            text += self._decoder.flush()
        text, complete = self._buffer.push(text)
        if complete:
            return text, "stop"
        return (text if reason is None else text + self._buffer.flush()), reason


class _Growing:
    """The stream of a tokenizer that has none: what each token adds to the text of all, in whole characters."""

    def __init__(self, decode: Any):
        self._decode, self._ids, self._text = decode, list[int](), ""

    def push(self, token: int) -> str:
        self._ids.append(token)
        return self._fresh(self._decode(self._ids).rstrip("\ufffd"))

    def flush(self) -> str:
        return self._fresh(self._decode(self._ids))

    def _fresh(self, text: str) -> str:
        if not text.startswith(self._text):
            return ""
        before, self._text = self._text, text
        return text[len(before) :]


def stream_generate(
    engine: Any, prompt: str | Sequence[int], *, stop: str | Sequence[str] | None = (), **options: Any
) -> Generator[StreamChunk, None, None]:
    """Yields a `StreamChunk` per new token of one prompt (text, encoded as the tokenizer does it, or token ids).

    `stop` and `options` are those of `Engine.generate`: max_new_tokens, temperature, top_k, top_p, seed. The
    end-of-sequence token gives no text. Afterwards `engine.stats` holds the run's statistics. Between two tokens the
    engine may serve other calls and streams, of any thread; a stream that is left where it is holds nobody up.
    """
    if not hasattr(engine, "steps"):
        raise UserError(f"engine: {shown(engine)} is none; `hybrimoe_jax.load` gives one")
    prompts = one_prompt(prompt, engine, "a stream is")
    words = read_stop(stop)
    check_stop(words, engine.tokenizer)
    return Shared(_chunks(engine.steps(prompts, **options), ReplyText(engine.tokenizer, words)))


def _chunks(steps, reply: ReplyText) -> Generator[StreamChunk, None, None]:
    stopped = None
    while True:
        try:
            emitted = steps.send(stopped)
        except StopIteration:
            return
        stopped = None
        for _, token in emitted.tokens:
            text, reason = reply.push(token, emitted.finished.get(0))
            stopped = [0] if reason == "stop" else None
            yield StreamChunk(text, token, reason, emitted.stats)
