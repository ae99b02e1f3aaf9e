"""The host expert store: right weights, aligned and read-only, read once and only when asked; damage is named."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import checkpoint_folders as folders
import ml_dtypes
import numpy as np
import pytest

from hybrimoe_jax.checkpoint.convert import convert
from hybrimoe_jax.checkpoint.expert_store import ExpertStore
from hybrimoe_jax.checkpoint.reader import open_checkpoint
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.plain import ExpertWeights

BF16 = ml_dtypes.bfloat16


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Weights and converted checkpoints of one model in float32 and in bfloat16."""
    root = tmp_path_factory.mktemp("store")
    weights = folders.tensors(BF16)
    src = folders.write_hf(root / "hf", weights)
    return weights, {fmt: convert(src, root / fmt, fmt) for fmt in ("f32", "bf16")}


@pytest.fixture
def damaged(made, tmp_path):
    """A copy of the float32 checkpoint, to break."""
    return shutil.copytree(made[1]["f32"], tmp_path / "ckpt")


def expected(weights, layer: int, expert: int, dtype) -> ExpertWeights:
    gate, up, down = (weights[folders.expert(layer, expert, part)].astype(dtype) for part in ("gate", "up", "down"))
    return ExpertWeights(np.concatenate([gate, up]), down)


@pytest.mark.parametrize(
    ("fmt", "asked", "held"), [("f32", None, np.float32), ("bf16", None, BF16), ("bf16", "float32", np.float32)]
)
def test_arrays_are_right_aligned_contiguous_and_read_only(made, fmt, asked, held):
    weights, paths = made
    store = open_checkpoint(paths[fmt]).experts(dtype=asked, lazy=False)
    assert store.loaded == folders.LAYERS * folders.EXPERTS
    total = 0
    for layer in range(folders.LAYERS):
        for e in range(folders.EXPERTS):
            got = store.get(layer, e)
            for matrix, want in zip(got, expected(weights, layer, e, held)):
                assert matrix.dtype == held and np.array_equal(matrix, want)
                assert matrix.flags.c_contiguous and matrix.ctypes.data % 64 == 0 and not matrix.flags.writeable
            assert got.nbytes == store.expert_bytes
            total += got.nbytes
    assert total == store.nbytes
    assert (store.num_layers, store.num_experts, store.width, store.hidden) == (2, 4, 16, 8)


def test_a_conversion_that_would_round_is_refused(made):
    with pytest.raises(UserError, match="would round"):
        open_checkpoint(made[1]["f32"]).experts(dtype=BF16)
    with pytest.raises(UserError, match="would round"):
        open_checkpoint(made[1]["bf16"]).experts(dtype=np.float16)


def test_lazy_reads_one_expert_and_nothing_else(made, damaged):
    for layer in range(folders.LAYERS):
        for e in range(folders.EXPERTS):
            if (layer, e) != (1, 2):
                folders.expert_file(damaged, layer, e).unlink()
    store = open_checkpoint(damaged).experts()
    assert store.loaded == 0
    got = store.get(1, 2)
    assert np.array_equal(got.down, expected(made[0], 1, 2, np.float32).down)
    assert store.get(1, 2) is got and store.loaded == 1


def test_threads_share_one_read_of_each_expert():
    reads, lock, start = [], threading.Lock(), threading.Barrier(8)

    def read(moe_layer, expert):
        with lock:
            reads.append((moe_layer, expert))
        return np.full((3, 6), 10 * moe_layer + expert, np.float32)

    store = ExpertStore(read, (3, 40, 2, 3), np.float32)
    every = [(i, e) for i in range(3) for e in range(40)]

    def walk(seed):
        start.wait()
        order = np.random.default_rng(seed).permutation(len(every))
        return {every[i]: store.get(*every[i]) for i in order}

    with ThreadPoolExecutor(8) as pool:
        walks = list(pool.map(walk, range(8)))
    assert sorted(reads) == every
    assert all(w[key] is walks[0][key] for w in walks for key in every)
    assert all(walks[0][i, e].gate_up[0, 0] == 10 * i + e for i, e in every)


def test_a_walk_without_keeping_holds_nothing(made):
    store = open_checkpoint(made[1]["f32"]).experts(keep=False)
    assert store.get(0, 0) is not store.get(0, 0) and store.loaded == 0


def test_a_moe_layer_is_counted_among_moe_layers_only(tmp_path):
    weights = folders.tensors()
    for name in [n for n in weights if n.startswith("model.layers.0.mlp.")]:
        del weights[name]
    rng = np.random.default_rng(3)
    for part, shape in (("gate", (20, 16)), ("up", (20, 16)), ("down", (16, 20))):
        weights[f"model.layers.0.mlp.{part}_proj.weight"] = rng.standard_normal(shape, np.float32)
    path = convert(folders.write_hf(tmp_path / "hf", weights, mlp_only_layers=[0]), tmp_path / "ckpt")
    store = open_checkpoint(path).experts(verify=True)
    assert store.num_layers == 1
    assert np.array_equal(store.get(0, 3).gate_up, expected(weights, 1, 3, np.float32).gate_up)
    folders.flip_byte(folders.expert_file(path, 1, 0))
    with pytest.raises(UserError, match="expert 0 of layer 1 is corrupted"):
        store.get(0, 0)
    for wrong in ((1, 0), (-1, 0), (0, 4), (0, -1)):
        with pytest.raises(IndexError, match="the model has 1 x 4"):
            store.get(*wrong)


def test_load_all_reports_progress(made):
    seen = []

    def progress(items, total, label):
        seen.append((total, label))
        return items

    store = open_checkpoint(made[1]["f32"]).experts()
    store.load_all(progress)
    assert seen == [(8, "loading experts")] and store.loaded == 8


def test_from_arrays_checks_what_it_is_given():
    rng = np.random.default_rng(0)
    layers = [
        (rng.standard_normal((4, 6, 5), np.float32), rng.standard_normal((4, 5, 3), np.float32)) for _ in range(2)
    ]
    store = ExpertStore.from_arrays(layers)
    assert np.array_equal(store.get(1, 3).gate_up, layers[1][0][3]) and not np.shares_memory(
        store.get(1, 3).down, layers[1][1]
    )
    with pytest.raises(UserError, match="layer 1 has gate_up"):
        ExpertStore.from_arrays([layers[0], (layers[1][0][:, :5], layers[1][1])])
    with pytest.raises(UserError, match="layer 1 has gate_up"):
        ExpertStore.from_arrays([layers[0], tuple(a.astype(BF16) for a in layers[1])])
    with pytest.raises(UserError, match="no MoE layers"):
        ExpertStore.from_arrays([])


def test_verify_names_the_corrupted_expert_and_only_it(damaged):
    folders.flip_byte(folders.expert_file(damaged, 1, 2))
    checkpoint = open_checkpoint(damaged)
    for verify, how in ((False, "checksum"), (True, "hash")):
        store = checkpoint.experts(verify=verify)
        store.get(1, 1), store.get(0, 2)
        with pytest.raises(UserError, match=f"expert 2 of layer 1 is corrupted .its {how} differs"):
            store.get(1, 2)
        with pytest.raises(UserError, match="expert 2 of layer 1 is corrupted"):
            checkpoint.experts(lazy=False, verify=verify)


def test_dense_tensors_are_verified_by_name(damaged):
    name = "model.layers.0.self_attn.q_proj.weight"
    folders.flip_byte(damaged / "pieces/layer_00000/state" / name / "c/0/0")
    checkpoint = open_checkpoint(damaged)
    for verify, how in ((False, "checksum"), (True, "hash")):
        with pytest.raises(UserError, match=f"tensor {name} is corrupted .its {how} differs"):
            checkpoint.dense(verify=verify)
    assert list(checkpoint.dense(["model.norm.weight"], verify=True)) == ["model.norm.weight"]


def test_a_checkpoint_without_checksums_is_read_as_before(damaged):
    """Those that earlier versions wrote: a changed byte is found with `verify` alone."""
    folders.flip_byte(folders.expert_file(damaged, 1, 2))
    manifest = json.loads((damaged / "manifest.json").read_text())
    for piece in manifest["pieces"]:
        for record in (*piece["dense"].values(), piece["experts"] or {}):
            record.pop("crc32", None), record.pop("crc32s", None)
    (damaged / "manifest.json").write_text(json.dumps(manifest))
    checkpoint = open_checkpoint(damaged)
    checkpoint.dense(), checkpoint.experts(lazy=False)
    with pytest.raises(UserError, match="expert 2 of layer 1 is corrupted"):
        checkpoint.experts(lazy=False, verify=True)


@pytest.mark.parametrize(("how", "why"), [("unlink", "missing"), ("cut", "cut short")])
def test_a_lost_or_truncated_file_is_named(damaged, how, why):
    for path in (folders.expert_file(damaged, 0, 1), damaged / "pieces/outer/state/lm_head.weight/c/0/0"):
        if how == "unlink":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-40])
    checkpoint = open_checkpoint(damaged)
    with pytest.raises(UserError, match=rf"layer_00000: experts\[1\] can't be read .*{why}"):
        checkpoint.experts().get(0, 1)
    with pytest.raises(UserError, match=rf"outer: lm_head\.weight can't be read .*{why}"):
        checkpoint.dense()


def test_frequencies_fit_the_model_or_are_refused(damaged):
    path = damaged / "expert_frequencies.json"
    assert open_checkpoint(damaged).frequencies() is None
    counts = [[4, 3, 2, 1], [0, 0, 5, 9]]
    path.write_text(json.dumps({"counts": counts}))
    assert open_checkpoint(damaged).frequencies() == counts
    rows = ([1, 2], [-1, 0, 0, 0], [10**400, 0, 0, 0], [1e308] * 4, [float("nan")] * 4, ["a"] * 4)
    for bad in ({"counts": counts[:1]}, *({"counts": [row, row]} for row in rows), {}, counts):
        path.write_text(json.dumps(bad))
        with pytest.raises(UserError, match="must be 2 lists of 4 counts"):
            open_checkpoint(damaged).frequencies()
