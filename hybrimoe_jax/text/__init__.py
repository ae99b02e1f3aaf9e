"""Text to token ids and back: a checkpoint's own tokenizer, its chat templates and what ends a text."""

from hybrimoe_jax.text.replies import eos_ids
from hybrimoe_jax.text.stream import DecodeStream
from hybrimoe_jax.text.tokenizer import Tokenizer

__all__ = ["DecodeStream", "Tokenizer", "eos_ids"]
