"""Tokenizer files. The reference is the `tokenizers` library on the same file, without truncation and padding.

Ids are those of the reference, ids within the vocabulary decode, and a stream's pieces joined are what `decode` gives.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import test_text as texts
import tokenizers
from fuzz.mutate import brief, change_json, json_text
from fuzz.worker import Case, Wrong

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
PIECES = ("To be, or not", " lead", "naïve 你好 🙂!", "", "<s> literal </s>", "a\n\n  b", "\x00", "é" * 40, "ab" * 60)
KEYS = ("add_bos_token", "bos_token", "eos_token", "chat_template", "truncation", "padding", "model_max_length")
PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding", "model", "added_tokens")
WHOLE = {
    "truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0},
    "padding": {
        "strategy": {"Fixed": 80},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<s>",
    },
    "normalizer": {"type": "Lowercase"},
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "nowhere", "type_id": 0}}],
        "pair": [],
        "special_tokens": {},
    },
    "decoder": {"type": "Fuse"},
}
"""Whole parts of a `tokenizer.json`, sound and unsound."""


class Kind:
    """Folders of two small tokenizers."""

    def __init__(self, base: Path):
        self.bases = []
        for number, backend in enumerate((texts.byte_level(), texts.byte_fallback(True))):
            texts.saved(base / str(number), backend)
            files = {path.name: json.loads(path.read_text()) for path in (base / str(number)).iterdir()}
            files["special_tokens_map.json"] = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
            files["added_tokens.json"] = {"</s>": backend.token_to_id("</s>")}
            self.bases.append(files)
            self.compare(base / str(number), PIECES[0], 0)

    def case(self, rng: random.Random, folder: Path) -> Case:
        files = json.loads(json.dumps(rng.choice(self.bases)))
        raw, said = {}, []
        for _ in range(rng.choice((1, 1, 2))):
            name = rng.choice((FILES[0], FILES[0], *FILES))
            files[name], what = self.changed(rng, name, files[name])
            said.append(f"{name}: {what}")
        source = folder / "hf"
        source.mkdir()
        for name, value in files.items():
            raw[name], spoilt = json_text(rng, value) if rng.random() < 0.15 else (json.dumps(value).encode(), "")
            (source / name).write_bytes(raw[name])
            said += [f"{name}: {spoilt}"] if spoilt else []
        text, seed = rng.choice(PIECES), rng.randrange(2**32)
        return Case("; ".join(said), lambda: self.compare(source, text, seed), (*FILES, str(source)))

    def changed(self, rng: random.Random, name: str, value: Any) -> tuple[Any, str]:
        if name != "tokenizer.json" or not isinstance(value, dict):
            return change_json(rng, value, KEYS)
        part = rng.choice(PARTS)
        if part in WHOLE and rng.random() < 0.5:
            value[part] = WHOLE[part]
            return value, f"{part} = {brief(WHOLE[part])}"
        inner = value.get(part)
        if part == "model" and isinstance(inner, dict) and rng.random() < 0.5:
            vocab: dict[str, Any] = inner.get("vocab") or {"a": 0}
            token = rng.choice(list(vocab))
            vocab[token] = rng.choice((-1, 10**6, 2**32, 0, None, "1", 0.5))
            return value, f"model/vocab/{brief(token)} = {vocab[token]}"
        value[part], what = change_json(rng, inner, ())
        return value, f"{part}/{what}"

    def compare(self, source: Path, text: str, seed: int) -> None:
        from hybrimoe_jax.text import Tokenizer

        ours = Tokenizer(source)
        ids = ours.encode(text)
        reference = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
        reference.no_truncation()
        reference.no_padding()
        wanted = reference.encode(text).ids
        bos = ours.bos_id
        added = self.merged(source, reference)
        if not added and ids not in (wanted, [bos, *wanted], wanted[1:]):
            raise Wrong(f"{text!a} is {brief(ids)}, not {brief(wanted)}")
        if any(not isinstance(i, int) or i < 0 for i in ids):
            raise Wrong(f"{text!a} is {brief(ids)}")
        drawn = random.Random(seed).choices(range(min(reference.get_vocab_size(), 400)), k=24)
        for one in (ids, drawn):
            whole, stream = ours.decode(one), ours.stream()
            pieces = "".join([*map(stream.push, one), stream.flush()])
            if pieces != whole:
                raise Wrong(f"ids {brief(one)}: the pieces are {pieces!a}, the whole is {whole!a}")
            if not added and whole != reference.decode(one):
                raise Wrong(f"ids {brief(one)}: {whole!a}, not {reference.decode(one)!a}")

    @staticmethod
    def merged(source: Path, reference: tokenizers.Tokenizer) -> bool:
        """Whether other files may change what `tokenizer.json` says of special tokens."""
        try:
            files = [json.loads((source / name).read_text()) for name in FILES[1:] if (source / name).exists()]
        except ValueError:
            return True
        names = [
            token.get("content") if isinstance(token, dict) else token
            for file in files
            if isinstance(file, dict)
            for key, token in (*file.items(), *((name, name) for name in file))
            if str(key).endswith("_token") or file is files[-1]
        ]
        special = {token.content for token in reference.get_added_tokens_decoder().values() if token.special}
        return not {n for n in names if isinstance(n, str) and not n.endswith("_token")} <= special
