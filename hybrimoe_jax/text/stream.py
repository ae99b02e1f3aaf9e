"""Text as its tokens come: no character is split, and the pieces are what all tokens together decode to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"  # what a decoder gives for bytes that are not (yet) UTF-8


class DecodeStream:
    """Text as its tokens come: `push` gives what has become readable, `flush` what never did.

    A character's bytes may be split over tokens, so text is held back while it ends in an incomplete one.
    The tokens since the last emitted text are decoded together with those just before them, because a
    decoder may treat the first token of a text differently (a leading space dropped, for one). Together the
    pieces are what `decode` gives for all ids.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._ids: list[int] = []
        self._context = 0  # decoding starts here
        self._shown = 0  # ids before this have been emitted

    def push(self, token: int) -> str:
        """The text that this token completes, possibly empty."""
        self._ids.append(int(token))
        text = self._fresh()
        if not text or text.endswith(REPLACEMENT):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return text

    def flush(self) -> str:
        """What is held back, an unfinished character as U+FFFD; the stream then starts anew."""
        text = self._fresh()
        self._ids, self._context, self._shown = [], 0, 0
        return text

    def _fresh(self) -> str:
        before = self._decode(self._ids[self._context : self._shown])
        return self._decode(self._ids[self._context :])[len(before) :]
