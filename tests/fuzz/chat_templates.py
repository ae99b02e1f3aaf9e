"""Chat templates: pieces whose text is known, and pieces that hang, fail, fill memory or reach for what they must not.

The reference is what the pieces stand for. A template with a hostile piece is refused in one line.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import test_text as texts
from fuzz.mutate import WORDS, brief, change_bytes, json_text
from fuzz.worker import Case, Wrong

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Ça va? <s> {{ 1 }} {% if %}"},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "\U0001f642 a\nb"},
]
ROLES = "".join(m["role"] for m in MESSAGES)
KNOWN = {
    "plain words": "plain words",
    "{{ bos_token }}": "<s>",
    "{{ eos_token }}": "</s>",
    "{% for m in messages %}{{ m.role }}{% endfor %}": ROLES,
    "{% for m in messages %}{{ m['content'] }}|{% endfor %}": "".join(m["content"] + "|" for m in MESSAGES),
    "{{ messages | length }}": str(len(MESSAGES)),
    "{{ messages[0]['content'] | trim | upper }}": "BE BRIEF.",
    "{% if add_generation_prompt %}GO{% endif %}": "GO",
    "{% if not tools %}none{% endif %}": "none",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}": "4",
    "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}": "system",
    "{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f('y') }}": "<y>",
    "{% generation %}inside{% endgeneration %}": "inside",
    "{{ {'a': [1, 'é']} | tojson }}": '{"a": [1, "é"]}',
    "{# nothing #}": "",
    "{{ 'a' ~ 3 ~ none }}": "a3None",
    "{{ messages[-1].content.split('\n') | last }}": "b",
    "{{ range(3) | join(',') }}": "0,1,2",
}
"""Piece -> its text for `MESSAGES`."""
HOSTILE = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 3000000000 }}",
    "{{ [0] * 3000000000 }}",
    "{{ 'x'.center(3000000000) }}",
    "{{ '%3000000000d' % 1 }}",
    "{{ '{:3000000000}'.format(1) }}",
    "{{ 10 ** (10 ** 9) }}",
    "{{ raise_exception('refused: \x1b[31m' ~ 'z' * 9000) }}",
    "{{ messages.nothing.at_all }}",
    "{{ 1 / 0 }}",
    "{{ messages[99].content }}",
    "{{ [1, 'a'] | sort }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ strftime_now(5) }}",
    "{{ messages | tojson(indent='x' * 3000000000) }}",
    "{{ nothing() }}",
    "{% for %}",
    "{% if true %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{{ 'a' | nofilter }}",
    "{{ 'a'.encode('nowhere') }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "{{ int('1' * 5000) }}",
    "{{ 'abc'.index('z') }}",
    "{{ {}['x']['y'] }}",
    "{{ messages.append(1) }}",
    "{{ range(10**12) | list }}",
    "{{ '\\ud800' }}{{ '\\ud800'.encode() }}",
)
"""Pieces with which no template gives a text."""


class Kind:
    """Folders with one tokenizer and a template each."""

    def __init__(self, base: Path):
        texts.saved(base / "hf", texts.byte_level())
        self.files = {path.name: path.read_bytes() for path in (base / "hf").iterdir()}
        source = base / "sound"
        self.write(source, "".join(KNOWN), True)
        self.compare(source, "".join(KNOWN.values()))

    def write(self, folder: Path, template: str, file: bool) -> None:
        folder.mkdir()
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        if file:
            (folder / "chat_template.jinja").write_bytes(template.encode("utf-8", "surrogatepass"))
            return
        config = json.loads(self.files["tokenizer_config.json"]) | {"chat_template": template}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))

    def case(self, rng: random.Random, folder: Path) -> Case:
        chosen = rng.choices(list(KNOWN), k=rng.randrange(1, 6))
        how = rng.choice(("known", "known", "hostile", "hostile", "bytes", "config"))
        wanted, source, file = "".join(map(KNOWN.__getitem__, chosen)), folder / "hf", rng.random() < 0.5
        if how == "hostile":
            chosen.insert(rng.randrange(len(chosen) + 1), rng.choice(HOSTILE))
        self.write(source, "".join(chosen), file)
        if how == "known":
            return Case(f"known: {brief(chosen)}", lambda: self.compare(source, wanted), (str(folder),))
        if how == "bytes":
            data, what = change_bytes(rng, "".join(chosen).encode())
            (source / "chat_template.jinja").write_bytes(data)
        elif how == "config":
            named = [{"name": n, "template": t} for n, t in zip(("default", "tool_use", "x"), chosen)]
            value = rng.choice((named, named[1:], [*named, 5], {}, 5, [], "", *WORDS[:8], [{"name": []}], True))
            text, spoilt = json_text(rng, json.loads(self.files["tokenizer_config.json"]) | {"chat_template": value})
            (source / "chat_template.jinja").unlink(missing_ok=True)
            (source / "tokenizer_config.json").write_bytes(text)
            what = f"chat_template {brief(value)} {spoilt}"
        else:
            what = brief(chosen)
        return Case(f"{how}: {what}", lambda: self.compare(source, how == "hostile"), (str(folder),))

    def compare(self, source: Path, wanted: str | bool) -> None:
        """`wanted`: the text, or whether it must be refused."""
        from hybrimoe_jax.errors import UserError
        from hybrimoe_jax.text import Tokenizer

        try:
            tokenizer = Tokenizer(source)
            if not tokenizer.has_chat_template and not isinstance(wanted, str):
                return
            text = tokenizer.apply_chat_template(MESSAGES)
        except UserError as error:
            if isinstance(wanted, str):
                raise Wrong(f"a sound template is refused: {error}") from None
            raise
        if wanted is True:
            raise Wrong(f"it gives a text of {len(text)} characters")
        if isinstance(wanted, str) and text != wanted:
            raise Wrong(f"{text!a}, not {wanted!a}")
        tokenizer.encode_chat(MESSAGES)
