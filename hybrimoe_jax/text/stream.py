"""Text as its tokens come: the pieces together are what `decode` gives for all ids, whatever the vocabulary.

No character is split, and nothing is given that a later token could change. What that means depends on the decoder
of `tokenizer.json`, so there are three streams: for bytes, for pieces of text, and one that waits for the end.
"""

from __future__ import annotations

import abc
import codecs
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hybrimoe_jax import arguments
from hybrimoe_jax.errors import UserError, shown

BY_TOKEN = {"Replace", "ByteFallback", "Metaspace", "WordPiece", "BPEDecoder", "CTC", "Strip"}
"""Decoders of a list of tokens that change no token before the last one when another is added."""


MOST_IDS = 1 << 32
"""What the `tokenizers` library can be asked about."""


def token_id(value: Any) -> int:
    """UserError for what is no id of any vocabulary."""
    found = arguments.index(value)
    if found is None or not 0 <= found < MOST_IDS:
        raise UserError(f"token ids must be whole numbers from 0, not {shown(value)}")
    return found


class DecodeStream(abc.ABC):
    """`push` gives the text that a token completes, `flush` what is left; the stream then starts anew."""

    @abc.abstractmethod
    def push(self, token: int) -> str:
        """The text that this token completes, possibly empty."""

    @abc.abstractmethod
    def flush(self) -> str:
        """What is held back, an unfinished character as U+FFFD."""


class ByteStream(DecodeStream):
    """For a byte-level vocabulary (GPT-2's kind), where every token is bytes: characters are given as they are whole.

    `bytes_of` gives a token's bytes, none for one that is skipped.
    """

    def __init__(self, bytes_of: Callable[[int], bytes]):
        self._bytes_of, self._decoder = bytes_of, codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._bytes_of(token_id(token)))

    def flush(self) -> str:
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class PieceStream(DecodeStream):
    """For decoders that work token by token.

    The tokens since the last emitted text are decoded together with some before them, because a decoder may treat the
    first token of a text differently (a leading space dropped, for one). Byte tokens (`<0xE4>`) are held until
    another token ends their run: the library gives them as characters only if the whole run is UTF-8.

    `text_of` gives a token's own text, None for one that is skipped; `is_byte` says of a text whether it is a byte.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        text_of: Callable[[int], str | None],
        is_byte: Callable[[str], bool],
    ):
        self._decode, self._text_of, self._is_byte = decode, text_of, is_byte
        self._ids: list[int] = []  # those before `_shown` have been emitted; decoding starts at the first
        self._shown, self._before = 0, ""

    def push(self, token: int) -> str:
        text = self._text_of(token_id(token))
        if text is None:
            return ""
        self._ids.append(token_id(token))
        return "" if self._is_byte(text) else self._fresh()

    def flush(self) -> str:
        text = self._fresh()
        self._ids, self._shown, self._before = [], 0, ""
        return text

    def _fresh(self) -> str:
        whole = self._decode(self._ids)
        text = whole[len(self._before) :]
        if text:
            after = self._decode(self._ids[self._shown :]) if self._shown else ""
            if after:  # else it is all of what is dropped at a text's beginning, and there may be more of that
                del self._ids[: self._shown]
            self._shown, self._before = len(self._ids), after or whole
        return text


class WholeStream(DecodeStream):
    """For a decoder of which nothing is known: its text is right when all tokens are there."""

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._ids: list[int] = []

    def push(self, token: int) -> str:
        self._ids.append(token_id(token))
        return ""

    def flush(self) -> str:
        text, self._ids = self._decode(self._ids), []
        return text


def stream_for(
    decoder: Any, decode: Callable[[Sequence[int]], str], text_of: Callable[[int], str | None]
) -> DecodeStream:
    """The stream for a `decoder` of the `tokenizers` library; None joins tokens by spaces.

    `decode` is what the pieces together must be; `text_of` gives a token's own text, None for one that is skipped.
    """
    found = [] if decoder is None else list(_flat(json.loads(decoder.__getstate__())))
    kinds = [step["type"] for step in found]
    if kinds and kinds[0] == "ByteLevel" and set(kinds[1:]) <= {"Fuse"}:
        return ByteStream(lambda token: token_bytes(text_of(token) or ""))
    if not _token_by_token(found):
        return WholeStream(decode)
    return PieceStream(decode, text_of, is_byte if "ByteFallback" in kinds else lambda _: False)


def _flat(step: dict) -> Iterator[dict]:
    """The decoders that run one after another, of a tree of sequences."""
    if step["type"] != "Sequence":
        yield step
    for inner in step.get("decoders", ()):
        yield from _flat(inner)


def _token_by_token(found: list[dict]) -> bool:
    """Whether a new token leaves the text of those before it as it is.

    After `Fuse` the text is one, and only what drops its beginning is known not to change the rest.
    """
    kinds = [step["type"] for step in found]
    end = kinds.index("Fuse") if "Fuse" in kinds else len(kinds)
    rest = [step for step in found[end:] if step["type"] != "Fuse"]
    return set(kinds[:end]) <= BY_TOKEN and all(step["type"] == "Strip" and not step["stop"] for step in rest)


def is_byte(text: str) -> bool:
    """Whether a token stands for one byte, as `<0xE4>` does (or might: then it is held back in vain)."""
    return len(text) <= 6 and text.startswith("<0x") and text.endswith(">")


@functools.cache
def _alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def token_bytes(text: str) -> bytes:
    """The bytes of a byte-level token; one with any other character in it (an added one) is its own text."""
    try:
        return bytes(map(_alphabet().__getitem__, text))
    except KeyError:
        return text.encode()
