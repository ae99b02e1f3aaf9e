"""From texts to windows of token ids: a byte-level BPE tokenizer, one stream of training ids, evaluation windows.

Byte-level BPE (as in GPT-2) reads any UTF-8 without an unknown token. One special token, `<|endoftext|>`, stands before
every work: it is both the beginning and the end of a text. Batches are drawn from (seed, step) alone, so that a resumed
run sees what an uninterrupted one would have seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.train.corpus import Text

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: Sequence[Text], vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer of `vocab_size` ids (at least 257: the bytes and `<|endoftext|>`, which is id 0)."""
    if vocab_size < 257:
        raise UserError(f"--vocab {vocab_size}: at least 257 ids are needed (256 bytes and {END_OF_TEXT})")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([t.text for t in texts], trainer)
    return tokenizer


def encode(tokenizer: tokenizers.Tokenizer, text: Text) -> np.ndarray:
    """Token ids [n] int32 of one work, `<|endoftext|>` first."""
    return np.asarray([tokenizer.token_to_id(END_OF_TEXT), *tokenizer.encode(text.text).ids], np.int32)


def batch(stream: np.ndarray, size: int, context: int, seed: int, step: int) -> np.ndarray:
    """Random windows [size, context + 1] of the training stream; the same for the same seed and step."""
    rng = np.random.default_rng((seed, step))
    starts = rng.integers(0, len(stream) - context, size)
    return stream[starts[:, None] + np.arange(context + 1)[None, :]]


class Window(NamedTuple):
    """`inputs` and `targets` [context], `valid` [context] False in the padding of a work's last window."""

    inputs: np.ndarray
    targets: np.ndarray
    valid: np.ndarray


def windows(ids: np.ndarray, context: int) -> list[Window]:
    """Consecutive windows that predict every id of a work but its first once, each from its own window only."""
    result = []
    for start in range(0, len(ids) - 1, context):
        inputs, targets = ids[start : start + context], ids[start + 1 : start + context + 1]
        filled = len(targets)
        pad = (0, context - filled)
        result.append(Window(np.pad(inputs[:filled], pad), np.pad(targets, pad), np.arange(context) < filled))
    return result
