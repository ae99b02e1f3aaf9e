"""Safetensors files. The reference is the official library: what it refuses is refused, what it reads is read alike."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import checkpoint_folders
import numpy as np
import safetensors
from fuzz.mutate import brief, change_bytes, change_json, json_text
from fuzz.worker import Case, Wrong

NAME = "model.safetensors"
TYPES = ("F32", "F16", "BF16", "F64", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F4", "C64", "X", "")


class Kind:
    """Folders of a tiny Qwen2-MoE with one file of weights."""

    def __init__(self, base: Path):
        self.tensors = checkpoint_folders.tensors(layers=1)
        source = checkpoint_folders.write_hf(base / "hf", self.tensors, num_hidden_layers=1)
        self.files = {path.name: path.read_bytes() for path in source.iterdir()}
        data = self.files.pop(NAME)
        (length,) = struct.unpack("<Q", data[:8])
        list(self.opened(source, base / "out"))
        self.header, self.body = json.loads(data[8 : 8 + length]), data[8 + length :]

    def case(self, rng: random.Random, folder: Path) -> Case:
        data, what = self.mutated(rng)
        source = folder / "hf"
        source.mkdir()
        for name, content in self.files.items():
            (source / name).write_bytes(content)
        (source / NAME).write_bytes(data)
        convert = rng.random() < 0.1
        return Case(what, lambda: self.compare(source, data, folder / "out" if convert else None), (NAME, "hf"))

    def mutated(self, rng: random.Random) -> tuple[bytes, str]:
        if rng.random() < 0.2:
            whole = self.packed(json.dumps(self.header).encode())
            return change_bytes(rng, whole, rng.choice((16, 4000, None)))
        header: Any = json.loads(json.dumps(self.header))
        if rng.random() < 0.3:
            header, what = self.harmless(rng, header)
            return self.packed(json.dumps(header).encode()), what
        said = []
        for _ in range(rng.choice((1, 1, 2))):
            header, what = rng.choice((self.numbers, self.numbers, self.names, self.harmless, change_json))(rng, header)
            said.append(what)
        text, spoilt = json_text(rng, header)
        size = rng.choice((None,) * 12 + (0, 1, len(text) - 1, len(text) + 8, 2**40, 2**63, 2**64 - 1))
        body, more = (self.body, "") if rng.random() < 0.9 else change_bytes(rng, self.body)
        said += [spoilt, f"its length {size}" if size is not None else "", f"data: {more}" if more else ""]
        return self.packed(text, size, body), "; ".join(filter(None, said))

    def packed(self, text: bytes, size: int | None = None, body: bytes | None = None) -> bytes:
        return struct.pack("<Q", len(text) if size is None else size) + text + (self.body if body is None else body)

    def numbers(self, rng: random.Random, header: Any) -> tuple[Any, str]:
        """An entry's shape, type or place."""
        entries = (
            [k for k, v in header.items() if isinstance(v, dict) and "shape" in v] if isinstance(header, dict) else []
        )
        if not entries or not isinstance(header, dict):
            return header, ""
        name = rng.choice(entries)
        entry, key = header[name], rng.choice(("dtype", "shape", "data_offsets", "shift", "like"))
        if key == "dtype":
            entry[key] = rng.choice(TYPES)
        elif key == "like":  # two tensors on the same bytes
            entry["data_offsets"] = header[rng.choice(entries)].get("data_offsets")
        elif key == "shift" and isinstance(entry.get("data_offsets"), list):
            by = rng.choice((-8, -1, 1, 4, 64, 10**12))
            entry["data_offsets"] = [n + by if isinstance(n, int) else n for n in entry["data_offsets"]]
        elif isinstance(entry.get(key), list) and entry[key]:
            at = rng.randrange(len(entry[key]))
            there = entry[key][at] if isinstance(entry[key][at], int | float) else 0  # it may have been changed before
            entry[key][at] = rng.choice((0, -1, 0.5, float(there), there + 0.25, str(there), 10**12, 2**64, None, True))
        return header, f"{name}: {brief(entry)}"

    def names(self, rng: random.Random, header: Any) -> tuple[Any, str]:
        """A tensor under another name, or one more."""
        if not isinstance(header, dict) or len(header) < 3:
            return header, ""
        name = rng.choice(list(header))
        other = rng.choice((f"{name}x", "../x", "\x1b[31mx", "", "a" * 100_000, "model.layers.9.x", "lm_head.weight"))
        if rng.random() < 0.3:  # what might be read as the same name
            other = rng.choice(
                (name.removeprefix("model."), f"model.{name}", name.replace(".0.", ".00."), name.upper())
            )
        header[other] = header[name] if rng.random() < 0.5 else header.pop(name)
        return header, f"{name} as {brief(other)}"

    def harmless(self, rng: random.Random, header: Any) -> tuple[Any, str]:
        """Order and metadata, which change nothing."""
        if not isinstance(header, dict):
            return header, ""
        items = list(header.items())
        rng.shuffle(items)
        header = dict(items)
        header["__metadata__"] = rng.choice(({"format": "pt"}, {"a": "b" * 1000}, {"a": 1}, None, []))
        return header, f"shuffled, metadata {brief(header['__metadata__'])}"

    def compare(self, source: Path, data: bytes, out: Path | None) -> None:
        from hybrimoe_jax.checkpoint.hugging_face import read_tensors
        from hybrimoe_jax.errors import UserError

        try:
            wanted = dict(safetensors.deserialize(data))
        except Exception as error:
            self.opened(source, out)
            raise Wrong(f"the official reader refuses it ({error}), we read it") from None
        try:
            have = read_tensors(source)[0]
        except UserError:
            if {n: (e["shape"], e["data"]) for n, e in wanted.items()} == self.plain() and len(data) < 100_000:
                raise Wrong("a file with the tensors of the base is refused") from None
            raise
        if set(have) != set(wanted):
            raise Wrong(f"we read other tensors: {brief(set(have) ^ set(wanted))}")
        for name, entry in wanted.items():
            if list(have[name].shape) != list(entry["shape"]) or have[name].kind != entry["dtype"]:
                raise Wrong(f"{name}: {have[name].shape} {have[name].kind}, not {entry['shape']} {entry['dtype']}")
        for shard in self.opened(source, out):
            for name, tensor in shard.dense.items():
                if np.asarray(tensor.read()).tobytes() != bytes(wanted[name]["data"]):
                    raise Wrong(f"{name}: other values than the official reader's")

    def plain(self) -> dict[str, Any]:
        return {name: (list(array.shape), array.tobytes()) for name, array in self.tensors.items()}

    def opened(self, source: Path, out: Path | None):
        """Its shards; the whole folder is converted too where `out` is given."""
        from hybrimoe_jax.checkpoint.convert import convert
        from hybrimoe_jax.checkpoint.hugging_face import open_hf
        from hybrimoe_jax.checkpoint.reader import open_checkpoint

        shards = open_hf(source).shards
        if out is None:
            return shards
        dense = open_checkpoint(convert(source, out / "made")).dense()
        for shard in shards:
            for name, tensor in shard.dense.items():
                if not np.array_equal(np.asarray(dense[name], np.float32), np.asarray(tensor.read(), np.float32)):
                    raise Wrong(f"{name}: converted to other values")
        return shards
