"""Text: the same ids and prompts as transformers gives, streaming that splits no character, templates in a sandbox."""

from __future__ import annotations

import json
import types

import numpy as np
import pytest
from grids import examples
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.text import Tokenizer, eos_ids

SAMPLES = ["To be, or not", " leading", "naïve 你好 🙂!", "", "<s> literal </s>", "a\n\n  b"]


def byte_level(bos_by_processor: bool = False) -> Backend:
    """GPT-2's kind: every byte is a token, merges join some, characters beyond ASCII are split."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("Ġ", "t"), ("i", "n"), ("Ġt", "he")]
    vocab = {c: i for i, c in enumerate([*alphabet, *(a + b for a, b in merges)])}
    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    return with_bos(backend) if bos_by_processor else backend


def with_bos(backend: Backend) -> Backend:
    bos = ("<s>", backend.token_to_id("<s>"))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    return backend


def byte_fallback(bos_by_processor: bool = False) -> Backend:
    """SentencePiece's kind: metaspace words, unknown characters as byte tokens, the first space dropped."""
    pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a", "▁b", "▁ab"]
    merges = [("▁", "a"), ("▁", "b"), ("▁a", "b")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<s>", "</s>"])
    return with_bos(backend) if bos_by_processor else backend


def saved(folder, backend: Backend, **config) -> Tokenizer:
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(folder)


@pytest.mark.parametrize("by_processor", [False, True])
@pytest.mark.parametrize(("flag", "first"), [(None, None), (True, True), (False, False)])
def test_bos_is_put_as_the_files_say(tmp_path, by_processor, flag, first):
    config = {} if flag is None else {"add_bos_token": flag}
    tokenizer = saved(tmp_path, byte_level(by_processor), **config)
    expected = by_processor if first is None else first
    for text in ("hi there", ""):
        ids = tokenizer.encode(text)
        assert ids.count(tokenizer.bos_id) == expected and (not expected or ids[0] == tokenizer.bos_id)
        assert tokenizer.decode(ids) == text
    assert tokenizer.bos_id not in tokenizer.encode("hi", add_special_tokens=False)
    literal = tokenizer.encode("<s>hi").count(tokenizer.bos_id)
    assert literal == (2 if by_processor and flag is not False else 1), "a literal <s> in the text is the user's own"


def test_a_flag_takes_away_what_the_processor_put_and_nothing_else(tmp_path):
    """The processor ends a text, and begins none: a literal <s> is the user's own."""
    backend = byte_level()
    end = ("</s>", backend.token_to_id("</s>"))
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A $B", special_tokens=[end])
    tokenizer = saved(tmp_path, backend, add_bos_token=False)
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    assert tokenizer.encode("<s>hi") == [bos, *tokenizer.encode("hi", add_special_tokens=False), eos]
    assert tokenizer.encode("<s><s>") == [bos, bos, eos] and tokenizer.encode("hi")[-1] == eos


@pytest.mark.parametrize("processor", [False, True])
@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_ids_equal_transformers(tmp_path, kind, processor):
    transformers = pytest.importorskip("transformers")
    backend = byte_fallback(processor) if kind == "llama" else byte_level(processor)
    tokens = {"bos_token": "<s>", "eos_token": "</s>"} | ({"unk_token": "<unk>"} if kind == "llama" else {})
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
    theirs.save_pretrained(tmp_path)
    if kind == "llama":  # as Mixtral's is published; the flag agrees with tokenizer.json
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        config |= {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": processor, "add_eos_token": False}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs("a").input_ids[0] == theirs.bos_token_id) == processor
    ours = Tokenizer(tmp_path)
    for text in [*SAMPLES, "ab b a"]:
        assert ours.encode(text) == theirs(text).input_ids, text
        assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False).input_ids
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)


CHATML = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}\n"
    "{{ bos_token if loop.first }}<|{{ m.role }}|>\n"
    "{% generation %}{{ m.content | trim }}{% endgeneration %}{{ eos_token }}\n"
    "{% if loop.index > 8 %}{% break %}{% endif %}{% endfor %}"
    "{{ {'a': '<é>'} | tojson }}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TALK = [{"role": "user", "content": " Hello & <you> "}, {"role": "assistant", "content": "Hi"}]


@pytest.mark.parametrize("place", ["file", "config", "named"])
def test_chat_prompt_equals_transformers(tmp_path, place):
    where = {
        "config": CHATML,
        "named": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}],
    }
    config = {"chat_template": where[place]} if place in where else {}
    ours = saved(tmp_path, byte_level(), **config)
    if place == "file":
        assert not ours.has_chat_template
        (tmp_path / "chat_template.jinja").write_text(CHATML)
        ours = Tokenizer(tmp_path)
    text = ours.apply_chat_template(TALK)
    assert text.startswith("<s><|user|>\nHello & <you></s>") and text.endswith('{"a": "<é>"}<|assistant|>\n')
    assert ours.apply_chat_template(TALK, add_generation_prompt=False) == text.removesuffix("<|assistant|>\n")
    assert ours.encode_chat(TALK).count(ours.bos_id) == 1
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level(), bos_token="<s>", eos_token="</s>")
    theirs.chat_template = CHATML
    assert text == theirs.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "chat template"),
        ("{{ messages.append(1) }}", "chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for m in messages %}", "chat template"),
        (None, "no chat template"),
    ],
)
def test_hostile_and_broken_templates_are_refused(tmp_path, template, message):
    tokenizer = saved(tmp_path, byte_level(), **({"chat_template": template} if template else {}))
    with pytest.raises(UserError, match=message):
        tokenizer.apply_chat_template(TALK)


def pushed(tokenizer: Tokenizer, ids) -> list[str]:
    stream = tokenizer.stream()
    return [*(stream.push(i) for i in ids), stream.flush()]


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_no_character_is_split(tmp_path, make):
    tokenizer = saved(tmp_path, make())
    text = "a b 你🙂 é ab"
    ids = tokenizer.encode(text)
    parts = pushed(tokenizer, ids)
    assert "".join(parts) == text == tokenizer.decode(ids)
    assert not any("\ufffd" in part for part in parts)
    assert any("你" in part for part in parts) and any("🙂" in part for part in parts) and "" in parts
    assert sum(bool(part) for part in parts[:4]) >= 3, "plain text must not be held back"


def test_flush_gives_what_never_became_a_character(tmp_path):
    tokenizer = saved(tmp_path, byte_level())
    ids = tokenizer.encode("ok 🙂")[:-1]
    stream = tokenizer.stream()
    assert "".join(stream.push(i) for i in ids) == "ok "
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""
    assert stream.push(tokenizer.token_id("b")) == "b", "a flushed stream starts anew"


def test_special_tokens_are_shown_only_when_asked(tmp_path):
    tokenizer = saved(tmp_path, byte_level())
    ids = [tokenizer.token_id("b"), tokenizer.eos_id, tokenizer.token_id("a")]
    assert pushed(tokenizer, ids) == ["b", "", "a", ""]
    stream = tokenizer.stream(skip_special_tokens=False)
    assert "".join(stream.push(i) for i in ids) == "b</s>a"


@pytest.fixture(scope="module")
def bytes_tokenizer(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("bytes"), byte_level())


@examples(200)
@given(data=st.data())
def test_streamed_text_is_the_decoded_text(bytes_tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, bytes_tokenizer.vocab_size - 1), max_size=40))
    assert "".join(pushed(bytes_tokenizer, ids)) == bytes_tokenizer.decode(ids)


def test_eos_comes_from_the_first_place_that_knows(tmp_path):
    tokenizer = saved(tmp_path, byte_level())
    config, silent = types.SimpleNamespace(eos_token_id=7), types.SimpleNamespace(eos_token_id=None)
    assert eos_ids({"eos_token_id": [5, 6]}, tokenizer, config) == (5, 6)
    assert eos_ids({"eos_token_id": 0}, tokenizer, config) == (0,)
    assert eos_ids({}, tokenizer, config) == (7,)
    assert eos_ids({"eos_token_id": None}, tokenizer, silent) == (tokenizer.eos_id,)
    assert eos_ids({}, None, silent) == ()


def test_damaged_and_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json: no such file$"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(UserError, match=r"tokenizer\.model alone is not read"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer(tmp_path)
    saved(tmp_path, byte_level())
    deep = "[" * 100_000 + "]" * 100_000
    wrong = '{"chat_template": 5}', "chat_template is no text"
    for text, why in (("{", "not valid JSON"), (deep, "not valid JSON"), ("[]", "not a JSON object"), wrong):
        (tmp_path / "tokenizer_config.json").write_text(text)
        with pytest.raises(UserError, match=rf"tokenizer_config\.json: {why}"):
            Tokenizer(tmp_path)


def test_two_tokens_of_one_id_are_refused(tmp_path):
    """The library decodes the id to either, another one at each load."""
    byte_level().save(str(tmp_path / "tokenizer.json"))
    damaged = json.loads((tmp_path / "tokenizer.json").read_text())
    damaged["model"]["vocab"]["A"] = damaged["model"]["vocab"]["!"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(damaged))
    with pytest.raises(UserError, match=r"tokenizer\.json: the tokens '!' and 'A' have one id, 0; download or save"):
        Tokenizer(tmp_path)


def test_truncation_and_padding_saved_in_the_file_are_for_batches_not_prompts(tmp_path):
    backend = byte_level()
    plain = saved(tmp_path / "plain", backend).encode("hi there")
    backend.enable_truncation(4)
    backend.enable_padding(length=80)
    assert saved(tmp_path / "saved", backend).encode("hi there") == plain
    assert len(plain) not in (4, 80)


def test_what_is_no_text_and_no_id_is_refused(bytes_tokenizer):
    for text in ("a\ud800", b"x", 5, None):
        with pytest.raises(UserError, match="a text is wanted"):
            bytes_tokenizer.encode(text)
    for token in (5.7, 1.0, "5", "x", None, True, float("nan"), -1, 10**30, np.complex64(1)):
        with pytest.raises(UserError, match="token ids must be whole numbers"):
            bytes_tokenizer.decode([token])
        with pytest.raises(UserError, match="token ids must be whole numbers"):
            bytes_tokenizer.stream().push(token)
    for ids in (b"x", "x", 5, None, bytearray(b"x"), {}):
        with pytest.raises(UserError, match="token ids are wanted"):
            bytes_tokenizer.decode(ids)
    assert bytes_tokenizer.decode(np.array([72, 105])) == bytes_tokenizer.decode([72, 105])
