"""Text to token ids and back: the checkpoint's own tokenizer, chat template and end-of-sequence rule.

Everything is read from the files that came with the checkpoint (`tokenizer.json`, `tokenizer_config.json`,
`chat_template.jinja`); nothing is guessed from the model's name. Chat templates are programs from a download,
so they run in jinja2's immutable sandbox.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.text.stream import DecodeStream


class Tokenizer:
    """The tokenizer of a checkpoint folder.

    Raises UserError where the folder has no `tokenizer.json` or a file in it is damaged.
    """

    def __init__(self, folder: str | Path):
        from tokenizers import Tokenizer as Backend

        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            hint = " (tokenizer.model alone is not read: load it with transformers and save_pretrained)"
            raise UserError(f"{path}: no such file{hint if (self.folder / 'tokenizer.model').is_file() else ''}")
        try:
            self._backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path}: not a tokenizer ({error}); download or save it again") from None
        self._backend.no_truncation()  # both are saved with a tokenizer that made batches; a prompt is taken whole
        self._backend.no_padding()
        self.config = read_object(self.folder / "tokenizer_config.json")
        saved = read_object(self.folder / "special_tokens_map.json")
        self.special_tokens = {
            key: content(value)
            for key, value in {**saved, **self.config}.items()
            if key.endswith("_token") and content(value) is not None
        }
        self._template = self._find_template()

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
        ids = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        wants, bos = self.config.get("add_bos_token"), self.bos_id
        if not add_special_tokens or wants is None or bos is None:
            return ids
        if wants:
            return ids if ids[:1] == [bos] else [bos, *ids]
        plain = self._backend.encode(text, add_special_tokens=False).ids
        return ids[1:] if ids[:1] == [bos] and len(ids) > len(plain) else ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def stream(self, skip_special_tokens: bool = True) -> DecodeStream:
        return DecodeStream(functools.partial(self.decode, skip_special_tokens=skip_special_tokens))

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The prompt text for a conversation, [{"role": ..., "content": ...}, ...].

        Raises UserError where there is no template, it is malformed, or it refuses the conversation.
        """
        import jinja2

        if self._template is None:
            raise UserError(f"{self.folder}: the tokenizer has no chat template")
        try:
            return (
                template_environment()
                .from_string(self._template)
                .render(
                    messages=list(messages),
                    tools=None,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                    **self.special_tokens,
                )
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise UserError(f"{self.folder}: chat template: {error}") from None

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation; the template has written the special tokens already."""
        return self.encode(self.apply_chat_template(messages, add_generation_prompt), add_special_tokens=False)

    def _find_template(self) -> str | None:
        path = self.folder / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
        template = self.config.get("chat_template")
        if isinstance(template, list):  # several by name
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default")
        if template is not None and not isinstance(template, str):
            raise UserError(
                f"{self.folder / 'tokenizer_config.json'}: chat_template is no text; download or save it again"
            )
        return template


def eos_ids(generation_config: Mapping[str, Any], tokenizer: Tokenizer | None, config) -> tuple[int, ...]:
    """The ids that end a text.

    Those of `generation_config.json` (one id or a list), else of `config.json`, else the tokenizer's.
    """
    for value in (generation_config.get("eos_token_id"), config.eos_token_id, tokenizer and tokenizer.eos_id):
        if value is not None:
            return tuple(value) if isinstance(value, (list, tuple)) else (int(value),)
    return ()


def content(token: Any) -> str | None:
    """The text of a special token, which may be stored as a string or as {"content": ...}."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file; raises UserError where it is malformed."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); download or save it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object; download or save it again")
    return value


@functools.cache
def template_environment():
    """The sandbox in which chat templates run, with the names that published templates use."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}...{% endgeneration %}` marks the assistant's part for training.

        Here it is just its body.
        """

        tags = frozenset({"generation"})  # pyright: ignore[reportAssignmentType]  # jinja2 only reads it

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def refuse(message: str):
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json  # jinja's own escapes HTML
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment
