"""Tokens that stand only in the files beside tokenizer.json: the same ids, flags and roles as transformers gives."""

from __future__ import annotations

import itertools
import json

import pytest
from grids import few
from test_text import byte_fallback, byte_level, saved
from tokenizers import AddedToken

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.text import Tokenizer

TEXTS = ["a <x>b<y> c", "<x><s>the <z>  b</s>"]
X = {"content": "<x>", "lstrip": True, "rstrip": False, "single_word": False, "normalized": False, "special": True}


OBJECT = X | {"__type": "AddedToken"}
OLD, NEW = "additional_special_tokens", "extra_special_tokens"
LISTS = [
    {"config": {OLD: ["<z>"], NEW: {"image_token": "<x>"}}, "map": {OLD: ["<y>"]}},
    {"config": {NEW: {"image_token": "<x>"}}, "map": {OLD: ["<y>"]}},
    {"config": {OLD: ["<z>"]}, "map": {OLD: ["<y>"]}},
    {"config": {OLD: []}, "map": {OLD: ["<y>"]}},
    {"config": {NEW: []}, "map": {OLD: ["<y>"]}},
    {"config": {NEW: ["<x>"]}, "map": {NEW: ["<x>", "<y>"], OLD: ["<z>"]}},
    {"config": {NEW: ["<x>"]}, "map": {NEW: {"image_token": "<y>"}, OLD: ["<z>"]}},
    {"config": {OLD: [OBJECT]}, "added": {"<x>": 300}},
    {"config": {NEW: [OBJECT, "<y>"]}, "added": {"<x>": 300, "<y>": 301}},
    {"config": {NEW: {"image_token": "<x>"}, OLD: ["<y>"]}, "added": {"<x>": 300, "<y>": 301}},
    {"config": {"pad_token": OBJECT}, "added": {"<x>": 300}},
    {"map": {NEW: [{"content": "<x>"}], OLD: ["<y>"]}, "added": {"<x>": 300, "<y>": 301}},
]
"""Lists of tokens without a role, under the older name and the newer one, in two files, and with an id in a third."""


def listed(backend, **contents):
    """An `added_tokens_decoder`: new tokens get the next ids."""
    following = iter(range(backend.get_vocab_size(), 10_000))
    out = {}
    for content, flags in contents.items():
        number = backend.token_to_id(content)
        out[str(next(following) if number is None else number)] = {**X, "content": content} | flags
    return out


def beside(backend) -> dict[str, dict]:
    """Name of a case -> what the three files hold."""
    ids = {flags["content"]: int(number) for number, flags in listed(backend, **{"<x>": {}, "<y>": {}}).items()}
    role = {"pad_token": "<x>", "image_token": "<y>"}
    return {
        "decoder": {"config": {"added_tokens_decoder": listed(backend, **{"<x>": {}, "<y>": {"special": False}})}},
        "decoder, and a map that is not read": {
            "config": {"added_tokens_decoder": listed(backend, **{"<x>": {}})},
            "map": {"pad_token": "<y>"},
        },
        "flags that differ": {
            "config": {"added_tokens_decoder": listed(backend, **{"<s>": {"rstrip": True, "special": False}})}
        },
        "map": {"map": role | {"additional_special_tokens": ["<z>"]}},
        "map over config": {"config": {"pad_token": "<y>", "image_token": "<x>"}, "map": role | {"sep_token": X}},
        "added": {"added": ids, "map": {"pad_token": "<y>"}},
        "extra": {"config": {"extra_special_tokens": ["<z>", "<x>"]}},
        "extra by role": {
            "config": {"extra_special_tokens": {"image_token": "<z>"}, "additional_special_tokens": ["<y>"]}
        },
        **{f"lists {number}": case for number, case in enumerate(LISTS)},
        "split": {"config": {"split_special_tokens": True, "pad_token": "<x>"}},
    }


NAMES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def write(folder, backend, case):
    backend.save(str(folder / "tokenizer.json"))
    for name, key in zip(NAMES, ("config", "map", "added"), strict=True):
        if key in case or key == "config":
            (folder / name).write_text(json.dumps(case.get(key, {})))
    return folder


KINDS = list(itertools.product((byte_level, byte_fallback), (False, True)))
CASES = list(beside(byte_level()))


@pytest.mark.parametrize(
    ("name", "make", "there"),
    few(
        [(name, *kind) for name, kind in zip(CASES, itertools.cycle(KINDS))],
        [(name, *kind) for name in CASES for kind in KINDS],
    ),
    ids={False: "new", True: "other flags in tokenizer.json"}.get,
)
@pytest.mark.filterwarnings("ignore:.* is listed with id 30")
def test_the_view_is_that_of_transformers(tmp_path, name, make, there):
    transformers = pytest.importorskip("transformers")
    backend = make()
    if there:
        backend.add_tokens([AddedToken("<x>", special=False, rstrip=True)])
    write(tmp_path, backend, beside(backend)[name])
    theirs, ours = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path), Tokenizer(tmp_path)
    assert ours.special_tokens == theirs.special_tokens_map and ours.vocab_size == len(theirs)
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert ours.encode(text) == ids
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
            stream = ours.stream(skip)
            assert "".join([*map(stream.push, ids), stream.flush()]) == ours.decode(ids, skip)


def test_an_id_that_the_library_gives_otherwise_is_said(tmp_path):
    write(tmp_path, byte_level(), {"config": {"added_tokens_decoder": {"999": X}}})
    with pytest.warns(UserWarning, match=r"token <x> is listed with id 999 and has id 262"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("config", {"added_tokens_decoder": []}, r"tokenizer_config\.json: added_tokens_decoder is \[\]"),
        ("config", {"added_tokens_decoder": {"x": X}}, r"added_tokens_decoder: 'x'"),
        ("config", {"added_tokens_decoder": {"5": {"special": True}}}, "neither a text nor an object with a content"),
        ("config", {"added_tokens_decoder": {"5": X | {"special": "no"}}}, "special is 'no', neither true nor false"),
        ("config", {"eos_token": 5}, "eos_token is 5"),
        ("config", {"pad_token": "\ud800"}, "half a surrogate pair"),
        ("config", {"extra_special_tokens": "<x>"}, "no list of tokens"),
        ("config", {"add_bos_token": "false"}, "add_bos_token is 'false', neither true nor false"),
        ("map", {"pad_token": []}, r"special_tokens_map\.json: pad_token is \[\]"),
        ("added", {"<x>": "5"}, r"added_tokens\.json: '<x>' has the id '5'"),
    ],
)
def test_what_is_no_token_is_refused_by_file_and_key(tmp_path, key, value, said):
    write(tmp_path, byte_level(), {key: value})
    with pytest.raises(UserError, match=said):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file["model"].update(continuing_subword_prefix="é" * 50),  # panics when it is read
        lambda file: file["post_processor"]["special_tokens"].clear(),  # panics when a text is encoded
        lambda file: file.update(pre_tokenizer={"type": "FixedLength", "length": 0}),  # not when it is empty
    ],
)
def test_a_file_that_makes_the_library_panic_is_one_error(tmp_path, change, capfd):
    path = write(tmp_path, byte_level(bos_by_processor=True), {}) / "tokenizer.json"
    file = json.loads(path.read_text())
    change(file)
    path.write_text(json.dumps(file))
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer; download or save it again"):
        Tokenizer(tmp_path)
    assert capfd.readouterr().err == "", "the library's own lines are not shown"


def test_merges_are_not_dropped_at_random(tmp_path):
    backend = byte_level()
    plain = saved(tmp_path / "plain", backend).encode("the inthe" * 8)
    backend.model.dropout = 0.5
    assert saved(tmp_path / "dropout", backend).encode("the inthe" * 8) == plain
