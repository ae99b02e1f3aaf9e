"""What a call may ask of a model, checked once: prompts, how tokens are chosen, what ends a reply. Imports no jax."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

from hybrimoe_jax import arguments
from hybrimoe_jax.engine.config import EngineConfig
from hybrimoe_jax.engine.sampling import Sampling
from hybrimoe_jax.errors import UserError, shown

MOST_CONTEXT = 4096
"""Longest sequence where nobody asks for more."""

Prompts: TypeAlias = str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]
"""One text or several, the token ids of one prompt or of several; arrays of integers too."""

PIECE = 1 << 16
"""Characters of a long text that are encoded first."""

SAMPLING = [field.name for field in dataclasses.fields(Sampling) if field.name != "seed"]


class Asked(Protocol):
    """Who is asked: an engine."""

    config: Any
    options: EngineConfig
    tokenizer: Any
    max_context: int


class Request(NamedTuple):
    """A call of `generate` that can be served.

    Attributes: prompts: token ids of each; stop: the strings that end a text.
    """

    prompts: list[list[int]]
    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]


def read_request(
    engine: Asked, prompts: Any, max_new_tokens: Any = 64, stop: Any = (), seed: Any = None, **options: Any
) -> Request:
    """What `generate` is asked; UserError, naming the argument, where the engine cannot do it."""
    arguments.names("generate", options, [*SAMPLING, "max_new_tokens", "stop", "seed"])
    sampling = Sampling(**options, seed=engine.options.seed if seed is None else seed)
    most = arguments.whole("max_new_tokens", max_new_tokens, 1)
    words = read_stop(stop)
    check_stop(words, engine.tokenizer)
    ids = prompt_ids(prompts, engine.tokenizer, engine.max_context)
    check_prompts(ids, most, engine.config.vocab_size, engine.max_context)
    return Request(ids, most, sampling, words)


def read_stop(stop: Any) -> tuple[str, ...]:
    """The strings that end a text: one or several, none where it is None. None of them is empty."""
    given = [] if stop is None else arguments.several("stop", stop, str)
    words = tuple(arguments.text("stop", word) for word in given)
    if not all(words):
        raise UserError("stop: a stop string is empty, and would end every reply; leave it out")
    return words


def check_stop(stop: Sequence[str], tokenizer: Any) -> None:
    """UserError for stop strings of a model without texts."""
    if stop and tokenizer is None:
        raise UserError("stop strings need a tokenizer, and this checkpoint has none")


def one_prompt(prompt: Any, engine: Asked, what: str) -> list[list[int]]:
    """`prompt_ids` of one; UserError where there are several, for `what`, which takes one."""
    prompts = prompt_ids(prompt, engine.tokenizer, engine.max_context)
    if len(prompts) > 1:
        raise UserError(f"{what} of one prompt, not of {len(prompts)}; `generate` takes several")
    return prompts


def prompt_ids(prompts: Any, tokenizer: Any, max_context: int) -> list[list[int]]:
    """Token ids of each prompt; a text is encoded as the tokenizer does it, never read as numbers.

    UserError for what is no `Prompts`, for a text without a tokenizer, and for one that is far too long.
    """
    given = arguments.plain("prompts", prompts)
    if _is_one(given):
        return [_ids(given, "prompts", tokenizer, max_context)]
    if not isinstance(given, Iterable) or isinstance(given, arguments.NO_LISTS):
        raise UserError(f"prompts: {shown(prompts)} is neither text nor token ids")
    return [
        _ids(arguments.plain(where, row), where, tokenizer, max_context)
        for where, row in ((f"prompt {number}", row) for number, row in enumerate(given))
    ]


def _is_one(given: Any) -> bool:
    if isinstance(given, str):
        return True
    if not isinstance(given, Sequence) or isinstance(given, arguments.NO_LISTS) or not len(given):
        return False
    first = given[0]
    return isinstance(first, numbers.Integral) or (not isinstance(first, str) and arguments.is_scalar_array(first))


def _ids(given: Any, where: str, tokenizer: Any, max_context: int) -> list[int]:
    if isinstance(given, str):
        if tokenizer is None:
            raise UserError(f"{where}: this checkpoint has no tokenizer: give token ids")
        text = arguments.text(where, given)
        check_length(text, tokenizer, max_context)
        return tokenizer.encode(text)
    if not isinstance(given, Iterable) or isinstance(given, arguments.NO_LISTS):
        hint = "; for a conversation, encode it: engine.tokenizer.encode_chat(messages)" * isinstance(given, Mapping)
        raise UserError(f"{where}: {shown(given)} is neither text nor token ids{hint}")
    return [_id(value, place, where) for place, value in enumerate(given)]


def check_length(text: str, tokenizer: Any, max_context: int) -> None:
    """UserError where the beginning of a text already has more tokens than fit, by a wide margin.

    To encode a text takes some 250 bytes of memory for each of its own, cannot be interrupted, and goes first.
    """
    size = PIECE
    while size < len(text):
        tokens = len(tokenizer.encode(text[:size]))
        if tokens > max_context + max_context // 4 + 100:
            raise UserError(
                f"the prompt has {len(text):,} characters, of which the first {size:,} alone are {tokens:,} tokens: "
                f"that exceeds max_context {max_context}; shorten it or raise max_context"
            )
        size *= 4


def _id(value: Any, place: int, where: str) -> int:
    found = arguments.index(value)
    if found is None:
        text = "is no token id; give whole numbers, or the text itself"
        raise UserError(f"{where}: {shown(value)} at place {place} {text}")
    return found


def check_prompts(prompts: Sequence[Sequence[int]], new_tokens: int, vocab: int, max_context: int) -> None:
    """UserError for an empty batch or prompt, a token outside the vocabulary, or a context overflow."""
    if not prompts:
        raise UserError("no prompts: give at least one")
    for row, ids in enumerate(prompts):
        where = f"prompt {row}" if len(prompts) > 1 else "prompt"
        if not len(ids):
            raise UserError(f"{where} is empty: at least one token is needed")
        bad = [i for i in ids if not 0 <= i < vocab]
        if bad:
            raise UserError(f"{where}: token id {shown(bad[0])} is outside the vocabulary (0..{vocab - 1})")
        if len(ids) + new_tokens > max_context:
            raise UserError(
                f"{where}: {len(ids)} tokens and {new_tokens} new ones exceed max_context {max_context}; "
                "shorten the prompt, ask for fewer tokens or raise max_context"
            )


def context_limit(options: EngineConfig, config) -> int:
    """The longest sequence, prompt and reply together."""
    limit = config.max_position_embeddings
    if options.max_context is None:
        return min(limit, MOST_CONTEXT)
    if options.max_context > limit:
        raise UserError(f"max_context {options.max_context} exceeds the model's max_position_embeddings {limit}")
    return options.max_context
