"""Headers of safetensors files: what the `safetensors` library refuses is refused, what it reads is read the same."""

import json
import struct

import pytest
from safetensors import safe_open

from hybrimoe_jax.checkpoint.safetensors_header import BITS, read_entries
from hybrimoe_jax.errors import UserError


def entry(kind="F32", shape=(2,), place=(0, 8), **more) -> str:
    return json.dumps({"dtype": kind, "shape": list(shape), "data_offsets": list(place), **more})


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def header(*entries: tuple[str, str]) -> str:
    """Of names, as JSON spells them, and entries."""
    return "{" + ", ".join(f'"{name}": {text}' for name, text in entries) + "}"


def one(text: str) -> str:
    return header(("a", text))


def two(first: str, second: str) -> str:
    return header(("a", first), ("b", second))


HEADERS = [
    "[]",
    "{",
    '{"a": 1}',
    "[" * 5000,
    "\ufeff{}",
    one(entry()),
    f"  {one(entry())}\n",
    one(entry()) + "\0",
    one(entry(shape=(2, 1, 1))),
    one(entry(shape=())),
    one(entry(shape=(3,))),
    one(entry(shape=(-2,))),
    one(entry(shape=(2.0,))),
    one(entry(shape=("2",))),
    one(entry(shape=(True, 2))),
    one(entry(shape=(10**12,))),
    one(entry(shape=(2**64,))),
    one(entry(shape=(2**63, 4, 0), place=(0, 0))),
    one(entry(shape=(0, 2**63, 4), place=(0, 0))),
    one(entry(place=(8, 0))),
    one(entry(place=(0, 8, 9))),
    one(entry(place=(False, 8))),
    one(entry(shape=(1,), place=(0, 4))),
    one(entry(shape=(1,), place=(4, 8))),
    one(entry(more=1e300)),
    one(entry(more=float("nan"))),
    one(entry().replace("8]", "1e999]")),
    one(entry().replace("[0", "[-0")),
    one(entry().replace('"shape"', '"shape": [2], "shape"')),
    one('{"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}'),
    one('{"dtype": "F32", "shape": {"2": 2}, "data_offsets": [0, 8]}'),
    one('{"dtype": "F32", "shape": [2]}'),
    one(entry(more=0).replace(" 0}", nested(125) + "}")),
    one(entry(more=0).replace(" 0}", nested(126) + "}")),
    header(("\\ud800", entry())),
    header(("\\ud83d\\ude00", entry())),
    header(("__metadata__", '{"x": "y"}'), ("a", entry())),
    header(("__metadata__", "null"), ("a", entry())),
    header(("__metadata__", '{"x": 1}'), ("a", entry())),
    header(("__metadata__", '["x"]'), ("a", entry())),
    two(entry(shape=(1,), place=(0, 4)), entry(shape=(1,), place=(4, 8))),
    two(entry(shape=(1,), place=(4, 8)), entry(shape=(1,), place=(0, 4))),
    two(entry(), entry()),
    two(entry(), entry(shape=(1,), place=(4, 8))),
    two(entry(shape=(1,), place=(0, 4)), entry(shape=(1,), place=(6, 10))),
    two(entry(), entry(shape=(0,), place=(8, 8))),
    *(one(entry(kind, shape=(64 // bits,))) for kind, bits in BITS.items()),
    *(one(entry(kind, shape=(12,))) for kind in BITS),
    one(entry("F4", shape=(15,))),
    one(entry("f32")),
    one(entry("I4", shape=(16,))),
]


@pytest.mark.parametrize("given", HEADERS)
def test_it_reads_what_the_library_reads(tmp_path, given):
    path, text = tmp_path / "x.safetensors", given.encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
    try:
        with safe_open(path, "np") as file:
            official = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except Exception:
        official = None
    try:
        ours = {name: entry.shape for name, entry in read_entries(path).items()}
    except UserError as error:
        ours = None
        assert str(path) in str(error) and len(str(error)) < 500
    assert ours == official


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "0 bytes is too short"),
        (struct.pack("<Q", 2**63) + b"{}", "its header claims"),
        (struct.pack("<Q", 3) + b"{}", "its header claims 3 bytes but the file has 10"),
    ],
)
def test_a_file_without_room_for_its_header_is_refused(tmp_path, text, why):
    (tmp_path / "x").write_bytes(text)
    with pytest.raises(UserError, match=why):
        read_entries(tmp_path / "x")


def test_a_name_that_stands_twice_is_refused(tmp_path):
    """The library takes the last one, others the first."""
    text = header(("a", entry()), ("a", entry("I64", (1,)))).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
    with pytest.raises(UserError, match="its header has a twice"):
        read_entries(tmp_path / "x")
