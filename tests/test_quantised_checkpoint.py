"""Quantised checkpoints: `convert --format`, `convert --random`, opening, generating and exporting, as commands
and as functions."""

from __future__ import annotations

import functools
import itertools
import json
import shutil
import subprocess
import sys

import checkpoint_folders as folders
import numpy as np
import pytest
import tiny
from grids import few
from safetensors.numpy import load_file, save_file

from hybrimoe_jax.checkpoint import shards
from hybrimoe_jax.checkpoint import writer as checkpoint_writer
from hybrimoe_jax.checkpoint.convert import convert, convert_random
from hybrimoe_jax.checkpoint.export import export_hf
from hybrimoe_jax.checkpoint.random import random_packed
from hybrimoe_jax.checkpoint.reader import open_checkpoint
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.packing import Format, dequantise, dequantise_expert, pack_expert, unpack
from hybrimoe_jax.formats.sizes import expert_bytes

FORMATS = ("int4-g64", "int8-g32-s32", "int4z-g128-a8")


def run(module: str, *args, check: int | None = 0, **options) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, "-m", f"hybrimoe_jax.{module}", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )
    assert check is None or done.returncode == check, done.stderr
    return done


def refused(module: str, *args) -> str:
    """The one line with which a command line is refused."""
    done = run(module, *args, check=2)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and not done.stdout
    return done.stderr


@functools.lru_cache
def matrices(layer: int, index: int) -> tuple[np.ndarray, ...]:
    weights = folders.tensors()
    return tuple(weights[folders.expert(layer, index, part)] for part in ("gate", "up", "down"))


@pytest.mark.parametrize(
    ("name", "dtype"),
    few([(FORMATS[1], folders.BF16)], itertools.product(FORMATS, [np.float32, folders.BF16])),
)
def test_experts_are_rounded_and_dense_tensors_keep_their_type(tmp_path, name, dtype):
    weights = folders.tensors(dtype)
    path = convert(folders.write_hf(tmp_path / "hf", weights), tmp_path / "ckpt", name)
    checkpoint = open_checkpoint(path)
    store = checkpoint.experts(verify=True, dtype="float32")
    format = Format.parse(name)
    assert checkpoint.format == store.format == name and checkpoint.manifest["version"] == shards.VERSION
    for layer in range(folders.LAYERS):
        for index in range(folders.EXPERTS):
            parts = [weights[folders.expert(layer, index, p)].astype(np.float32) for p in ("gate", "up", "down")]
            have = store.get(layer, index)
            np.testing.assert_array_equal(have.data, pack_expert(*parts, format).data)
            assert not have.data.flags.writeable and have.data.ctypes.data % 64 == 0
    assert store.nbytes == folders.LAYERS * folders.EXPERTS * expert_bytes(folders.WIDTH, folders.HIDDEN, name)
    for tensor, array in checkpoint.dense(verify=True).items():
        assert array.dtype == dtype and np.array_equal(array, weights[tensor])
    file = folders.expert_file(path, 1, 2)
    stored = path / "pieces" / "layer_00001" / "state" / "experts" / "c" / "2" / "0"
    assert stored.is_file() and not file.exists(), "an expert is one chunk"
    assert 0 <= stored.stat().st_size - store.expert_bytes < 64, "the chunk's own index is all that is added"


@pytest.mark.slow
def test_plain_checkpoints_are_written_as_before(plain_model):
    manifest = json.loads((plain_model("bf16") / "manifest.json").read_text())
    assert (manifest["version"], manifest["format"]) == (shards.PLAIN_VERSION, "bf16")


def test_a_changed_byte_of_a_quantised_expert_is_named(tmp_path, plain_model):
    path = shutil.copytree(plain_model("int4-g64"), tmp_path / "ckpt")
    folders.flip_byte(path / "pieces" / "layer_00001" / "state" / "experts" / "c" / "3" / "0")
    for verify in (False, True):
        with pytest.raises(UserError, match="expert 3 of layer 1 is corrupted"):
            open_checkpoint(path).experts(verify=verify).get(1, 3)


@pytest.mark.slow
def test_a_quantised_conversion_resumes(tmp_path, monkeypatch):
    src, written = folders.write_hf(tmp_path / "hf", folders.tensors()), []

    def stop_at_the_last(folder, shard, *args):
        if shard.name == "layer_00001" and not written.count("stopped"):
            written.append("stopped")
            raise KeyboardInterrupt
        written.append(shard.name)
        return shards.write_shard(folder, shard, *args)

    monkeypatch.setattr(checkpoint_writer, "write_shard", stop_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        convert(src, tmp_path / "ckpt", "int8-g32")
    convert(src, tmp_path / "ckpt", "int8-g32")
    assert written == ["outer", "layer_00000", "stopped", "layer_00001"]
    assert open_checkpoint(tmp_path / "ckpt").experts(verify=True, lazy=False).loaded == 8


@pytest.mark.parametrize("fmt", few([None], [None, "bf16"]))
def test_export_writes_the_numbers_that_the_codes_stand_for(tmp_path, fmt, plain_model):
    out = load_file(export_hf(plain_model("int4-g64"), tmp_path / "back", fmt=fmt) / "model.safetensors")
    packed = pack_expert(*matrices(1, 2), Format.parse("int4-g64"))
    for part, matrix in zip(("gate", "up", "down"), packed.matrices, strict=True):
        want = dequantise(matrix).astype(folders.BF16 if fmt else np.float32)
        have = out[folders.expert(1, 2, part)]
        assert have.dtype == want.dtype and np.array_equal(have, want)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == ("bfloat16" if fmt else "float32")


def test_rounding_a_second_time_is_refused(tmp_path):
    from hybrimoe_jax.checkpoint.random import random_weights
    from hybrimoe_jax.checkpoint.writer import write_checkpoint

    (tmp_path / "config.json").write_text(json.dumps(folders.CONFIG))
    weights = random_weights(tmp_path, "int8-g32")
    with pytest.raises(UserError, match="experts are int8-g32; rounding them again to int4-g32"):
        write_checkpoint(weights, tmp_path / "ckpt", fmt="int4-g32")
    store = open_checkpoint(write_checkpoint(weights, tmp_path / "ckpt", fmt="f32")).experts()
    plain, want = store.get(1, 0), dequantise_expert(weights.shards[2].experts.packed(0))
    assert np.array_equal(plain.gate_up, want.gate_up) and np.array_equal(plain.down, want.down)


@pytest.mark.parametrize("name", ["int8-g64", "int4-g32", "int4z-g64-s32"])
def test_random_codes_and_scales_are_what_the_format_allows(name):
    layout = pack_expert(
        *np.zeros((2, 300, 500), np.float32), np.zeros((500, 300), np.float32), Format.parse(name)
    ).layout
    expert = random_packed(layout, (0, 1, 2))
    for matrix in expert.matrices:
        codes, scales, zeros = unpack(matrix)
        if layout.format.bits == 8:
            assert codes.min() == -127 and codes.max() == 127
        else:
            assert codes.min() == 0 and codes.max() == 15
        assert (scales > 0).any() and (scales < 0).any() and (zeros is None or set(zeros.ravel()) == {7, 8})
        weights = dequantise(matrix)
        assert abs(weights.std() * matrix.layout.columns**0.5 - 1) < 0.05 and abs(weights.mean()) < 0.02 * weights.std()
        padded = type(matrix)(
            matrix.data, type(matrix.layout)(layout.format, 8 * matrix.layout.panels, matrix.layout.columns)
        )
        assert not dequantise(padded)[matrix.layout.rows :].any()


CONFIG = {**tiny.CONFIGS["qwen2_moe"], "torch_dtype": "bfloat16"}


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    first, same, other = (
        open_checkpoint(convert_random(tmp_path, tmp_path / name, "int4-g32", seed))
        for name, seed in (("a", 5), ("b", 5), ("c", 6))
    )
    hashes = [[shard["dense"], shard["experts"]] for shard in first.manifest["pieces"]]
    assert hashes == [[shard["dense"], shard["experts"]] for shard in same.manifest["pieces"]]
    assert hashes != [[shard["dense"], shard["experts"]] for shard in other.manifest["pieces"]]
    assert first.manifest["source"] == {"folder": None, "files": {}, "random_seed": 5}
    flat = [h for shard in first.manifest["pieces"] if shard["experts"] for h in shard["experts"]["hashes"]]
    assert len(set(flat)) == len(flat), "two experts are the same"
    assert {entry["dtype"] for shard in first.manifest["pieces"] for entry in shard["dense"].values()} == {"bfloat16"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "fmt"),
    few([("qwen2_moe", "int4-g32")], [("qwen2_moe", "int4-g32"), ("mixtral", None), ("deepseek_v2", "int8-g64")]),
)
def test_a_random_model_gives_finite_and_varied_logits(tmp_path, family, fmt):
    from hybrimoe_jax.engine.config import EngineConfig
    from hybrimoe_jax.engine.engine import Engine

    (tmp_path / "config.json").write_text(json.dumps(tiny.CONFIGS[family]))
    checkpoint = open_checkpoint(convert_random(tmp_path, tmp_path / "ckpt", fmt))
    engine = Engine(checkpoint.config, checkpoint.dense(), checkpoint.experts(), EngineConfig(executor="dense"))
    logits = engine.logits(range(16))
    assert np.isfinite(logits).all() and 0.5 < logits.std() < 50
    assert len(set(logits.argmax(axis=1))) > 5


SIZED = {**CONFIG, "hidden_size": 256, "moe_intermediate_size": 512, "num_experts": 16, "num_hidden_layers": 6}
MEASURED = """
import resource, sys
from hybrimoe_jax.checkpoint.convert import convert_random, return_freed_memory
import orbax.checkpoint.experimental.v1, tensorstore
return_freed_memory()
(open(sys.argv[1] + "/config2.json", "w").write(sys.argv[3]))
convert_random(sys.argv[1] + "/config2.json", sys.argv[2] + "-small", "int8-g32")
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert_random(sys.argv[1] + "/config.json", sys.argv[2], "int8-g32")
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base))
"""


@pytest.mark.slow
def test_random_weights_take_little_memory(tmp_path):
    """A layer of 16 experts is 7 MB here, the model 40: what is added to the base is less than a layer and the
    buffers of a write."""
    (tmp_path / "config.json").write_text(json.dumps(SIZED))
    arguments = [tmp_path, tmp_path / "ckpt", json.dumps(CONFIG)]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    layer = 16 * expert_bytes(256, 512, "int8-g32")
    assert int(done.stdout.split()[-1]) < 2 * layer, (
        f"{int(done.stdout.split()[-1]) / 1e6:.0f} MB, a layer is {layer / 1e6:.0f}"
    )


@pytest.mark.slow
def test_a_random_checkpoint_generates_the_same_in_every_executor(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    out = run("convert", "--random", tmp_path / "config.json", tmp_path / "ckpt", "--format", "int4-g32", "--seed", "3")
    assert out.stdout.startswith(f"{tmp_path / 'ckpt'}: ")
    tokens = {}
    for executor, kernel in (
        ("dense", "xla"),
        ("overlapped", "xla"),
        ("callback", "xla"),
    ):
        flags = [
            "--executor",
            executor,
            "--device-kernel",
            kernel,
            "--host-kernel",
            "reference",
            "--stats",
            "json",
            "--max-tokens",
            "12",
            "--threads",
            "1",
        ]
        if executor != "dense":
            flags += ["--debug", "--verify", "--cache-ratio", "0.5"]
        done = run("generate", "--model", tmp_path / "ckpt", "--prompt-ids", "5,7,11", *flags)
        record = json.loads(done.stdout.splitlines()[-1])
        tokens[executor, kernel] = record["token_ids"]
        assert executor == "overlapped" or record["device_kernel"] == kernel
        assert record["expert_format"] == "int4-g32"
        assert record["host_bytes"] == 3 * 8 * expert_bytes(32, 24, "int4-g32")
        assert executor == "dense" or record["costs"]["expert_bytes"] == expert_bytes(32, 24, "int4-g32")
    assert len(tokens["dense", "xla"]) == 12 and len(set(map(tuple, tokens.values()))) == 1, tokens


@pytest.mark.slow
def test_formats_and_flags_that_do_not_fit_are_refused_in_one_line(tmp_path):
    hf = folders.write_hf(tmp_path / "hf", folders.tensors())
    assert "format 'int3-g64' is not known; say f32, bf16, or" in refused(
        "convert", hf, tmp_path / "no", "--format", "int3-g64"
    )
    assert "--seed is a number of at least 0" in refused("convert", hf, tmp_path / "no", "--seed", "1")
    assert "no such file" in refused("convert", "--random", tmp_path / "absent.json", tmp_path / "no")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "'llama' is not supported" in refused("convert", "--random", tmp_path, tmp_path / "no")
    path = convert(hf, tmp_path / "ckpt", "int4-g64")
    given = ("--model", path, "--prompt-ids", "1,2", "--max-tokens", "2")
    assert "host kernel onednn computes float32 and bfloat16 experts" in refused(
        "generate", *given, "--host-kernel", "onednn"
    )
    if tiny.on_cpu():
        assert "device kernel cuda cannot run: it needs a GPU, and jax finds none; use xla" in refused(
            "generate", *given, "--device-kernel", "cuda"
        )
    assert "holds int4-g64" in refused("convert", "--export-hf", path, tmp_path / "no", "--format", "int8-g64")
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": "int8-g64"}))
    assert "does not describe the model" in refused("generate", *given)
    assert not (tmp_path / "no").exists()


def test_a_source_with_quantised_tensors_is_still_refused(tmp_path):
    hf = folders.write_hf(tmp_path / "hf", folders.tensors())
    weights = load_file(hf / "model.safetensors")
    weights[folders.expert(0, 0, "down")] = np.zeros((folders.WIDTH, folders.HIDDEN), np.int8)
    save_file(weights, hf / "model.safetensors")
    with pytest.raises(UserError, match="is stored as I8"):
        convert(hf, tmp_path / "ckpt", "int4-g64")
