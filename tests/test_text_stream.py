"""Streaming: for every tokenizer the pieces together are the decoded text, and no character is split."""

from __future__ import annotations

import random
import struct
import types

import pytest
from grids import examples, few
from hypothesis import given
from hypothesis import strategies as st
from public_traces import shared
from test_text import byte_fallback, byte_level, pushed, saved
from tokenizers import AddedToken, Tokenizer, decoders, models

from hybrimoe_jax.engine.generation import Emitted, collect
from hybrimoe_jax.engine.streaming import ReplyText

SPM = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
WORDS = [
    "a",
    "▁",
    "▁b",
    "▁▁",
    "##c",
    "d</w>",
    ".",
    "n't",
    "x|",
    "<pad>",
    "|",
    "�",
    "é",
    "<0xE4>",
    "<0xBD>",
    "<0xA0>",
    "<0x41>",
]
OTHERS = {
    "none": None,
    "unigram": decoders.Metaspace(),
    "wordpiece": decoders.WordPiece("##", cleanup=True),
    "bpe": decoders.BPEDecoder(),
    "ctc": decoders.CTC(),
    "wide strip": decoders.Sequence([*SPM[:3], decoders.Strip(" ", 3, 0)]),
    "replaced at the end": decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "!")]),
}


def words(decoder) -> Tokenizer:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    if decoder is not None:
        backend.decoder = decoder
    return backend


def with_odd_added_tokens(backend: Tokenizer) -> Tokenizer:
    backend.add_tokens(["é<x y>", "ł", AddedToken("Ġz", special=True), "<0x>"])
    return backend


MAKERS = {"byte level": byte_level, "byte fallback": byte_fallback}
MAKERS |= {name: lambda decoder=decoder: words(decoder) for name, decoder in OTHERS.items()}


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request, tmp_path_factory):
    return saved(tmp_path_factory.mktemp("tokenizer"), with_odd_added_tokens(MAKERS[request.param]()))


@examples(60)
@given(data=st.data())
def test_pieces_together_are_the_decoded_text(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 1), max_size=24))  # two that the vocabulary lacks
    skip = data.draw(st.booleans())
    stream = tokenizer.stream(skip)
    assert "".join([*map(stream.push, ids), stream.flush()]) == tokenizer.decode(ids, skip)
    assert [*map(stream.push, ids), stream.flush()] == [*map(stream.push, ids), stream.flush()], "it starts anew"


def test_a_run_of_bytes_is_given_when_it_has_ended(tmp_path):
    """The library gives a run as characters only if all of it is UTF-8; one wrong byte makes every byte U+FFFD."""
    tokenizer = saved(tmp_path, byte_fallback())
    whole = [tokenizer.token_id(f"<0x{byte:02X}>") for byte in "你".encode()]
    assert pushed(tokenizer, [*whole, tokenizer.token_id("a")]) == ["", "", "", "你a", ""]
    assert pushed(tokenizer, [*whole, tokenizer.token_id("<0xFF>")]) == ["", "", "", "", "\ufffd" * 4]


def gguf_array(data: bytes, key: str):
    """The strings or 32-bit integers of a GGUF file's metadata array (see the GGUF specification)."""
    at = data.index(key.encode()) + len(key) + 4
    kind, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if kind != 8:
        return struct.unpack_from(f"<{count}i", data, at)
    out = []
    for _ in range(count):
        (size,) = struct.unpack_from("<Q", data, at)
        out.append(data[at + 8 : at + 8 + size].decode())
        at += 8 + size
    return out


@pytest.mark.parametrize(
    "name", few(["llama-spm", "gpt-2"], ["llama-spm", "gpt-2", "starcoder", "falcon", "deepseek-llm"])
)
def test_published_vocabularies_stream(tmp_path, name):
    path = shared(f"gguf-vocab/ggml-vocab-{name}.gguf")
    data = path.read_bytes()
    tokens, kinds = gguf_array(data, "tokenizer.ggml.tokens"), gguf_array(data, "tokenizer.ggml.token_type")
    bytewise = name == "llama-spm"
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    backend.decoder = decoders.Sequence(SPM) if bytewise else decoders.ByteLevel()
    marked = [(token, kind) for token, kind in zip(tokens, kinds, strict=True) if kind in (2, 3, 4)]
    backend.add_tokens([AddedToken(token, special=kind < 4, normalized=False) for token, kind in marked])
    tokenizer = saved(tmp_path, backend, bos_token=None, eos_token=None)
    texts = (path.with_name(path.name + ".inp")).read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")[:-1]
    lines = (path.with_name(path.name + ".out")).read_text().split("\n")
    for text, line in zip(texts, lines, strict=False):
        ids = [int(number) for number in line.split()]
        assert "".join(pushed(tokenizer, ids)) == tokenizer.decode(ids)
        if name != "deepseek-llm":  # has "ü" as an added token, and the library's decoder takes that for a byte
            assert tokenizer.decode(ids) == text
    rng = random.Random(name)
    single = [i for i, kind in enumerate(kinds) if kind == 6] or [
        i for i, token in enumerate(tokens) if len(token) == 1
    ]
    for _ in range(20):
        ids = [rng.choice(single) if rng.random() < 0.6 else rng.randrange(len(tokens)) for _ in range(60)]
        assert "".join(pushed(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("stream", [True, False])
def test_a_reply_ends_at_the_same_token_whoever_reads_it(stream, tmp_path):
    """`generate` and `stream_generate`: the bytes of a character may end a stop string, and their run goes on."""
    tokenizer = saved(tmp_path, byte_fallback())
    assert tokenizer.stream
    reader = tokenizer if stream else types.SimpleNamespace(decode=tokenizer.decode)
    generator = random.Random(1)
    stopped = 0
    for _ in range(100):
        text = "".join(generator.choice(["日", "本", "a", " b", "é"]) for _ in range(6))
        ids, word = tokenizer.encode(text, add_special_tokens=False), generator.choice(["日", "本a", "é", "a b", "zz"])
        text = tokenizer.decode(ids)
        reply, read = ReplyText(reader, [word]), []
        for place, token in enumerate(ids):
            shown, reason = reply.push(token, "length" if place == len(ids) - 1 else None)
            read.append(shown)
            if reason is not None:
                break
        tokens, reasons = [[]], ["interrupted"]
        collect(steps_of(ids), tokens, reasons, [word], reader)
        assert (tokens[0], reasons[0]) == (ids[: place + 1], reason)
        assert "".join(read) == (text.partition(word)[0] if reason == "stop" else text)
        assert (reason == "stop") == (word in text)
        stopped += reason == "stop"
    assert stopped


def steps_of(ids):
    for place, token in enumerate(ids):
        finished = {0: "length"} if place == len(ids) - 1 else {}
        if (yield Emitted([(0, token)], finished, None)):
            return
