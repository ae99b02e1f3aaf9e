"""Text to token ids and back: a checkpoint's own tokenizer, its chat templates and what ends a text."""

from hybrimoe_jax.text.stream import DecodeStream
from hybrimoe_jax.text.tokenizer import Tokenizer, eos_ids

__all__ = ["DecodeStream", "Tokenizer", "eos_ids"]
