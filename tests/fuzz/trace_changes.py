"""What traces are made into: archives packed again, bombs, changed lines, odd lengths in the public layouts."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from typing import Any

import numpy as np
from fuzz.mutate import brief, change_json

PUBLIC = {"esft.npz": (26, 6, "weights_e4"), "fingerprint.npz": (24, 4, "probs")}
"""Layers and experts per token of the public `.npz` forms, and what they call their weights."""


def packed(arrays: dict[str, np.ndarray], rng: random.Random) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    return file.getvalue()


def bomb(rng: random.Random) -> bytes:
    """A header that claims too much, with or without the zeros that it claims."""
    rows = rng.choice((10**8, 10**12, 2**62))
    head = str({"descr": rng.choice(("<i4", "<f8", "|O")), "fortran_order": False, "shape": (rows,)}).encode()
    head += b" " * (-(len(head) + 11) % 64) + b"\n"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("meta.npy", "w") as member:
            np.lib.format.write_array(member, np.array("{}"))
        with archive.open(rng.choice(("step.npy", "ids.npy", "x_more.npy")), "w", force_zip64=True) as member:
            member.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head)
            for _ in range(rng.choice((0, 0, 0, 0, 1500))):
                member.write(bytes(1 << 20))
    return file.getvalue()


def changed_text(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """A table with a line or a field changed."""
    lines = data.decode().split("\n")
    at = rng.randrange(len(lines))
    how = rng.choice(("drop", "twice", "field", "field", "field", "cut", "swap", "blank", "head", "head", "long"))
    if how in ("head", "long"):
        lines, what = (changed_head if how == "head" else longer)(rng, lines)
        return "\n".join(lines).encode(), what
    if how == "field":
        fields = lines[at].split(",")
        one = rng.randrange(len(fields))
        fields[one] = rng.choice(("", "-1", "1e308", "nan", "9" * 5000, "x", "\x1b[2J", '"', "0.5", "99", "[" * 9999))
        lines[at] = ",".join(fields)
    else:
        other = rng.randrange(len(lines))
        new = {"drop": [], "twice": [lines[at]] * 2, "cut": [lines[at][:-2]], "blank": ["", lines[at]]}
        lines[at : at + 1] = new.get(how, [lines[other]])
    return "\n".join(lines).encode(), f"{how} line {at}: {brief(lines[at] if at < len(lines) else '')}"


def changed_head(rng: random.Random, lines: list[str]) -> tuple[list[str], str]:
    """A table whose first line says other things, or describes another addition."""
    mark = "# " * lines[0].startswith("#")
    meta = json.loads(lines[0].removeprefix(mark))
    if rng.random() < 0.3:
        meta, what = change_json(rng, meta, ("version", "facts", "about", "extra"))
        return [mark + json.dumps(meta), *lines[1:]], f"first line: {what}"
    dtype = rng.choice(("U100000", "O", "T", "i1", "f2", ">i4", "M8[s]", "i4,i4", "(((", "U3", "?", None))
    values: Any = [rng.choice((1, -1, 300, 1.5, "a", "nan", "a" * 99, None, [1], 2**70))] * rng.choice((0, 1, 20_000))
    name = rng.choice(("more", "", "\ud800", "a" * 70_000, "a/b"))
    meta["extra"] = {name: {"dtype": dtype, "values": rng.choice((values, values[:1] and values[0]))}}
    return [mark + json.dumps(meta), *lines[1:]], f"an addition {brief(name)} of {dtype}: {brief(values[:2])}"


def longer(rng: random.Random, lines: list[str]) -> tuple[list[str], str]:
    """A table of many steps: in CSV with one wide cell, in JSONL with predictions at another distance in each row."""
    rows = rng.choice((5, 3000))
    if lines[0].startswith("#"):
        table = [lines[2].split(",") for _ in range(rows)]
        wide = rng.randrange(len(table[0]))
        table[-1][wide] = rng.choice(("0." + "5" * 100_000, "0" * 100_000 + "1", "x" * 100_000))
        for number, row in enumerate(table[:-1]):
            row[0] = row[4] = str(number)
        return [*lines[:2], *map(",".join, table), ""], f"{rows} steps, a wide cell in column {wide}"
    row, layers = json.loads(lines[1]), rng.choice((2, 4000, 10**6))
    head = lines[0].replace('"layers": 2', f'"layers": {layers}')
    ahead = ({str(number + 1): row["scores"]} for number in range(rows))
    table = [json.dumps({**row, "step": n, "position": n, "lookahead": a}) for n, a in enumerate(ahead)]
    return [head, *table, ""], f"{rows} steps of {layers} layers, each with a distance of its own"


def changed_public(rng: random.Random, name: str) -> tuple[bytes, str]:
    """A public `.npz` form of three tokens with an array's type or a number of it changed."""
    layers, top_k, weights = PUBLIC[name]
    ids = np.tile(np.arange(top_k), (3, layers, 1))
    floats = np.full(ids.shape, 0.25)
    arrays = {"expert_ids": ids, weights: floats if weights == "probs" else ids, "seq_lens": np.array([2, 1])}
    one = rng.choice((*arrays, "seq_lens", "seq_lens"))
    if one == "seq_lens" and rng.random() < 0.5:
        part, count = rng.choice((2**62, 2**63 - 1, 2**63, 2**64 - 1, 0, 1)), rng.choice((1, 2, 4))
        arrays[one] = np.array([part] * count + [3], np.uint64 if part >= 2**63 else np.int64)
        return packed(arrays, rng), f"{one} = {arrays[one].tolist()}"
    with np.errstate(all="ignore"):
        arrays[one] = arrays[one].astype(rng.choice(("f8", "i8", "u8", "i1", "u1", "?", "c8", "S3", "f2")))
        at = rng.randrange(arrays[one].size)
        arrays[one].flat[at] = np.array(rng.choice((0, 1, 7, -1, 127, 200))).astype(arrays[one].dtype)
    return packed(arrays, rng), f"{one} as {arrays[one].dtype}, [{at}] = {arrays[one].flat[at]}"
