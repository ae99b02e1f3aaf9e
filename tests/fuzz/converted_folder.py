"""Converted checkpoints, as a folder of arrays and as one zip. The reference is what was converted.

Whatever is done to a file of it, each tensor, expert and count that is read is the original's, or none is.
"""

from __future__ import annotations

import functools
import io
import json
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_folders
import gguf_files
import numpy as np
from fuzz.mutate import DEEP, brief, change_bytes, change_json, json_text
from fuzz.worker import Case, Wrong

FORMATS = {"plain": {}, "zipped": {"zipped": True}, "quantised": {"fmt": "int4-g32", "dense_format": "int8-g32"}}
BESIDE = ("manifest.json", "config.json", "generation_config.json", "expert_frequencies.json")
COUNTS = [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.5]]


class Kind:
    """Folders of tiny models: two layers, four experts."""

    def __init__(self, base: Path):
        from hybrimoe_jax.checkpoint.convert import convert
        from hybrimoe_jax.engine.base import BaseEngine

        self.ending: Any = type("Ending", (BaseEngine,), dict.fromkeys(BaseEngine.__abstractmethods__))
        plain = checkpoint_folders.write_hf(base / "hf", checkpoint_folders.tensors())
        wide = base / "m.gguf"
        gguf_files.write(wide, "qwen3moe", "F32")
        self.files: dict[str, dict[str, bytes]] = {}
        self.wanted: dict[str, dict[str, bytes]] = {}
        for name, how in FORMATS.items():
            made = convert(wide if name == "quantised" else plain, base / name, **how)
            (made / "expert_frequencies.json").write_text(json.dumps({"counts": COUNTS}))
            (made / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
            self.wanted[name] = read(made)
            paths = (path for path in sorted(made.rglob("*")) if path.is_file())
            self.files[name] = {path.relative_to(made).as_posix(): path.read_bytes() for path in paths}
            self.compare(made, name, {})

    def case(self, rng: random.Random, folder: Path) -> Case:
        name = rng.choice(list(FORMATS))
        files, made, said = dict(self.files[name]), folder / "made", {}
        target = rng.choice((*BESIDE, *["manifest.json"] * 3, *["pieces"] * 6))
        if target == "pieces":
            what = (zip_changed if name == "zipped" else piece_changed)(rng, files)
        elif target != "config.json" and rng.random() < 0.85:
            value, what = changed(rng, target, json.loads(files[target]))
            files[target], spoilt = json_text(rng, value)
            what, said = f"{target}: {what} {spoilt}", {target: value}
        else:
            files[target], what = change_bytes(rng, files[target])
            what, said = f"{target}: {what}", {target: None}
        for path, data in files.items():
            (made / path).parent.mkdir(parents=True, exist_ok=True)
            (made / path).write_bytes(data)
        if rng.random() < 0.05:
            what = replaced(rng, made, rng.choice(list(files)))
        verify = rng.random() < 0.5
        run = functools.partial(self.compare, made, name, said, verify)
        return Case(f"{name}{', verified' * verify}: {what}", run, ("made", "generation_config.json"))

    def compare(self, made: Path, name: str, said: dict[str, Any], verify: bool = False) -> None:
        """`said`: what the case made of a JSON file, by its name; None where only its bytes are known."""
        from hybrimoe_jax.checkpoint.reader import open_checkpoint
        from hybrimoe_jax.engine.config import EngineConfig
        from hybrimoe_jax.text.replies import eos_ids

        have, wanted = read(made, verify), self.wanted[name]
        if have != wanted:
            other = [key for key in {*have, *wanted} if have.get(key) != wanted.get(key)]
            raise Wrong(f"other values than were converted: {brief(sorted(other))}")
        checkpoint = open_checkpoint(made)
        ids = list(eos_ids(checkpoint.generation_config, None, checkpoint.config))
        value = said.get("generation_config.json", {"eos_token_id": [2, 3]})
        if value is not None:
            asked = value.get("eos_token_id")
            asked = asked if isinstance(asked, list) else [] if asked is None else [asked]
            if ids != (asked or [checkpoint.config.eos_token_id]):
                raise Wrong(f"replies end at {ids}, and the file says {brief(value)}")
            engine = self.ending(checkpoint.config, EngineConfig(), None, ids, lambda: None)
            if list(engine.eos) != [token for token in ids if token < checkpoint.config.vocab_size]:
                raise Wrong(f"an engine ends replies at {brief(engine.eos)}, and the file says {brief(value)}")
        counts, value = checkpoint.frequencies(), said.get("expert_frequencies.json", {"counts": COUNTS})
        if counts is not None and value is not None and counts != np.asarray(value["counts"], float).tolist():
            raise Wrong("other counts of experts than the file's")


def changed(rng: random.Random, target: str, value: Any) -> tuple[Any, str]:
    """One of the JSON files with a change of its own kind, or any."""
    how = rng.random()
    if target == "generation_config.json" and how < 0.3:
        value["eos_token_id"] = ids = rng.sample((2, 23, 24, 2**31, 2**40, 2**63, 10**400), 2)
        return value, f"eos_token_id {brief(ids)}"
    if target == "manifest.json" and how < 0.2:
        pieces = value["pieces"]
        to, taken = rng.randrange(len(pieces)), rng.choice(pieces)
        key = rng.choice(("name", "layer", "dense", "experts", "all"))
        if key == "all":
            pieces.insert(to, taken)
        else:
            pieces[to] = {**pieces[to], key: taken[key]}
        return value, f"{key} of {taken['name']} at {to}, too"
    return change_json(rng, value, ("eos_token_id", "counts", "pieces", "version"))


def nested(rng: random.Random, text: bytes) -> tuple[bytes, str]:
    """A description with a value or a key more, at its end or its beginning, where another parser may take another."""
    values = (f'"attributes": {DEEP}', f'"x": {DEEP[:2000]}', '"shape": [1]', '"data_type": "int8"', '"codecs": []')
    more = rng.choice(values)
    first = rng.random() < 0.5
    made = b"{" + more.encode() + b"," + text[1:] if first else text[:-1] + b"," + more.encode() + b"}"
    return made, f"{'begins' if first else 'ends'} with {brief(more)}"


def read(made: Path, verify: bool = False) -> dict[str, bytes]:
    """Every tensor and expert of a checkpoint, as bytes."""
    from hybrimoe_jax.checkpoint.reader import open_checkpoint
    from hybrimoe_jax.formats.plain import ExpertWeights

    checkpoint = open_checkpoint(made)
    dense = checkpoint.dense(verify=verify)
    out = {n: (t if isinstance(t, np.ndarray) else t.data).tobytes() for n, t in dense.items()}
    store = checkpoint.experts(verify=verify)
    for layer in range(store.num_layers):
        for expert in range(store.num_experts):
            there = store.get(layer, expert)
            parts = (there.gate_up, there.down) if isinstance(there, ExpertWeights) else (there.data,)
            out[f"expert {layer}/{expert}"] = b"".join(part.tobytes() for part in parts)
    return out


def piece_changed(rng: random.Random, files: dict[str, bytes]) -> str:
    """A file of an item: its bytes, its place, another one's content, or its description."""
    names = [path for path in files if path.startswith("pieces/")]
    name, other = rng.sample(names, 2)
    how = rng.choice(("bytes", "bytes", "bytes", "drop", "swap", "move", "text"))
    if how == "bytes":
        files[name], what = change_bytes(rng, files[name])
        return f"{name}: {what}"
    if how == "text":
        name = rng.choice([path for path in names if path.endswith("zarr.json")])
        if rng.random() < 0.3:
            files[name], what = nested(rng, files[name])
            return f"{name} {what}"
        value, what = change_json(rng, json.loads(files[name]), ("shape", "data_type", "chunk_grid", "codecs"))
        files[name], spoilt = json_text(rng, value)
        return f"{name}: {what} {spoilt}"
    if how == "swap":
        files[name], files[other] = files[other], files[name]
    else:
        data = files.pop(name)
        if how == "move":
            files[f"{name}x"] = data
    return f"{how} {name} {other if how == 'swap' else ''}"


def zip_changed(rng: random.Random, files: dict[str, bytes]) -> str:
    """The zip: its bytes, or another archive of other members."""
    target = "pieces.zip"
    if rng.random() < 0.4:
        near_end = rng.random() < 0.5  # where its directory lies
        data, keep = files[target], 0
        if near_end:
            keep = max(0, len(data) - 4000)
        changed, what = change_bytes(rng, data[keep:])
        files[target] = data[:keep] + changed
        return f"{target}: behind {keep}, {what}"
    with zipfile.ZipFile(io.BytesIO(files[target])) as archive:
        members = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    pieces = {f"pieces/{name}": data for name, data in members.items()}
    what = piece_changed(rng, pieces) if rng.random() < 0.7 else "packed again"
    packing = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", packing) as archive:
        for path, data in pieces.items():
            archive.writestr(path.removeprefix("pieces/"), data)
        if rng.random() < 0.3:
            name = rng.choice(("../x", "/x", "layer_00000/state/x/c/0", "\x1b[31m", *list(members)[:1]))
            archive.writestr(name, b"x")
            what += f", and {name!a}"
    files[target] = out.getvalue()
    return f"{target}: {what}, packed by {packing}"


def replaced(rng: random.Random, made: Path, name: str) -> str:
    """Something else than a file stands in a file's place."""
    path = made / name
    makers: dict[str, Callable[[], Any]] = {
        "a pipe": lambda: os.mkfifo(path),
        "a folder": path.mkdir,
        "a link to itself": lambda: path.symlink_to(path),
        "a link to nothing": lambda: path.symlink_to(made / "nothing"),
        "a link to /dev/zero": lambda: path.symlink_to("/dev/zero"),
        "a file that may not be read": lambda: (path.write_bytes(b""), path.chmod(0)),
    }
    path.unlink()
    what = rng.choice(list(makers))
    makers[what]()
    return f"{name} is {what}"
