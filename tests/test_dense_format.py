"""`convert --dense-format`: which tensors are rounded, the same bytes block by block, and the dense answer from
every placement."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
from grids import few

from hybrimoe_jax.__main__ import command_main
from hybrimoe_jax.checkpoint import dense as dense_packing
from hybrimoe_jax.checkpoint.convert import convert, convert_random, save
from hybrimoe_jax.checkpoint.export import export_hf
from hybrimoe_jax.checkpoint.hugging_face import open_hf
from hybrimoe_jax.checkpoint.reader import open_checkpoint
from hybrimoe_jax.checkpoint.weights import ArrayTensor
from hybrimoe_jax.engine.config import EngineConfig
from hybrimoe_jax.engine.load import load
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.packing import Format, PackedMatrix, dequantise, pack, quantise

TOLERANCE = 2e-5  # of the logits' scale


def tiny_model(folder: Path, family: str, **formats: str | None) -> Path:
    _, dense, layers = tiny.weights(family)
    experts = [(np.asarray(gate_up), np.asarray(down)) for gate_up, down in layers]
    return save(folder / "checkpoint", tiny.CONFIGS[family], dense, experts, **formats)


@pytest.mark.parametrize("name", ["int8-g32", "int4-g64", "int4z-g32-s32"])
@pytest.mark.parametrize("rows", [8, 45, 200])
def test_rounding_by_blocks_gives_the_bytes_of_rounding_at_once(name, rows, monkeypatch):
    format, weights = Format.parse(name), np.random.default_rng(0).standard_normal((rows, 77), np.float32)
    monkeypatch.setattr(dense_packing, "BLOCK_FLOATS", 77 * 16)
    made = dense_packing.pack_tensor(ArrayTensor(weights), format)
    assert np.array_equal(made.data, pack(format, *quantise(weights, format)).data)


def test_projections_are_rounded_and_nothing_else():
    yes = (
        "model.layers.0.self_attn.q_proj",
        "model.layers.2.mlp.shared_experts.down_proj",
        "lm_head",
        "x.kv_a_proj_with_mqa",
        "x.self_attn.kv_b_proj",
    )
    no = (
        "model.embed_tokens",
        "model.layers.0.mlp.gate",
        "model.layers.0.mlp.shared_expert_gate",
    )
    assert all(dense_packing.is_projection(f"{name}.weight", (8, 8)) for name in yes)
    assert not any(dense_packing.is_projection(f"{name}.weight", (8, 8)) for name in no)
    assert not dense_packing.is_projection("model.layers.0.self_attn.q_proj.bias", (8,))


def test_what_latent_attention_multiplies_from_both_sides_takes_no_rounded_activations():
    asked = Format.parse("int4-g32-a8")
    assert str(dense_packing.format_of("x.kv_b_proj.weight", asked)) == "int4-g32"
    assert dense_packing.format_of("x.kv_a_proj_with_mqa.weight", asked) == asked


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "fmt", "dense_format"),
    few(
        [("qwen2_moe", "int4-g32", "int4z-g64")],
        [
            ("qwen2_moe", None, "int8-g32"),
            ("mixtral", None, "int8-g32"),
            ("deepseek_v2", None, "int8-g32"),
            ("mixtral", "int4-g32", "int4z-g64"),
            ("qwen2_moe", "int4-g32", "int4z-g64"),
            ("deepseek_v2", "int4-g32", "int4z-g64"),
        ],
    ),
)
def test_every_placement_gives_the_dense_answer(family, fmt, dense_format, tmp_path):
    folder = tiny_model(tmp_path, family, fmt=fmt, dense_format=dense_format)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.dense_format == dense_format
    assert any(isinstance(tensor, PackedMatrix) for tensor in checkpoint.dense(verify=True).values())
    ids, answers = [(5 * i) % checkpoint.config.vocab_size for i in range(20)], []
    for executor, ratio in (("dense", None), ("overlapped", 0.0), ("overlapped", 0.5), ("callback", 0.5)):
        engine = load(folder, EngineConfig(executor=executor, cache_ratio=ratio, max_context=64))
        answers.append((engine.logits(ids), engine.generate([ids, ids[:5]], max_new_tokens=6).token_ids))
        engine.close()
    logits, tokens = answers[0]
    for other, made in answers[1:]:
        assert np.abs(other - logits).max() <= TOLERANCE * np.abs(logits).max()
        assert made == tokens


def test_exported_values_are_what_the_codes_stand_for(tmp_path):
    folder = tiny_model(tmp_path, "qwen2_moe", dense_format="int4-g32")
    dense = open_checkpoint(folder).dense()
    exported = {n: t for p in open_hf(export_hf(folder, tmp_path / "hf")).shards for n, t in p.dense.items()}
    for name, tensor in dense.items():
        values = dequantise(tensor) if isinstance(tensor, PackedMatrix) else tensor
        assert np.array_equal(np.asarray(exported[name].read(), np.float32), np.asarray(values, np.float32)), name


def test_random_weights_take_it_and_a_second_run_goes_on(tmp_path):
    import json

    (tmp_path / "config.json").write_text(json.dumps(tiny.CONFIGS["qwen2_moe"]))
    done = convert_random(tmp_path, tmp_path / "out", "int4-g32", dense_format="int8-g32")
    assert open_checkpoint(done).manifest["version"] == 2


def test_what_is_no_quantised_format_is_refused(tmp_path, capsys):
    for wrong, why in (
        ("bf16", "leave it out, or say a quantised one"),
        ("int5-g32", "not known; say a quantised one"),
    ):
        with pytest.raises(UserError, match=why):
            convert(tmp_path, tmp_path / "out", dense_format=wrong)
    with pytest.raises(SystemExit, match="2"):
        command_main("convert")(["--export-hf", "a", "b", "--dense-format", "int8-g32"])
    assert "--dense-format does not go with --export-hf" in capsys.readouterr().err
