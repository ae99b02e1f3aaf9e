"""What a call may ask of a model: prompts within its vocabulary and context. Imports no jax."""

from __future__ import annotations

from collections.abc import Sequence

from hybrimoe_jax.engine.config import EngineConfig
from hybrimoe_jax.errors import UserError

MOST_CONTEXT = 4096
"""Longest sequence where nobody asks for more."""


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
