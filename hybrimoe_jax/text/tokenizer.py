"""Text to token ids and back: the checkpoint's own tokenizer, chat template and end-of-sequence rule.

Everything is read from the files that came with the checkpoint; nothing is guessed from the model's name.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hybrimoe_jax import arguments
from hybrimoe_jax.errors import UserError, shown
from hybrimoe_jax.files import present, read_json
from hybrimoe_jax.text.added_tokens import ADDED, CONFIG, MAP, AddedTokens
from hybrimoe_jax.text.backend import library, load_backend
from hybrimoe_jax.text.render import TemplateError, render
from hybrimoe_jax.text.stream import DecodeStream, stream_for, token_id
from hybrimoe_jax.text.templates import choose, conversation, objects, templates_of


class Tokenizer:
    """The tokenizer of a checkpoint folder.

    Raises UserError where the folder has no `tokenizer.json` or a file in it is damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(arguments.path("folder", folder))
        path = self.folder / "tokenizer.json"
        if not present(path):
            hint = " (tokenizer.model alone is not read: load it with transformers and save_pretrained)"
            raise UserError(f"{path}: no such file{hint if (self.folder / 'tokenizer.model').is_file() else ''}")
        self._backend = load_backend(path)
        files = {name: read_object(self.folder / name) for name in (CONFIG, MAP, ADDED)}
        self.config = files[CONFIG]
        for key in ("add_bos_token", "split_special_tokens"):
            if not isinstance(self.config.get(key), (bool, type(None))):
                raise UserError(f"{self.folder / CONFIG}: {key} is {shown(self.config[key])}, neither true nor false")
        added = AddedTokens.read(self.folder, files, self._backend)
        with library(f"{self.folder}: its added tokens do not fit tokenizer.json"):
            added.add_to(self._backend)
        added.check_ids(self._backend, self.folder)
        self.special_tokens = {role: token.content for role, token in added.named.items()}
        self._backend.encode_special_tokens = self.config.get("split_special_tokens") is True
        self.chat_templates = templates_of(self.folder, self.config)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_id(self) -> int | None:
        return self.token_id(self.special_tokens.get("bos_token"))

    @property
    def eos_id(self) -> int | None:
        return self.token_id(self.special_tokens.get("eos_token"))

    def token_id(self, token: str | None) -> int | None:
        """The id of a token's exact text, None where the vocabulary lacks it."""
        return None if token is None else self._backend.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`, with the special tokens that this tokenizer puts around a prompt.

        The post-processor of `tokenizer.json` decides; where `tokenizer_config.json` sets `add_bos_token`, that
        decides about the first id (DeepSeek-V2 is published with a post-processor that adds none and this flag
        set; transformers 4 follows the flag, transformers 5 does not). Pass `add_special_tokens=False` for the
        text of a chat template, which has its own.
        """
        ids = self._encode(text, add_special_tokens)
        wants, bos = self.config.get("add_bos_token"), self.bos_id
        if not add_special_tokens or wants is None or bos is None:
            return ids
        if wants:
            return ids if ids[:1] == [bos] else [bos, *ids]
        own = _leading(self._encode(text, False), bos)  # in the text itself
        return ids[1:] if _leading(ids, bos) > own else ids

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except (AttributeError, UnicodeEncodeError):
            raise UserError(f"a text is wanted, without halves of surrogate pairs, not {shown(text)}") from None
        with library(f"{self.folder}: tokenizer.json cannot encode this text"):
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; those that the vocabulary lacks give none. Raises UserError for what is no id."""
        if not isinstance(ids, Iterable) or isinstance(ids, (str, *arguments.NO_LISTS)):
            raise UserError(f"token ids are wanted, a list of whole numbers, not {shown(ids)}")
        ids = list(map(token_id, ids))
        with library(f"{self.folder}: tokenizer.json cannot decode these ids"):
            return self._backend.decode(ids, skip_special_tokens=skip_special_tokens) if ids else ""

    def stream(self, skip_special_tokens: bool = True) -> DecodeStream:
        """Text as its tokens come: the pieces together are `decode` of all ids."""
        decode = functools.partial(self.decode, skip_special_tokens=skip_special_tokens)
        text_of = self._text_unless_special if skip_special_tokens else self._backend.id_to_token
        return stream_for(self._backend.decoder, decode, text_of)

    @functools.cached_property
    def _special_texts(self) -> set[str]:
        """Tokens that `decode` skips: asked of it, because the library keeps a token special that once was."""
        added = self._backend.get_added_tokens_decoder().items()
        return {token.content for number, token in added if self.decode([number]) != self.decode([number], False)}

    def _text_unless_special(self, token: int) -> str | None:
        text = self._backend.id_to_token(token)
        return None if text in self._special_texts else text

    @property
    def has_chat_template(self) -> bool:
        return bool(self.chat_templates)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt text for a conversation, [{"role": ..., "content": ...}, ...].

        Args: chat_template: which of several, by name, or the text of another; without it the one named "tool_use"
          if `tools` are given and there is such a one, else the default one; tools: JSON schemas of functions that
          the model may call; documents: objects with a title and a text; variables: whatever else the template reads,
          such as `enable_thinking=False`.

        Templates run in a process of their own, within limits: see `text.render`. Raises UserError where there is no
        such template, it is malformed, passes a limit, or refuses the conversation.
        """
        where, template = choose(self.chat_templates, chat_template, tools, self.folder)
        given = {
            **self.special_tokens,
            **variables,
            "messages": conversation(messages),
            "tools": objects(tools, "tools", template),
            "documents": objects(documents, "documents", template),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return render(template, given)
        except TemplateError as error:
            raise UserError(f"{where}: {error}") from None

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **options: Any
    ) -> list[int]:
        """Ids of a conversation: the template has written the special tokens. `options` as of `apply_chat_template`."""
        text = self.apply_chat_template(messages, add_generation_prompt, **options)
        return self.encode(text, add_special_tokens=False)


def _leading(ids: Sequence[int], token: int) -> int:
    """How many of the first ids are this one."""
    return next((place for place, found in enumerate(ids) if found != token), len(ids))


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file; raises UserError where it is malformed."""
    if not present(path):
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object; download or save it again")
    return value
