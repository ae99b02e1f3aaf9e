"""GGUF files. The reference is a reader of the format's own rules, below: what it refuses is refused.

Of what it reads every tensor is read alike. Source of the rules: the format's description in ggml (docs/gguf.md), and
ggml's gguf.cpp, which refuses tensors that lie elsewhere than at the running sum of those before.
"""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import gguf_files as written
import numpy as np
from fuzz.mutate import NUMBERS, WORDS, brief, change_bytes
from fuzz.worker import Case, Wrong

SIZES = {0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 30: (1, 2)}
"""Type -> weights of a block, bytes of a block."""
SIMPLE = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
CODES = {code: number for number, code in SIMPLE.items()}


class Refused(Exception):
    """The file breaks a rule of the format."""


class Reader:
    """Fields and tensors of a GGUF file of version 2 or 3; `tensors`: name -> (shape, type, offset in the data)."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0
        try:
            magic, version = self.take(4), self.number("I")
            if magic != b"GGUF" or version not in (2, 3):
                raise Refused("magic or version")
            count, fields = self.number("Q"), self.number("Q")
            self.fields: dict[str, tuple[int, Any]] = {}
            for _ in range(fields):
                key, kind = self.text(), self.number("I")
                if key in self.fields:
                    raise Refused(f"key {key!r} twice")
                self.fields[key] = kind, self.value(kind)
            self.tensors: dict[str, tuple[tuple[int, ...], int, int]] = {}
            for _ in range(count):
                self.tensor()
        except (struct.error, UnicodeDecodeError) as error:
            raise Refused(str(error)) from None
        self.check()

    def take(self, count: int) -> bytes:
        if count < 0 or self.at + count > len(self.data):
            raise Refused("the file ends")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize(code)))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode()

    def value(self, kind: int, deep: bool = False) -> Any:
        if kind in SIMPLE:
            return self.number(SIMPLE[kind])
        if kind == 8:
            return self.text()
        if kind != 9 or deep:
            raise Refused(f"type of value {kind}")
        inner, count = self.number("I"), self.number("Q")
        if count > len(self.data):
            raise Refused("the file ends")
        return [self.value(inner, deep=True) for _ in range(count)]

    def tensor(self) -> None:
        name, axes = self.text(), self.number("I")
        if not 1 <= axes <= 4 or name in self.tensors or len(name.encode()) >= 64:
            raise Refused(f"tensor {name!r}")
        shape = tuple(self.number("Q") for _ in range(axes))
        self.tensors[name] = shape, self.number("I"), self.number("Q")

    def check(self) -> None:
        kind, align = self.fields.get("general.alignment", (4, 32))
        if kind != 4 or align < 1 or align & (align - 1):
            raise Refused("alignment")
        self.begin, end = -(-self.at // align) * align, 0
        for name, (shape, kind, offset) in self.tensors.items():
            if kind not in SIZES or shape[0] % SIZES[kind][0] or offset != end or any(not 0 < n < 2**63 for n in shape):
                raise Refused(f"tensor {name}: type {kind}, shape {shape}, offset {offset}")
            end += -(-self.bytes_of(shape, kind) // align) * align
            if self.begin + offset + self.bytes_of(shape, kind) > len(self.data):
                raise Refused(f"{name}: the file ends")

    @staticmethod
    def bytes_of(shape: tuple[int, ...], kind: int) -> int:
        count = 1
        for n in shape:
            count *= n
        return count // SIZES[kind][0] * SIZES[kind][1]

    def stored(self, name: str) -> bytes:
        shape, kind, offset = self.tensors[name]
        return self.data[self.begin + offset : self.begin + offset + self.bytes_of(shape, kind)]

    def floats(self, name: str) -> np.ndarray:
        """The values of a tensor in F32 or Q8_0, flat."""
        raw = np.frombuffer(self.stored(name), np.uint8)
        if self.tensors[name][1] == 0:
            return raw.view("<f4")
        blocks = raw.reshape(-1, 34)
        scales = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
        with np.errstate(invalid="ignore"):
            return (scales * np.ascontiguousarray(blocks[:, 2:]).view(np.int8)).ravel()


def build(fields: list, tensors: list, data: bytes, version: int = 3, order: str = "<", counts=(0, 0)) -> bytes:
    """The file of [(key, type, value)], [(name, shape, type, offset)] and the data behind them."""
    out = [b"GGUF", struct.pack(order + "I", version)]
    out.append(struct.pack(order + "QQ", (len(tensors) + counts[0]) % 2**64, (len(fields) + counts[1]) % 2**64))

    def text(word: str) -> bytes:
        raw = word.encode("utf-8", "surrogatepass")
        return struct.pack(order + "Q", len(raw)) + raw

    def value(kind: int, what: Any) -> bytes:
        if kind == 8:
            return text(what)
        if kind == 9:
            return struct.pack(order + "IQ", 4, len(what)) + b"".join(value(4, n) for n in what)
        return struct.pack(order + SIMPLE[kind], what)

    for key, kind, what in fields:
        out.append(text(key) + struct.pack(order + "I", kind) + value(kind, what))
    for name, shape, kind, offset in tensors:
        shape = struct.pack(order + f"I{len(shape)}Q", len(shape), *shape)
        out.append(text(name) + shape + struct.pack(order + "IQ", kind % 2**32, offset % 2**64))
    head = b"".join(out)
    return head + bytes(-len(head) % 32) + data


class Kind:
    """Files of tiny models of two architectures."""

    def __init__(self, base: Path):
        self.bases = []
        for arch, kind in (("qwen3moe", "Q8_0"), ("qwen2moe", "F32")):
            written.write(base / "m.gguf", arch, kind)
            read = Reader((base / "m.gguf").read_bytes())
            fields = [(key, kind, value) for key, (kind, value) in read.fields.items()]
            tensors = [(name, *entry) for name, entry in read.tensors.items()]
            self.bases.append((fields, tensors, read.data[read.begin :]))
            self.compare(base / "m.gguf", read.data)

    def case(self, rng: random.Random, folder: Path) -> Case:
        fields, tensors, data = rng.choice(self.bases)
        fields, tensors, version, order, counts = list(fields), list(tensors), 3, "<", (0, 0)
        how, what = rng.choice(("field", "field", "tensor", "tensor", "again", "lie", "bytes", "harmless")), ""
        if how == "field":
            what = self.change_field(rng, fields)
        elif how == "tensor":
            what = self.change_tensor(rng, tensors)
        elif how == "again":
            what, data = self.once_more(rng, tensors, data)
        elif how == "lie":
            version, order = rng.choice(((1, "<"), (3, ">"), (2, "<"), (4, "<"), (3, "<")))
            counts = rng.choice(((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1), (2**32, 0), (0, 2**32), (2**63, 2**63)))
            data = rng.choice((data, data[:-1], data[:100], data + bytes(64), b""))
            what = f"version {version}, byte order {order}, counts {counts} more, {len(data)} bytes of data"
        elif how == "harmless":
            rng.shuffle(fields)
            fields.append(("general.name", 8, "a name"))
            fields = [f for i, f in enumerate(fields) if f[0] not in {g[0] for g in fields[:i]}]
            what = "fields in another order, and a name"
        whole = build(fields, tensors, data, version, order, counts)
        if how == "bytes":
            whole, what = change_bytes(rng, whole, rng.choice((40, 2000, len(whole) - len(data), None)))
        path = folder / "m.gguf"
        path.write_bytes(whole)
        return Case(f"{how}: {what}", lambda: self.compare(path, whole, how == "harmless"), ("m.gguf", "config.json"))

    def change_field(self, rng: random.Random, fields: list) -> str:
        at = rng.randrange(len(fields))
        key, kind, value = fields[at]
        how = rng.choice(("value", "value", "value", "type", "drop", "twice", "key", "more"))
        if how == "drop":
            del fields[at]
        elif how == "twice":
            fields.append(fields[at])
        elif how == "key":
            fields[at] = rng.choice((*WORDS[:8], key + "x")), kind, value
        elif how == "more":
            arch = dict((f[0], f[2]) for f in fields)["general.architecture"]
            name = rng.choice(
                ("attention.sliding_window", "rope.scaling.factor", "expert_weights_scale", "logit_scale")
            )
            fields.append((f"{arch}.{name}", 6, rng.choice((0.0, 0.5, 2.0, float("nan"), float("inf")))))
        elif how == "type":
            fields[at] = key, 8, str(value)
        elif isinstance(value, str):
            fields[at] = key, kind, rng.choice(WORDS)
        elif kind == 9:
            fields[at] = key, kind, value[:-1]
        else:
            fields[at] = (
                key,
                *rng.choice(
                    [(10, n) for n in NUMBERS if isinstance(n, int) and 0 <= n < 2**64]
                    + [(12, float(n)) for n in NUMBERS]
                    + [(12, float("nan")), (7, True), (5, -1), (9, [1, 2])]
                ),
            )
        return f"{how} {brief(key)}: {brief(fields[at] if at < len(fields) else None)}"

    def change_tensor(self, rng: random.Random, tensors: list) -> str:
        at = rng.randrange(len(tensors))
        name, shape, kind, offset = tensors[at]
        how = rng.choice(("name", "axis", "axes", "type", "offset", "drop", "swap", "twice"))
        if how == "name":
            tensors[at] = rng.choice((name + "x", "blk.9.x.weight", *WORDS)), shape, kind, offset
        elif how == "axis":
            axis = rng.randrange(len(shape))
            size = rng.choice((0, 1, shape[axis] * 2, shape[axis] // 2, 2**32, 2**63, 2**64 - 1, 10**12))
            tensors[at] = name, (*shape[:axis], size, *shape[axis + 1 :]), kind, offset
        elif how == "axes":
            tensors[at] = name, rng.choice((shape[::-1], (*shape, 1), (1,) * 9, (), shape[:1])), kind, offset
        elif how == "type":
            tensors[at] = name, shape, rng.choice((0, 1, 2, 3, 4, 8, 12, 14, 16, 30, 39, 99, -1)), offset
        elif how == "offset":
            tensors[at] = name, shape, kind, rng.choice((0, offset + 32, offset - 32, offset + 1, 2**63, 2**64 - 32))
        elif how == "swap":
            other = rng.randrange(len(tensors))
            tensors[at], tensors[other] = tensors[other], tensors[at]
        elif how == "drop":
            del tensors[at]
        else:
            tensors.append(tensors[at])
        return f"{how} {brief(name)}: {brief(tensors[at] if at < len(tensors) else None)}"

    def once_more(self, rng: random.Random, tensors: list, data: bytes) -> tuple[str, bytes]:
        """A tensor has zeros for a second time, under a name near its own."""
        name, shape, kind, _ = rng.choice(tensors)
        near = (name.replace("blk.", "blk.0"), name.replace("blk.0", "blk.\u0660"), name.replace("blk.0", "blk.+0"))
        other = rng.choice((*near, name.upper(), f" {name}", "output.weight", "model.norm.weight"))
        end = -(-len(data) // 32) * 32
        tensors.append((other, shape, kind, end))
        return f"{name} again as {brief(other)}", data.ljust(end, b"\0") + bytes(Reader.bytes_of(shape, kind) + 31)

    def compare(self, path: Path, data: bytes, fine: bool = False) -> None:
        from hybrimoe_jax.checkpoint.gguf.file import open_gguf
        from hybrimoe_jax.errors import UserError

        try:
            wanted = Reader(data)
        except Refused as error:
            open_gguf(path)
            raise Wrong(f"against the format's rules ({error}), and it is read") from None
        try:
            weights = open_gguf(path)
        except UserError as error:
            if fine:
                raise Wrong(f"a sound file is refused: {error}") from None
            raise
        names = {written.gguf_name(n): t for shard in weights.shards for n, t in shard.dense.items()}
        unread = [name for name in wanted.tensors if name not in names and "_exps." not in name]
        if unread:
            raise Wrong(f"{brief(unread[0])} is left out without a word")
        for name, tensor in names.items():
            if wanted.tensors[name][1] == 0 and np.asarray(tensor.read(), "<f4").tobytes() != wanted.stored(name):
                raise Wrong(f"{name}: other values than in the file")
        for shard in weights.shards:
            name = f"blk.{shard.layer}.ffn_gate_exps.weight"
            if shard.experts is None or wanted.tensors[name][1] not in (0, 8):
                continue
            gate = shard.experts.read(0)[0]
            if not np.array_equal(gate, wanted.floats(name)[: gate.size].reshape(gate.shape), equal_nan=True):
                raise Wrong(f"{name}: other values than in the file")
        self.reads(weights)

    def reads(self, weights) -> None:
        """Everything of the file can be read."""
        for shard in weights.shards:
            for tensor in shard.dense.values():
                tensor.read()
            if shard.experts is not None:
                shard.experts.read(0)
