"""Which chat templates a checkpoint has, which of them a conversation gets, and what it is given."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hybrimoe_jax import arguments
from hybrimoe_jax.encoding import read_text
from hybrimoe_jax.errors import UserError, shown, shown_name
from hybrimoe_jax.files import present, read_json
from hybrimoe_jax.text.added_tokens import CONFIG

FILE, MORE = "chat_template.jinja", "additional_chat_templates"
DEFAULT, FOR_TOOLS = "default", "tool_use"
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # what an assistant's message may call its reasoning


def templates_of(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """A checkpoint's templates by name: those in files, else those in `tokenizer_config.json`.

    A template without a name is "default". Raises UserError where one is no text.
    """
    more = folder / MORE
    files = {path.stem: path for path in sorted(more.glob("*.jinja")) if present(path)}
    if present(folder / FILE):
        files = {DEFAULT: folder / FILE} | files
    if files:
        return {name: read_text(path) for name, path in files.items()}
    value, where = config.get("chat_template"), f"{folder / CONFIG}: chat_template"
    if isinstance(value, list):
        entries = [entry if isinstance(entry, dict) else {} for entry in value]
        named: list[tuple[Any, Any]] = [(entry.get("name"), entry.get("template")) for entry in entries]
    else:
        named = [] if value is None else [*value.items()] if isinstance(value, dict) else [(DEFAULT, value)]
    for name, template in named:
        if not isinstance(name, str) or not isinstance(template, str):
            raise UserError(f"{where} is no text, and no list of names and texts; download or save it again")
    return dict(named)


def choose(templates: Mapping[str, str], wanted: str | None, tools: Any, where: Path) -> tuple[str, str]:
    """-> (how messages call it, the template): by name or as its own text, else as transformers chooses.

    That is the one for tools where tools are given and there are several, else the default one. Raises UserError.
    """
    names = ", ".join(shown_name(name) for name in sorted(templates))
    wanted = None if wanted is None else arguments.text("chat_template", wanted)
    if wanted is not None and wanted not in templates:
        if is_template(wanted):
            return "the given chat template", wanted
        there = f"{where} has {names}" if names else f"{where} has none"
        raise UserError(f"there is no chat template {shown(wanted)}, and that is no template's text: {there}")
    if wanted is None:
        wanted = FOR_TOOLS if tools is not None and FOR_TOOLS in templates else DEFAULT
    if not templates:
        raise UserError(f"{where}: the tokenizer has no chat template")
    if wanted not in templates:
        raise UserError(
            f"{where}: its chat templates are {names}, and none is the default: choose one "
            "(--chat-template NAME, chat_template=NAME)"
        )
    return f"{where}: chat template" + (f" {shown_name(wanted)}" if len(templates) > 1 else ""), templates[wanted]


def named_or_read(given: str, templates: Mapping[str, str]) -> str:
    """`--chat-template`: the name of one of `templates`, or the text of the file that is given."""
    if given in templates or not os.path.exists(given):
        return given
    text = read_text(given, f"--chat-template {given}")
    if not is_template(text):
        raise UserError(f"--chat-template {given}: there is no {{{{ and no {{% in it: that is no chat template")
    return text


def is_template(text: str) -> bool:
    return "{{" in text or "{%" in text


def conversation(messages: Any) -> list[dict[str, Any]]:
    """Messages as templates expect them: without keys that are None, reasoning under the names that templates read.

    Both are what transformers 5 does. Raises UserError for what is no conversation.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError(
            f'messages: a list such as [{{"role": "user", "content": "Hi"}}] is wanted, not {shown(messages)}'
        )
    result = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise UserError(f"messages: {shown(message)} is no object with a role and a content")
        message = {key: value for key, value in message.items() if value is not None}
        thought = next((message[key] for key in THOUGHTS if key in message), None)
        if thought is not None:
            message = {"thinking": thought, **message, "reasoning_content": thought}
        result.append(message)
    return result


def objects(values: Any, what: str, template: str) -> list[Mapping[str, Any]] | None:
    """`tools` or `documents`: a list of objects, or None. Warns where the template never looks at them."""
    if values is None:
        return None
    fine = isinstance(values, Sequence) and not isinstance(values, str)
    wrong = values if not fine else next((value for value in values if not isinstance(value, Mapping)), None)
    if wrong is not None:
        raise UserError(f"{what}: a list of JSON objects is wanted, not {shown(wrong)}")
    if not re.search(rf"\b{what}\b", template):
        warnings.warn(f"the chat template does not use {what}: the model will not see them", stacklevel=4)
    return list(values)


def read_objects(path: str, what: str) -> list[dict[str, Any]]:
    """The JSON file of a `--tools` or `--documents` flag. Raises UserError naming flag and file."""
    values = read_json(Path(path), f"--{what} {path}")
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise UserError(f"--{what} {path}: it holds {shown(values)}; a list of JSON objects is wanted")
    return values
