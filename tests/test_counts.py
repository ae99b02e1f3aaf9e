"""Counts that a file claims are held against what it can hold, before anything is made of them."""

import gzip
import json
import shutil
import time
import zipfile

import checkpoint_folders as folders
import pytest

from hybrimoe_jax.checkpoint.hugging_face import open_hf
from hybrimoe_jax.checkpoint.random import random_weights
from hybrimoe_jax.checkpoint.reader import open_checkpoint
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.npz import read_npz
from hybrimoe_jax.trace.file import load_trace
from hybrimoe_jax.trace.importers import open_trace


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; no model has more than 4,096"),
        ({"num_experts": 10**9}, "num_experts is 1000000000; no model"),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000; no model"),
        ({"hidden_size": 2**40}, "hidden_size is 1099511627776; no model"),
        ({"num_hidden_layers": 4000, "num_experts": 60000}, "4000 layers of 60000 experts are more than"),
        ({"num_hidden_layers": 4000}, "num_hidden_layers is 4000 in config.json, and the weights are 55 tensors"),
        ({"num_experts": 60000}, "60000 experts in each of 2 layers, and the weights are 55 tensors"),
    ],
)
def test_counts_of_a_configuration(tmp_path, changed, why):
    folder, began = folders.write_hf(tmp_path / "hf", folders.tensors(), **changed), time.perf_counter()
    with pytest.raises(UserError, match=why):
        open_hf(folder)
    if "tensors" not in why:
        with pytest.raises(UserError, match=why):
            random_weights(folder)
    assert time.perf_counter() - began < 5


def member(shape, data: bytes, dtype="<i4") -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header + data


def archive(path, *members: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for number, data in enumerate(members):
            file.writestr(f"a{number}.npy", data)


def test_arrays_of_an_archive_are_as_large_as_they_say(tmp_path):
    path = tmp_path / "t.npz"
    archive(path, member((2,), b"\1\0\0\0" * 2))
    assert read_npz(path)["a0"].tolist() == [1, 1]
    for data in (member((10**12,), b"\0" * 8), member((1,), b"\0" * 8), member((2**62, 4, 0), b"\0" * 8)):
        archive(path, data)
        with pytest.raises(UserError, match="8 bytes are there"):
            load_trace(path)


def test_a_small_file_that_unpacks_to_a_large_one_is_refused(tmp_path):
    """An archive's parts are counted, not unpacked; compressed text is unpacked no further than it may be."""
    archive(tmp_path / "t.npz", *[member((1 << 22,), b"\0" * (1 << 24))] * 5)
    with pytest.raises(UserError, match="bytes would unpack to"):
        load_trace(tmp_path / "t.npz")
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(b'{"step": 0}' + b"\n" * (120 << 20), 1))
    with pytest.raises(UserError, match="would unpack to more than"):
        open_trace(tmp_path / "t.csv.gz")


@pytest.mark.parametrize(
    ("tensor", "key", "value", "why"),
    [
        ("model.norm.weight", "shape", [8, 2], "does not describe the model"),
        ("model.norm.weight", "dtype", "float64", "does not describe the model"),
        ("lm_head.weight", "name", "lm_tail.weight", "does not describe the model"),
    ],
)
def test_the_manifest_describes_the_model(tmp_path, converted, tensor, key, value, why):
    manifest = json.loads((converted / "manifest.json").read_text())
    records = next(piece["dense"] for piece in manifest["pieces"] if tensor in piece["dense"])
    if key == "name":
        records[value] = records.pop(tensor)
    else:
        records[tensor][key] = value
    (converted / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=why):
        open_checkpoint(converted)


@pytest.fixture
def converted(tmp_path, plain_model):
    """A checkpoint to damage."""
    return shutil.copytree(plain_model(), tmp_path / "out")


def test_arrays_are_what_the_manifest_says(tmp_path, converted):
    """The same bytes in another shape, or another type of the same size, or in blocks of any size."""
    for name, change in (
        ("model.embed_tokens.weight", {"shape": [folders.WIDTH, folders.VOCAB]}),
        ("model.norm.weight", {"data_type": "int32"}),
        ("lm_head.weight", {"shape": [10**6, 10**6]}),
    ):
        path = converted / "pieces" / "outer" / "state" / name / "zarr.json"
        kept = path.read_text()
        path.write_text(json.dumps(json.loads(kept) | change))
        with pytest.raises(UserError, match=f"{name} (is an array .* by manifest.json|can't be read)"):
            open_checkpoint(converted).dense()
        path.write_text(kept)
    open_checkpoint(converted).dense()
