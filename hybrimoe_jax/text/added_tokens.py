"""Which tokens a checkpoint adds to its vocabulary: one view of the four files that may name them.

`tokenizer.json` has them already. `tokenizer_config.json` lists them again as `added_tokens_decoder`, and its flags
win; where it has no such list, `special_tokens_map.json` and `added_tokens.json` (of older checkpoints) are read. The
order and the flags are those of transformers 5 (`PreTrainedTokenizerBase._from_pretrained`), so ids are the same.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrimoe_jax.errors import UserError, shown, shown_name

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA, OLDER = "extra_special_tokens", "additional_special_tokens"  # the newer name counts where both are lists


@dataclasses.dataclass
class AddedTokens:
    """The tokens that the files beside `tokenizer.json` name.

    `named` has those with a role (`bos_token` and so on), `extra` special ones without a role, `listed` those that a
    file gives an id.
    """

    named: dict[str, AddedToken]
    extra: list[AddedToken]
    listed: dict[int, AddedToken]

    @classmethod
    def read(cls, folder: Path, files: Mapping[str, Mapping[str, Any]], backend: Backend) -> AddedTokens:
        """From the JSON objects of CONFIG, MAP and ADDED; raises UserError naming file and key."""
        config, more = files[CONFIG], files[MAP]
        named, lists = _special(folder / CONFIG, config)
        if OLDER in lists and not config.get(EXTRA):
            lists[EXTRA] = lists.pop(OLDER)
        if "added_tokens_decoder" in config:
            return cls(named, _chosen(lists), _listed(folder / CONFIG, config["added_tokens_decoder"]))
        more_named, more_lists = _special(folder / MAP, more)
        own = {key for key, value in config.items() if key not in ROLES and isinstance(value, str)}
        named |= {key: token for key, token in more_named.items() if key not in own}
        texts = [role for role in ROLES if role in named and (role in more or isinstance(config.get(role), str))]
        special = {named[role].content for role in texts}
        given = config.get(EXTRA) or config.get(OLDER) or ()  # an object in it is not recognised as its text
        if EXTRA in lists and not isinstance(more.get(EXTRA), dict):
            special |= {value for value in given if isinstance(value, str)}
        special |= {token.content for token in more_lists.get(EXTRA, ())}
        if isinstance(more.get(EXTRA), dict):
            lists.pop(EXTRA, None)
        elif EXTRA in more_lists:
            more_lists[EXTRA] = lists.get(EXTRA, []) + more_lists[EXTRA]
        listed = _with_ids(folder / ADDED, files[ADDED], special) | backend.get_added_tokens_decoder()
        return cls(named, _chosen(lists | more_lists), listed)

    def add_to(self, backend: Backend) -> None:
        """Adds what the vocabulary lacks, and changes flags that differ."""
        adding = [token for _, token in sorted(self.listed.items())]
        texts = {token.content for token in (*backend.get_added_tokens_decoder().values(), *adding)}
        named = [self.named[role] for role in sorted(self.named, key=_rank)]
        for token in (*named, *self.extra):
            if token.content not in texts and token not in adding:
                adding.append(token)
        roles = {token.content for token in self.named.values()}
        for token in adding:
            token.special = token.special or token.content in roles
        backend.add_tokens(adding)

    def check_ids(self, backend: Backend, folder: Path) -> None:
        """Warns of a token whose id in `backend` is not the listed one."""
        for number, token in self.listed.items():
            got = backend.token_to_id(token.content)
            if got != number:
                warnings.warn(
                    f"{folder}: the token {shown_name(token.content)} is listed with id {number} and has id {got} (in "
                    "transformers too): the files do not belong together",
                    stacklevel=3,
                )
                return


def _rank(role: str) -> int:
    """Of two roles with one token, the later one's flags count: roles of a model's own come last."""
    return ROLES.index(role) if role in ROLES else len(ROLES)


def _chosen(lists: Mapping[str, list[AddedToken]]) -> list[AddedToken]:
    """Of the lists of tokens without a role the newer one, even where it is empty."""
    return lists.get(EXTRA, lists.get(OLDER, []))


def _special(path: Path, values: Mapping[str, Any]) -> tuple[dict[str, AddedToken], dict[str, list[AddedToken]]]:
    """Tokens with a role, and lists of those without, of a config or of `special_tokens_map.json`."""
    named = {}
    for key, value in values.items():
        if key.endswith("_token") and (isinstance(value, (str, dict)) or (key in ROLES and value is not None)):
            named[key] = _token(path, key, value)
    lists = {key: values[key] or [] for key in (EXTRA, OLDER) if key in values}
    if isinstance(values.get(EXTRA), dict):
        named |= {key: _token(path, key, value) for key, value in values[EXTRA].items()}
        del lists[EXTRA]
    for key, tokens in lists.items():
        if not isinstance(tokens, list):
            raise UserError(f"{path}: {key} is {shown(tokens)}, no list of tokens")
    return named, {key: [_token(path, key, value) for value in tokens] for key, tokens in lists.items()}


def _listed(path: Path, values: Any) -> dict[int, AddedToken]:
    if not isinstance(values, dict):
        raise UserError(f"{path}: added_tokens_decoder is {shown(values)}, no object of ids and tokens")
    for key, value in values.items():
        if not key.isdecimal() or len(key) > 10 or not isinstance(value, dict):
            raise UserError(f"{path}: added_tokens_decoder: {shown(key)}: {shown(value)} is no id and its token")
    return {
        int(key): _token(path, f"added_tokens_decoder: {key}", value, special=False) for key, value in values.items()
    }


def _with_ids(path: Path, values: Mapping[str, Any], special: set[str]) -> dict[int, AddedToken]:
    """`added_tokens.json`: {token: id}. Those that are special elsewhere are so here."""
    for key, value in values.items():
        if type(value) is not int or value < 0:
            raise UserError(f"{path}: {shown(key)} has the id {shown(value)}, which is none")
    flags = {text: {"special": text in special, "normalized": text not in special} for text in values}
    return {number: _token(path, text, {"content": text, **flags[text]}) for text, number in values.items()}


def _token(path: Path, key: str, value: Any, special: bool = True) -> AddedToken:
    """A token that is stored as a text or as an object of its text and flags; `special` where no flag says it."""
    from tokenizers import AddedToken

    value = {"content": value} if isinstance(value, str) else value
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise UserError(f"{path}: {shown_name(key)} is {shown(value)}, neither a text nor an object with a content")
    flags = {name: value[name] for name in FLAGS if name in value}
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise UserError(f"{path}: {shown_name(key)}: {name} is {shown(flag)}, neither true nor false")
    try:
        return AddedToken(value["content"], **{"special": special, **flags})
    except UnicodeEncodeError:
        raise UserError(f"{path}: {shown_name(key)} is {shown(value['content'])}, half a surrogate pair") from None
