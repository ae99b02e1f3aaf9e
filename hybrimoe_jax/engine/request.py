"""What a call may ask of a model: prompts as text or ids, within its vocabulary and context. Imports no jax."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from hybrimoe_jax.engine.config import EngineConfig
from hybrimoe_jax.errors import UserError

MOST_CONTEXT = 4096
"""Longest sequence where nobody asks for more."""

Prompts: TypeAlias = str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]
"""One text or several, the token ids of one prompt or of several; arrays of integers too."""


def prompt_ids(prompts: Any, tokenizer: Any) -> list[list[int]]:
    """Token ids of each prompt; a text is encoded as the tokenizer does it, never read as numbers.

    UserError for what is no `Prompts`, and for a text without a tokenizer.
    """
    given = _plain(prompts)
    if _is_one(given):
        return [_ids(given, "prompts", tokenizer)]
    if not isinstance(given, Iterable) or isinstance(given, (Mapping, bytes)):
        raise UserError(f"prompts: {_said(prompts)} is neither text nor token ids")
    rows = list(given)
    return [_ids(_plain(row), f"prompt {number}", tokenizer) for number, row in enumerate(rows)]


def _plain(value: Any) -> Any:
    """Lists of an array, whoever's it is."""
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, str) else value


def _is_one(given: Any) -> bool:
    return isinstance(given, str) or (
        isinstance(given, Sequence) and len(given) > 0 and isinstance(given[0], numbers.Integral)
    )


def _ids(given: Any, where: str, tokenizer: Any) -> list[int]:
    if isinstance(given, str):
        if tokenizer is None:
            raise UserError(f"{where}: this checkpoint has no tokenizer: give token ids")
        return tokenizer.encode(given)
    if not isinstance(given, Iterable) or isinstance(given, (Mapping, bytes)):
        hint = "; for a conversation, encode it: engine.tokenizer.encode_chat(messages)" * isinstance(given, Mapping)
        raise UserError(f"{where}: {_said(given)} is neither text nor token ids{hint}")
    return [_id(value, place, where) for place, value in enumerate(given)]


def _id(value: Any, place: int, where: str) -> int:
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise UserError(f"{where}: {_said(value)} at place {place} is no token id; give whole numbers, or the text itself")


def _said(value: Any) -> str:
    said = repr(value)
    return said if len(said) <= 40 else f"{said[:36]} ..."


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
            raise UserError(f"{where}: token id {bad[0]} is outside the vocabulary (0..{vocab - 1})")
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
