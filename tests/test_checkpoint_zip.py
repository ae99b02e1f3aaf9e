"""A checkpoint whose arrays lie in one zip: the same arrays, the same checks, equal bytes each time it is written."""

from __future__ import annotations

import json
import os
import shutil
import zipfile

import checkpoint_folders as folders
import numpy as np
import pytest

from hybrimoe_jax import convert as command
from hybrimoe_jax.checkpoint.convert import convert
from hybrimoe_jax.checkpoint.export import export_hf
from hybrimoe_jax.checkpoint.reader import open_checkpoint
from hybrimoe_jax.errors import UserError

EXPERT = "layer_00001/state/experts/c/2/0/0"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A Hugging Face folder, and its checkpoint as a folder and zipped."""
    folder = tmp_path_factory.mktemp("zip")
    source = folders.write_hf(folder / "hf", folders.tensors())
    convert(source, folder / "plain", "bf16")
    assert command.main([str(source), str(folder / "zipped"), "--format", "bf16", "--zip"]) == 0
    return folder


@pytest.fixture
def zipped(made, tmp_path):
    return shutil.copytree(made / "zipped", tmp_path / "copy")


def offset_of(archive, name: str) -> int:
    """Where the bytes of an uncompressed member begin."""
    with zipfile.ZipFile(archive) as opened, open(archive, "rb") as file:
        info = opened.getinfo(name)
        assert info.compress_type == zipfile.ZIP_STORED
        file.seek(info.header_offset + 26)
        lengths = np.frombuffer(file.read(4), "<u2")
        return info.header_offset + 30 + int(lengths.sum())


def flip(archive, name: str) -> None:
    with open(archive, "r+b") as file:
        file.seek(offset_of(archive, name))
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def test_arrays_are_those_of_the_folder(made):
    plain, zipped = open_checkpoint(made / "plain"), open_checkpoint(made / "zipped")
    assert sorted(path.name for path in (made / "zipped").iterdir()) == sorted(
        "pieces.zip" if path.name == "pieces" else path.name for path in (made / "plain").iterdir()
    )
    assert zipped.manifest == plain.manifest
    dense, same = plain.dense(verify=True), zipped.dense(verify=True)
    assert dense.keys() == same.keys() and all(np.array_equal(dense[name], same[name]) for name in dense)
    experts, others = (checkpoint.experts(lazy=False, verify=True) for checkpoint in (plain, zipped))
    for layer in range(folders.LAYERS):
        for expert in range(folders.EXPERTS):
            ours, theirs = experts.get(layer, expert), others.get(layer, expert)
            assert np.array_equal(ours.gate_up, theirs.gate_up) and np.array_equal(ours.down, theirs.down)


def test_the_same_weights_give_the_same_bytes(made, tmp_path):
    again = convert(made / "hf", tmp_path / "again", "bf16", zipped=True)
    assert (again / "pieces.zip").read_bytes() == (made / "zipped" / "pieces.zip").read_bytes()
    with zipfile.ZipFile(again / "pieces.zip") as archive:
        assert archive.namelist() == sorted(archive.namelist())


def test_it_is_exported_and_not_converted_again(made, tmp_path):
    exported = [export_hf(made / name, tmp_path / name) / "model.safetensors" for name in ("plain", "zipped")]
    assert exported[0].read_bytes() == exported[1].read_bytes()
    with pytest.raises(UserError, match="already a converted checkpoint"):
        convert(made / "zipped", tmp_path / "twice")


def test_damage_is_named(zipped):
    flip(zipped / "pieces.zip", EXPERT)
    flip(zipped / "pieces.zip", "layer_00000/state/model.layers.0.mlp.gate.weight/c/0/0")
    checkpoint = open_checkpoint(zipped)
    with pytest.raises(UserError, match=r"layer_00001: experts\[2\] can't be read|expert 2 of layer 1 is corrupted"):
        checkpoint.experts(verify=True).get(1, 2)
    assert checkpoint.experts(verify=True).get(1, 3)
    with pytest.raises(UserError, match=r"mlp\.gate\.weight (is corrupted|can't be read)"):
        checkpoint.dense(verify=True)


@pytest.mark.parametrize(
    ("left", "message"),
    [(lambda name: name != EXPERT, r"experts\[2\] can't be read \(a file is missing"), (None, "damaged")],
)
def test_what_is_missing_is_named(zipped, left, message):
    archive = zipped / "pieces.zip"
    whole = archive.read_bytes()
    if left is None:
        archive.write_bytes(whole[:-30])
    else:
        with zipfile.ZipFile(zipped / "other.zip", "w") as out, zipfile.ZipFile(archive) as old:
            for name in filter(left, old.namelist()):
                out.writestr(name, old.read(name))
        (zipped / "other.zip").replace(archive)
    with pytest.raises(UserError, match=message):
        open_checkpoint(zipped).experts().get(1, 2)


@pytest.mark.parametrize(
    ("content", "packing", "twice", "message"),
    [
        (b'{"attributes":' + b"[" * 30_000 + b"]" * 30_000 + b"}", zipfile.ZIP_STORED, False, "no description"),
        (b" " * 100_000, zipfile.ZIP_STORED, False, "no description of an array"),
        (b" " * 100_000, zipfile.ZIP_DEFLATED, False, "experts/zarr.json is compressed; zip the items again"),
        (b"{}", zipfile.ZIP_STORED, True, "two members layer_00001/state/experts/zarr.json"),
    ],
    ids=["nested", "long", "compressed", "twice"],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_description_that_is_none_is_refused_unread(zipped, content, packing, twice, message):
    name = "layer_00001/state/experts/zarr.json"
    with zipfile.ZipFile(zipped / "pieces.zip") as old:
        members = [(at, old.read(at)) for at in old.namelist() if twice or at != name]
    with zipfile.ZipFile(zipped / "pieces.zip", "w") as out:
        for at, data in members:
            out.writestr(at, data)
        out.writestr(name, content, packing)
    with pytest.raises(UserError, match=message):
        open_checkpoint(zipped)


def test_a_member_that_python_will_not_read_is_one_error(zipped):
    data = bytearray((zipped / "pieces.zip").read_bytes())
    at = data.rindex(b"PK\x01\x02", 0, data.rindex(b"layer_00001/state/experts/zarr.json"))
    data[at + 8] |= 1  # encrypted
    (zipped / "pieces.zip").write_bytes(data)
    with pytest.raises(UserError, match=r"experts/zarr\.json: damaged"):
        open_checkpoint(zipped)


def test_a_lost_layer_is_named(zipped):
    manifest = json.loads((zipped / "manifest.json").read_text())
    manifest["pieces"][2]["name"] = "layer_00007"
    (zipped / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"incomplete, layer_00007 missing in pieces\.zip"):
        open_checkpoint(zipped)


def test_the_flag_goes_with_converting(capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["a", "b", "--export-hf", "--zip"])
    assert "--zip does not go with --export-hf" in capsys.readouterr().err
