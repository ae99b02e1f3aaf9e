"""Conversion: what comes out is what went in, in every layout, and back in the export; it needs little memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import checkpoint_folders as folders
import ml_dtypes
import numpy as np
import pytest
from checkpoint_folders import assert_same, contents
from grids import few
from safetensors.numpy import load_file

from hybrimoe_jax.checkpoint import export as exporting
from hybrimoe_jax.checkpoint import shards
from hybrimoe_jax.checkpoint.convert import convert, save
from hybrimoe_jax.checkpoint.export import export_hf
from hybrimoe_jax.checkpoint.hugging_face import TEXT_FILES
from hybrimoe_jax.checkpoint.reader import open_checkpoint
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.text.templates import MORE

BF16 = ml_dtypes.bfloat16


@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_arrives_unchanged(tmp_path, shards):
    weights = folders.tensors()
    src = folders.write_hf(tmp_path / "hf", weights, shards)
    (src / "additional_chat_templates").mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "additional_chat_templates/rag.jinja"):
        (src / name).write_text(f"text of {name}")
    dst = convert(src, tmp_path / "deep" / "er" / "ckpt")
    assert_same(contents(dst), weights)
    for name in ("chat_template.jinja", "additional_chat_templates/rag.jinja"):
        assert (dst / name).read_text() == f"text of {name}"
    checkpoint = open_checkpoint(dst)
    assert checkpoint.generation_config == {"eos_token_id": [2, 3]} and checkpoint.raw_config == folders.CONFIG
    assert checkpoint.manifest["format"] == "f32" and checkpoint.manifest["source"]["folder"] == "hf"
    assert [p.name for p in dst.parent.iterdir()] == ["ckpt"], "the workplace must be gone"


def test_own_type_is_kept_and_float16_widens_exactly(tmp_path):
    weights = folders.tensors(BF16)
    weights["model.norm.weight"] = weights["model.norm.weight"].astype(np.float32)
    weights["lm_head.weight"] = weights["lm_head.weight"].astype(np.float16)
    dst = convert(folders.write_hf(tmp_path / "hf", weights), tmp_path / "ckpt")
    want = weights | {"lm_head.weight": weights["lm_head.weight"].astype(np.float32)}
    assert_same(contents(dst), want)
    assert open_checkpoint(dst).manifest["format"] == "bf16"


@pytest.mark.parametrize(("source", "fmt", "dtype"), [(np.float32, "bf16", BF16), (BF16, "f32", np.float32)])
def test_format_converts_every_tensor(tmp_path, source, fmt, dtype):
    weights = folders.tensors(source)
    dst = convert(folders.write_hf(tmp_path / "hf", weights), tmp_path / "ckpt", fmt)
    assert_same(contents(dst), {name: array.astype(dtype) for name, array in weights.items()})


def test_fused_experts_and_the_other_block_name(tmp_path):
    rng = np.random.default_rng(0)
    common = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = {key: folders.CONFIG[key] for key in (*common, "num_experts_per_tok")}
    config |= {"model_type": "mixtral", "num_local_experts": 4, "intermediate_size": 8, "sliding_window": None}
    listed, fused = {}, {}
    for name, array in folders.tensors().items():
        if "mlp" not in name and "bias" not in name:
            listed[name] = fused[name] = array
    for layer in range(folders.LAYERS):
        gate_up, down = rng.standard_normal((4, 16, 16), np.float32), rng.standard_normal((4, 16, 8), np.float32)
        router = rng.standard_normal((4, 16), np.float32)
        fused[f"model.layers.{layer}.mlp.gate.weight"] = router
        fused[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = gate_up
        fused[f"model.layers.{layer}.mlp.experts.down_proj"] = down
        block = f"model.layers.{layer}.block_sparse_moe."
        listed[f"{block}gate.weight"] = router
        for e in range(4):
            listed |= {f"{block}experts.{e}.w1.weight": gate_up[e, :8], f"{block}experts.{e}.w3.weight": gate_up[e, 8:]}
            listed[f"{block}experts.{e}.w2.weight"] = down[e]
    paths = [
        convert(
            folders.write_hf(tmp_path / f"hf_{kind}", {n: a.copy() for n, a in weights.items()}, base=config),
            tmp_path / kind,
        )
        for kind, weights in (("listed", listed), ("fused", fused))
    ]
    first, second = (open_checkpoint(path).manifest["pieces"] for path in paths)
    assert first == second, "the same model in two layouts must have the same hashes"
    got = open_checkpoint(paths[0]).experts().get(1, 2)
    assert np.array_equal(got.gate_up, gate_up[2]) and np.array_equal(got.down, down[2])


def test_shards_are_plain_orbax_items_with_an_expert_to_a_chunk(plain_model):
    import orbax.checkpoint.experimental.v1 as ocp

    weights, dst = folders.tensors(), plain_model()
    item = ocp.load((dst / "pieces" / "layer_00001").absolute())
    packed = np.asarray(item["experts"])
    assert packed.shape == (4, 3, 8 * 16)
    assert np.array_equal(packed[3, 2].reshape(16, 8), weights[folders.expert(1, 3, "down")])
    assert np.array_equal(item["model.layers.1.mlp.gate.weight"], weights["model.layers.1.mlp.gate.weight"])
    assert len(list((dst / "pieces" / "layer_00001" / "state" / "experts" / "c").iterdir())) == 4


def test_large_dense_tensors_are_written_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "row_block", lambda shape, dtype: 5)  # 24 rows: four blocks and a shorter one
    weights = folders.tensors()
    dst = convert(folders.write_hf(tmp_path / "hf", weights), tmp_path / "ckpt")
    assert_same(contents(dst), weights)


def test_a_model_in_memory_is_saved_the_same(tmp_path, plain_model):
    weights = folders.tensors()
    src = folders.write_hf(tmp_path / "hf", weights)
    dense = {name: array for name, array in weights.items() if ".experts." not in name}
    stacks = []
    for i in range(folders.LAYERS):
        gate, up, down = (
            np.stack([weights[folders.expert(i, e, p)] for e in range(4)]) for p in ("gate", "up", "down")
        )
        stacks.append((np.concatenate([gate, up], axis=1), down))
    path = save(tmp_path / "saved", folders.CONFIG, dense, stacks, text_folder=src)
    assert open_checkpoint(path).manifest["pieces"] == open_checkpoint(plain_model()).manifest["pieces"]
    assert open_checkpoint(path).generation_config == {"eos_token_id": [2, 3]}
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        save(tmp_path / "other", folders.CONFIG, {n: a for n, a in dense.items() if n != "lm_head.weight"}, stacks)


def test_tied_head_and_old_buffers_are_no_strangers(tmp_path):
    weights = folders.tensors()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    dst = convert(folders.write_hf(tmp_path / "hf", weights, tie_word_embeddings=True), tmp_path / "ckpt")
    assert "lm_head.weight" not in open_checkpoint(dst).dense()
    weights["lm_head.weight"][0, 0] += 1
    with pytest.raises(UserError, match=r"tie_word_embeddings is true but lm_head\.weight differs"):
        convert(folders.write_hf(tmp_path / "hf2", weights, tie_word_embeddings=True), tmp_path / "ckpt2")


PEAK = """
import json, sys
from pathlib import Path
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
from hybrimoe_jax.convert import main
main(sys.argv[1:3])  # a tiny one: imports, Orbax and jax have what they need
base = peak()
main(sys.argv[3:5])
print(peak() - base)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from /proc")
def test_peak_memory_is_below_one_layer(tmp_path):
    layers, experts, width, hidden, vocab = 6, 8, 512, 816, 20000
    config = dict(
        vocab_size=vocab, num_hidden_layers=layers, num_experts=experts, hidden_size=width, moe_intermediate_size=hidden
    )
    weights = {}
    rng = np.random.default_rng(0)
    for name, small in folders.tensors(layers=layers).items():
        shape = [{16: width, 8: width // 2}.get(n, n) for n in small.shape]
        if ".experts." in name:
            continue
        if name.endswith("mlp.gate.weight"):
            shape = [experts, width]
        elif name.startswith(("model.embed", "lm_head")):
            shape = [vocab, width]
        weights[name] = rng.standard_normal(shape, np.float32)
    for layer in range(layers):
        for e in range(experts):
            for part in ("gate", "up", "down"):
                shape = (width, hidden) if part == "down" else (hidden, width)
                weights[folders.expert(layer, e, part)] = rng.standard_normal(shape, np.float32)
    layer_bytes = experts * 3 * width * hidden * 4
    assert layer_bytes > 40e6 and vocab * width * 4 > 40e6
    big = folders.write_hf(tmp_path / "big", weights, shards=2, **config)
    del weights
    tiny = folders.write_hf(tmp_path / "tiny", folders.tensors())
    arguments = [tiny, tmp_path / "out_tiny", big, tmp_path / "out_big"]
    done = subprocess.run([sys.executable, "-c", PEAK, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    extra = int(done.stdout.split()[-1])
    print(
        f"peak above base {extra / 1e6:.0f} MB; a layer {layer_bytes / 1e6:.0f} MB, "
        f"the token table {vocab * width * 4 / 1e6:.0f} MB"
    )
    assert extra < layer_bytes


@pytest.mark.slow
@pytest.mark.parametrize("case", few(["qwen3"], ["mixtral", "qwen2-mixed", "qwen3", "olmoe", "deepseek-lite"]))
def test_transformers_loads_what_is_exported(tmp_path, case):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import hf

    src = hf.hf_folder(case)
    checkpoint = convert(src, tmp_path / "ckpt")
    back = export_hf(checkpoint, tmp_path / "back")
    assert_same(load_file(back / "model.safetensors"), load_file(Path(src) / "model.safetensors"))
    ids = torch.tensor([[5, 9, 2, 77, 30, 11]])
    logits = []
    for folder in (src, back):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            logits.append(model(ids).logits)
    assert torch.allclose(*logits, rtol=0, atol=1e-5)  # where tensors lie in a file moves torch's last bit


def test_export_of_a_bf16_checkpoint_says_so_and_can_be_sharded(tmp_path, monkeypatch):
    weights = folders.tensors()
    dst = convert(folders.write_hf(tmp_path / "hf", weights, dtype="float32"), tmp_path / "ckpt", "bf16")
    write = exporting.write_folder
    monkeypatch.setattr(exporting, "write_folder", lambda folder, tensors: write(folder, tensors, max_file_bytes=4000))
    back = export_hf(dst, tmp_path / "back")
    assert json.loads((back / "config.json").read_text())["dtype"] == "bfloat16"
    index = json.loads((back / "model.safetensors.index.json").read_text())["weight_map"]
    files = {name: load_file(back / name) for name in set(index.values())}
    assert len(files) > 2
    assert_same(
        {name: files[file][name] for name, file in index.items()}, {n: a.astype(BF16) for n, a in weights.items()}
    )
    again = convert(back, tmp_path / "again")
    assert open_checkpoint(again).manifest["pieces"] == open_checkpoint(dst).manifest["pieces"]


BESIDE = (*TEXT_FILES, f"{MORE}/extra.jinja")


@pytest.mark.parametrize("name", [*BESIDE, "model.safetensors", "model.safetensors.index.json", "adapter_config.json"])
def test_a_link_that_leads_nowhere_is_not_a_file_that_nobody_wanted(tmp_path, name):
    source = folders.write_hf(tmp_path / "hf", folders.tensors())
    (source / name).unlink(missing_ok=True)
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).symlink_to("../../blobs/deleted")
    if name.endswith(".index.json"):
        (source / "model.safetensors").unlink()
    with pytest.raises(UserError, match=f"{name}: a link that leads nowhere"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_optional_file_of_a_checkpoint_must_be_one(plain_model, tmp_path):
    made = shutil.copytree(plain_model(), tmp_path / "made")
    (made / "generation_config.json").unlink()
    (made / "generation_config.json").mkdir()
    with pytest.raises(UserError, match=r"generation_config\.json: no plain file"):
        open_checkpoint(made)
