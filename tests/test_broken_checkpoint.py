"""A converted checkpoint that is damaged, or made to do damage, is one error when it is opened."""

from __future__ import annotations

import json
import os
import shutil

import checkpoint_folders as folders
import pytest

from hybrimoe_jax.checkpoint.convert import convert
from hybrimoe_jax.checkpoint.reader import open_checkpoint
from hybrimoe_jax.errors import UserError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("broken")
    return convert(folders.write_hf(root / "hf", folders.tensors()), root / "made")


@pytest.fixture
def damaged(made, tmp_path):
    """A copy, to break."""
    return shutil.copytree(made, tmp_path / "ckpt")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change(path, *keys, to=None):
    """Sets one value in the manifest's pieces, or with `to` None removes it."""
    manifest = json.loads(path.read_text())
    *within, last = keys
    place = manifest["pieces"]
    for key in within:
        place = place[key]
    if to is None:
        del place[last]
    else:
        place[last] = to
    path.write_text(json.dumps(manifest))


def link_out(c, item: str):
    """Moves an item's folder away and puts a link in its place."""
    os.rename(c / "pieces" / item, c.parent / item)
    os.symlink(c.parent / item, c / "pieces" / item)


def pipe_behind_a_link(c):
    link_out(c, "layer_00001")
    as_pipe(c.parent / "layer_00001/state/experts/zarr.json")


HEAD = (0, "dense", "lm_head.weight")
SUMMED = (2, "experts")
MANIFESTS = {
    "damaged": [
        *(((0, "name"), name) for name in (5, True, ["outer"], {})),
        *((keys, None) for keys in ((0, "name"), (*HEAD, "hash"), (*HEAD, "shape"), (*SUMMED, "hashes"))),
        *(((*HEAD, key), 1.5) for key in ("format", "hash", "crc32", "shape", "dtype")),
        *(((*HEAD, "format"), value) for value in ("int8-g64", ["int8-g64"], {})),
        *(((*SUMMED, key), value) for key in ("hashes", "crc32s") for value in ("abcd", [1.5] * 4, {}, 5)),
        *(((at, "experts"), "text") for at in (0, 2)),
        ((0, "dense"), [5]),
    ],
    "does not describe the model": [
        ((1, "name"), "outer"),
        ((2, "experts", "shape", 0), 5),
        ((2, "experts", "crc32s"), [1, 2]),
        ((*HEAD, "shape", 0), 23),
        ((*HEAD, "dtype"), "uint8"),
        ((*HEAD, "dtype"), "float64"),
        ((1, "dense", "lm_head.weight"), {}),
    ],
    "format 'int9' is not known": [((*HEAD, "format"), "int9")],
}


@pytest.mark.parametrize(("message", "keys", "to"), [(m, *case) for m, cases in MANIFESTS.items() for case in cases])
def test_every_value_of_a_manifest_is_checked_when_it_is_opened(damaged, message, keys, to):
    change(damaged / "manifest.json", *keys, to=to)
    with pytest.raises(UserError, match=rf"manifest\.json: {message}"):
        open_checkpoint(damaged)


def as_pipe(path):
    path.unlink()
    os.mkfifo(path)


def nested(path):
    path.write_text('{"attributes":' + "[" * 30_000 + "]" * 30_000 + "}")


EXPERTS = "pieces/layer_00001/state/experts"


@pytest.mark.parametrize(
    ("breaking", "message"),
    [
        (lambda c: (c / "manifest.json").unlink(), "not converted yet; run: python -m hybrimoe_jax.convert"),
        (lambda c: (c / "manifest.json").write_text('{"lay'), "manifest.json: not valid JSON"),
        (lambda c: (c / "manifest.json").write_text("[]"), "not the manifest of a checkpoint"),
        (lambda c: edit(c / "manifest.json", version=99), "layout version 99, this program reads 1"),
        (lambda c: edit(c / "manifest.json", pieces=[{}]), "manifest.json: damaged"),
        (lambda c: as_pipe(c / "pieces/outer/state/model.norm.weight/zarr.json"), "zarr.json: no plain file"),
        (lambda c: as_pipe(c / "pieces/layer_00001/state/experts/c/0/0/0"), "experts/c/0/0/0: no plain file"),
        (pipe_behind_a_link, "experts/zarr.json: no plain file"),
        (lambda c: nested(c / EXPERTS / "zarr.json"), "experts/zarr.json: no description of an array"),
        (lambda c: os.truncate(c / EXPERTS / "zarr.json", 6 << 30), "experts/zarr.json: no description of an array"),
        (lambda c: os.truncate(c / EXPERTS / "c/0/0/0", 6 << 30), "experts/c/0/0/0: 6,442,450,944 bytes"),
        (lambda c: (c / "pieces.zip").write_bytes(b""), "both pieces and pieces.zip are there; remove the one"),
        (lambda c: edit(c / "config.json", rope_theta=5.0), "changed since the conversion"),
        (lambda c: (c / "config.json").unlink(), "config.json: no such file"),
        (lambda c: (c / "generation_config.json").write_text("[1]"), "not a JSON object"),
        (lambda c: shutil.rmtree(c / "pieces" / "layer_00001"), "incomplete, layer_00001 missing"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_a_broken_folder_gets_one_clear_error(damaged, breaking, message):
    breaking(damaged)
    with pytest.raises(UserError) as caught:
        open_checkpoint(damaged)
    assert message in str(caught.value) and str(damaged) in str(caught.value) and "\n" not in str(caught.value)


def test_links_within_a_checkpoint_are_followed_and_may_lead_in_circles(damaged):
    link_out(damaged, "layer_00001")
    os.symlink(damaged / "pieces", damaged / EXPERTS / "round")
    os.symlink("itself", damaged / EXPERTS / "itself")
    assert open_checkpoint(damaged).experts(lazy=False).get(1, 2)
