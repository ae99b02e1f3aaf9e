"""Headers of GGUF files: what PyPI's `gguf` refuses is refused, what it reads is read the same, and what llama.cpp
refuses beyond it is refused too."""

import struct

import numpy as np
import pytest

from hybrimoe_jax.checkpoint.gguf.header import Array, read_gguf
from hybrimoe_jax.errors import UserError

gguf = pytest.importorskip("gguf")
TYPES = {kind.value: (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
U32, F32_KEY, BOOL, TEXT, ARRAY, U64 = 4, 6, 7, 8, 9, 10


def text(value) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def key(name, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, items: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + items


def tensor(name="a", dims=(8,), kind=0, offset=0, axes=None) -> bytes:
    axes = len(dims) if axes is None else axes
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", axes, *dims, kind, offset)


def file(keys=(), tensors=(), data=64, magic=b"GGUF", version=3, counts=None, align=32) -> bytes:
    tensor_count, key_count = counts or (len(tensors), len(keys))
    head = magic + struct.pack("<IQQ", version, tensor_count, key_count) + b"".join(keys) + b"".join(tensors)
    return head + b"\0" * (-len(head) % align) + bytes(range(data))


NAME = key("general.architecture", TEXT, text("x"))
TWO = [tensor(), tensor("b", offset=32)]
READ = {
    "nothing": file(),
    "a key": file([NAME]),
    "every kind": file(
        [
            NAME,
            key("u", U32, struct.pack("<I", 7)),
            key("f", F32_KEY, struct.pack("<f", 0.1)),
            key("b", BOOL, b"\1"),
            key("w", U64, struct.pack("<Q", 2**63)),
            key("l", ARRAY, array(TEXT, 2, text("ab") + text(""))),
            key("n", ARRAY, array(U32, 3, b"\0" * 12)),
            key("none", ARRAY, array(U32, 0, b"")),
        ],
        [tensor()],
    ),
    "version 2": file([NAME], [tensor()], version=2),
    "blocks": file([NAME], [tensor("a", (32, 2), 8)], data=68),
    "two": file([NAME], TWO),
    "aligned to 64": file([key("general.alignment", U32, struct.pack("<I", 64))], [tensor()], align=64),
    "bytes behind": file([NAME], [tensor()], data=99),
}
REFUSED = {
    "no magic": (file(magic=b"GGML"), "does not begin with GGUF"),
    "cut": (file()[:20], "too short"),
    "version 1": (file(version=1), "of version 1"),
    "version 4": (file(version=4), "of version 4"),
    "version 0": (file(version=0), "of version 0"),
    "2^40 keys": (file([NAME], counts=(0, 2**40)), "keys are said to be 1099511627776"),
    "2^60 tensors": (file([NAME], counts=(2**60, 1)), "tensors are said to be"),
    "long text": (file([struct.pack("<Q", 2**50) + b"x" * 20]), "characters of the name of key 0 are said to be"),
    "long array": (file([key("a", ARRAY, array(U32, 2**50, b"")) + b"\0" * 9]), "items of a are said to be"),
    "long array of texts": (file([key("a", ARRAY, array(TEXT, 2**40, text("x")))]), "items of a are said to be"),
    "a key twice": (file([NAME, NAME]), "general.architecture is there twice"),
    "an unknown type": (file([key("a", 99, b"\0" * 8)]), "a is of the unknown type 99"),
    "an array of unknowns": (file([key("a", ARRAY, array(13, 1, b"\0" * 8))]), "unknown type 13"),
    "a name that is no UTF-8": (file([key(b"\xff", U32, b"\0" * 4)]), "name of key 0 is not UTF-8"),
    "a value that is no UTF-8": (file([key("a", TEXT, text(b"\xff"))]), "a is not UTF-8"),
    "alignment 48": (file([key("general.alignment", U32, struct.pack("<I", 48))]), "no power of two"),
    "alignment 0": (file([key("general.alignment", U32, struct.pack("<I", 0))]), "no power of two"),
    "alignment of another type": (file([key("general.alignment", U64, struct.pack("<Q", 32))]), "no power of two"),
    "a tensor twice": (file([NAME], [tensor(), tensor(offset=32)]), "the tensor a is there twice"),
    "an unknown type of tensor": (file([NAME], [tensor(kind=99)]), "a is of the unknown type 99"),
    "a shape of 10^12": (file([NAME], [tensor(dims=(10**12,))]), "a ends at 4000000"),
    "a shape of 2^64": (file([NAME], [tensor(dims=(2**32, 2**32))]), "a ends at"),
    "2^32 axes": (file([NAME], [tensor(axes=2**32 - 1)]), "a has 4294967295 axes"),
    "half a block": (file([NAME], [tensor("a", (40, 2), 8)]), r"a is Q8_0 of shape \[2, 40\]"),
    "past the end": (file([NAME], [tensor(dims=(32,))]), "a ends at"),
    "an offset past the end": (file([NAME], [tensor(offset=2**50)]), "said to lie at"),
}
STRICTER = {
    "one tensor within another": (file([NAME], [tensor(), tensor("b")]), "b is said to lie at 0, .* end at 32"),
    "a gap": (file([NAME], [tensor(), tensor("b", (4,), offset=48)]), "b is said to lie at 48"),
    "another order": (file([NAME], [tensor(offset=32), tensor("b")]), "a is said to lie at 32"),
    "not aligned": (file([NAME], [tensor(dims=(1,)), tensor("b", (1,), offset=4)]), "b is said to lie at 4"),
    "arrays in arrays": (file([key("a", ARRAY, array(ARRAY, 1, array(U32, 1, b"\0" * 4)))]), "type array"),
    "five axes": (file([NAME], [tensor(dims=(1,) * 5)]), "a has 5 axes"),
    "no elements": (file([NAME], [tensor(dims=(4, 0))]), r"a is F32 of shape \[0, 4\]"),
}


def official(path):
    """The fields and tensors as `gguf` reads them."""
    reader = gguf.GGUFReader(path)
    fields = {}
    for name, field in reader.fields.items():
        value = field.contents()
        fields[name] = Array(field.types[-1].value, len(field.data)) if field.types[0].value == ARRAY else value
    places = {
        t.name: (t.tensor_type.name, tuple(t.shape.tolist()[::-1]), t.data_offset, t.n_bytes) for t in reader.tensors
    }
    return {name: value for name, value in fields.items() if not name.startswith("GGUF.")}, places


@pytest.mark.parametrize("case", READ)
def test_it_reads_what_the_library_reads(tmp_path, case):
    path = tmp_path / "x.gguf"
    path.write_bytes(READ[case])
    header = read_gguf(path, TYPES)
    fields, places = official(path)
    assert header.tensors == places
    empty = {name for name, value in header.fields.items() if isinstance(value, Array) and not value.length}
    assert header.fields.keys() == fields.keys()  # the library does not say what an empty array holds
    assert all(header.fields[name] == fields[name] for name in fields.keys() - empty)


@pytest.mark.parametrize("case", REFUSED | STRICTER)
def test_it_refuses_what_the_library_and_llama_cpp_refuse(tmp_path, case):
    path = tmp_path / "x.gguf"
    data, why = (REFUSED | STRICTER)[case]
    path.write_bytes(data)
    with pytest.raises(UserError, match=why) as caught:
        read_gguf(path, TYPES)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 500
    if case in STRICTER:
        official(path)
    elif not case.startswith("2^"):  # which the library takes hours, or all memory, to find out
        with pytest.raises((ValueError, KeyError, IndexError, OverflowError, MemoryError)), np.errstate(all="ignore"):
            official(path)


def test_big_endian_files_are_refused_by_that_name(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen3moe", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("a", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="big-endian byte order is not supported; take the little-endian file"):
        read_gguf(tmp_path / "x.gguf", TYPES)
