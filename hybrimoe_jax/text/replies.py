"""What a checkpoint's `generation_config.json` says of replies: which ids end one, and what this engine leaves out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hybrimoe_jax.errors import UserError, shown

if TYPE_CHECKING:
    from hybrimoe_jax.text.tokenizer import Tokenizer

FILE = "generation_config.json"
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "typical_p", "guidance_scale"), (1,)),
    **dict.fromkeys(("min_p", "epsilon_cutoff", "eta_cutoff", "no_repeat_ngram_size", "top_h"), (0,)),
    **dict.fromkeys(("min_length", "min_new_tokens", "penalty_alpha", "diversity_penalty"), (0,)),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids"), ([],)),
    **dict.fromkeys(("sequence_bias", "constraints", "stop_strings"), ([], {}, "")),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"), ()),
    **dict.fromkeys(("watermarking_config", "dola_layers"), ()),
    "num_beams": (1,),
}
"""transformers' settings that change which token comes next and are not applied here, with the values that change
nothing. (`temperature`, `top_k` and `top_p` are the caller's to choose.)"""


def eos_ids(generation_config: Mapping[str, Any], tokenizer: Tokenizer | None, config: Any) -> tuple[int, ...]:
    """The ids that end a reply.

    Those of `generation_config.json` (one id or a list), else of `config.json`, else the tokenizer's. UserError for
    what is no id.
    """
    for file, value in ((FILE, generation_config.get("eos_token_id")), ("config.json", config.eos_token_id)):
        ids = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
        if not all(type(token) is int and token >= 0 for token in ids):
            raise UserError(f"{file}: eos_token_id must be a token id or a list of ids, not {shown(value)}")
        if ids:
            return tuple(ids)
    own = tokenizer.eos_id if tokenizer is not None else None
    return () if own is None else (own,)


def _neutral(value: Any, known: tuple[Any, ...]) -> bool:
    return not isinstance(value, bool) and value in known


def warn_of_what_is_left_out(generation_config: Mapping[str, Any], eos: tuple[int, ...], vocab_size: int) -> None:
    """One warning that names the settings that are not applied, and one the ids that no token has."""
    found = {key: generation_config[key] for key in NEUTRAL if generation_config.get(key) is not None}
    named = [f"{key} {shown(value)}" for key, value in found.items() if not _neutral(value, NEUTRAL[key])]
    if named:
        warnings.warn(
            f"{FILE}: {', '.join(named)} not applied; tokens are chosen by temperature, top_k and top_p alone",
            stacklevel=2,
        )
    outside = [token for token in eos if token >= vocab_size]
    if outside:
        warnings.warn(
            f"eos_token_id {shown(outside[0])} is outside the vocabulary (0..{vocab_size - 1}) and ends no reply",
            stacklevel=2,
        )
