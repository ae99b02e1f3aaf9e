"""Quantised folders of others, read without rounding: against what was written, and against the library where
there is one."""

import dataclasses
import json

import numpy as np
import pytest
import quantised_folders as folders
import tiny
from quantised_folders import Coded, coded, grouped_by, symmetric_bits, unlisted, write, write_plain

import hybrimoe_jax
from hybrimoe_jax import EngineConfig
from hybrimoe_jax import convert as command
from hybrimoe_jax.checkpoint.hugging_face import open_hf
from hybrimoe_jax.checkpoint.quantised.codes import QuantisedTensor
from hybrimoe_jax.checkpoint.quantised.experts import exact_format, holds, packed_expert, quantised_format
from hybrimoe_jax.checkpoint.reader import open_checkpoint
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.packing import Format, dequantise

EXPERT = "model.layers.1.mlp.experts.3"


CASES = {
    "gptq-v1": ("gptq", {}, {}, "int4z-g32"),
    "gptq-v1-zero-0": ("gptq", {"make": coded(least=0)}, {}, "int4z-g32"),
    "gptq-v2": ("gptq", {"encode": lambda c: c.gptq(2)}, {"checkpoint_format": "gptq_v2"}, "int4z-g32"),
    "gptq-sym": ("gptq", {"make": coded(group=64, symmetric=True)}, {"sym": True}, "int4-g64"),
    "gptq-one-group": ("gptq", {"make": coded(group=1 << 20)}, {}, "int4z-g128"),
    "gptq-8-bit": ("gptq", {"make": coded(bits=8, symmetric=True)}, {"sym": True, "bits": 8}, "int8-g32"),
    "gptq-static-groups": ("gptq", {}, {"desc_act": True}, "int4z-g32"),
    "awq": ("awq", {"make": coded(group=64)}, {}, "int4z-g64"),
    "ct-bf16-scales": ("compressed-tensors", {"make": coded(scale=folders.BF16)}, {}, "int4z-g32-s32"),
    "ct-sym": ("compressed-tensors", {"make": coded(symmetric=True)}, symmetric_bits(4), "int4-g32"),
    "ct-int8": ("compressed-tensors", {"make": coded(symmetric=True, bits=8)}, symmetric_bits(8), "int8-g32"),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_packed_experts_are_exact(tmp_path, case):
    method, options, settings, want = CASES[case]
    values, _ = write(tmp_path / "hf", method, settings=settings, **options)
    weights = open_hf(tmp_path / "hf")
    assert "quantization_config" not in weights.raw_config
    format = quantised_format(weights)
    assert str(format) == want
    for shard in weights.shards:
        for name, tensor in shard.dense.items():
            np.testing.assert_array_equal(tensor.read(), values[name], err_msg=name)
            if isinstance(tensor, QuantisedTensor):
                np.testing.assert_array_equal(tensor.read(1, 3), values[name][1:3], err_msg=name)
        for e in range(shard.experts.count if shard.experts else 0):
            stem = f"model.layers.{shard.layer}.mlp.experts.{e}"
            packed = packed_expert(shard.experts, format, e)
            for part, read, matrix in zip(("gate", "up", "down"), shard.experts.read(e), packed.matrices, strict=True):
                np.testing.assert_array_equal(read, values[f"{stem}.{part}_proj.weight"])
                np.testing.assert_array_equal(dequantise(matrix), read)


def scattered(rng, columns, group=32):
    return rng.permutation(np.arange(columns) // group)


def test_act_order_of_the_down_matrix_is_undone(tmp_path):
    """Hidden values may be renumbered: rows of gate and up, columns of down."""

    def make(rng, module, rows, columns):
        down = module.endswith("down_proj") and ".experts." in module
        return Coded(rng, rows, columns, 32, group_of=scattered(rng, columns) if down else None)

    values, _ = write(tmp_path / "hf", "gptq", make=make, settings={"desc_act": True})
    weights = open_hf(tmp_path / "hf")
    format = quantised_format(weights)
    assert str(format) == "int4z-g32"
    gate, up, down = (dequantise(m) for m in packed_expert(weights.shards[2].experts, format, 3).matrices)
    kept = [values[f"{EXPERT}.{part}_proj.weight"] for part in ("gate", "up", "down")]
    order = [int(np.flatnonzero((kept[0] == row).all(axis=1))[0]) for row in gate]
    assert sorted(order) == list(range(64)) and order != sorted(order)
    for have, want in ((gate, kept[0][order]), (up, kept[1][order]), (down, kept[2][:, order])):
        np.testing.assert_array_equal(have, want)


@pytest.mark.parametrize("method", ["gptq", "compressed-tensors"])
def test_act_order_of_the_residual_stream_stays_float(tmp_path, method):
    def make(rng, module, rows, columns):
        return Coded(rng, rows, columns, 32, group_of=scattered(rng, columns))

    encode = (lambda c: c.compressed(True)) if method != "gptq" else None
    values, _ = write(tmp_path / "hf", method, make=make, encode=encode, settings={"desc_act": True})
    weights = open_hf(tmp_path / "hf")
    for have, part in zip(weights.shards[2].experts.read(3), ("gate", "up", "down"), strict=True):
        np.testing.assert_array_equal(have, values[f"{EXPERT}.{part}_proj.weight"])
    with pytest.raises(UserError, match=r"act-order.*give --format f32, which keeps their values"):
        quantised_format(weights)


def test_a_format_holds_what_a_coarser_one_does():
    exact = Format.parse("int4-g128")
    fine = ("int4-g128", "int4-g32", "int4z-g64", "int4-g64-s32-a8")
    assert all(holds(Format.parse(name), exact) for name in fine)
    assert not any(
        holds(Format.parse(name), Format.parse("int4z-g64-s32")) for name in ("int4-g64-s32", "int4z-g128-s32")
    )
    assert not holds(Format.parse("int8-g128"), exact) and not holds(exact, Format.parse("int4-g128-s32"))
    assert exact_format([None]) == "some of them are not quantised"


def test_a_coarse_group_goes_into_a_finer_format(tmp_path):
    write(tmp_path / "hf", "awq", make=coded(group=64))
    experts = open_hf(tmp_path / "hf").shards[1].experts
    for matrix, want in zip(
        packed_expert(experts, Format.parse("int4z-g32"), 2).matrices, experts.read(2), strict=True
    ):
        np.testing.assert_array_equal(dequantise(matrix), want)


@pytest.mark.parametrize("method", ["gptq", "compressed-tensors"])
@pytest.mark.parametrize("size", [48, 40, 32, -1])
def test_group_sizes_that_no_list_of_groups_gives(tmp_path, method, size):
    """3 groups of 48 of 128 inputs are not 3 of 43, and 4 of 40 not 4 of 32."""
    made = coded(group=size if size > 0 else 1 << 20)
    values, _ = write(tmp_path / "hf", method, make=made, encode=unlisted(method), settings=grouped_by(method, size))
    weights = open_hf(tmp_path / "hf")
    for name, tensor in [item for shard in weights.shards for item in shard.dense.items()]:
        np.testing.assert_array_equal(tensor.read(), values[name], err_msg=name)
    for have, part in zip(weights.shards[2].experts.read(3), ("gate", "up", "down"), strict=True):
        np.testing.assert_array_equal(have, values[f"{EXPERT}.{part}_proj.weight"])
    if size in (40, 48):
        with pytest.raises(UserError, match="no runs of 32 inputs"):
            quantised_format(weights)


def test_made_up_biases_are_dropped(tmp_path):
    def encode(made):
        return made.gptq() | {"bias": np.zeros(made.codes.shape[0], np.float16)}

    def with_bias(made):
        return made.gptq() | {"bias": np.ones(made.codes.shape[0], np.float16)}

    write(tmp_path / "hf", "gptq", encode=encode)
    dense = open_hf(tmp_path / "hf").shards[1].dense
    assert "model.layers.0.self_attn.q_proj.bias" in dense and "model.layers.0.self_attn.o_proj.bias" not in dense
    write(tmp_path / "other", "gptq", encode=with_bias)
    with pytest.raises(UserError, match="unexpected"):
        open_hf(tmp_path / "other")


@pytest.mark.parametrize("method, file", [("gptq", "quantize_config.json"), ("awq", "quant_config.json")])
def test_settings_that_lie_beside_config_json_are_read(tmp_path, method, file):
    """Folders of early quantisers have none in config.json; newer ones have both."""
    folder = tmp_path / "hf"
    values, _ = write(folder, method)
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    early = {k: v for k, v in settings.items() if k != "quant_method"}
    if method == "awq":
        early = {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}

    def opened(stated, beside):
        (folder / "config.json").write_text(json.dumps(config | stated))
        (folder / file).unlink(missing_ok=True)
        if beside is not None:
            (folder / file).write_text(json.dumps(beside))
        return open_hf(folder)

    part = {"quant_method": method, "bits": 4}
    for stated in ({}, {"quantization_config": settings}, {"quantization_config": part}):
        for name, tensor in opened(stated, early).shards[1].dense.items():
            np.testing.assert_array_equal(tensor.read(), values[name])
    with pytest.raises(UserError, match=rf"{file}: bits is 8, but 4 in config\.json"):
        opened({"quantization_config": settings}, {"bits": 8})
    with pytest.raises(UserError, match=r"neither config\.json has a quantization_config nor is"):
        opened({}, None)


@pytest.mark.parametrize("symmetric", [True, False])
def test_agrees_with_the_library_of_compressed_tensors(tmp_path, symmetric):
    torch = pytest.importorskip("torch")
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")

    def encode(made):
        signed = torch.from_numpy((made.codes - 8).astype(np.int8))
        parts = made.compressed()
        parts["weight_packed"] = helpers.pack_to_int32(signed, 4).numpy()
        if not made.symmetric:
            zeros = torch.from_numpy((made.zeros - 8).astype(np.int8))
            parts["weight_zero_point"] = helpers.pack_to_int32(zeros, 4, packed_dim=0).numpy()
        return parts

    settings = symmetric_bits(4) if symmetric else {}
    values, _ = write(tmp_path / "hf", "compressed-tensors", encode, coded(symmetric=symmetric), settings)
    for have, part in zip(open_hf(tmp_path / "hf").shards[2].experts.read(3), ("gate", "up", "down"), strict=True):
        np.testing.assert_array_equal(have, values[f"{EXPERT}.{part}_proj.weight"])


def test_the_plain_folder_of_the_same_values_reads_the_same(tmp_path):
    values, _ = write(tmp_path / "hf", "awq")
    quantised, plain = open_hf(tmp_path / "hf"), open_hf(write_plain(tmp_path / "plain", values))
    assert quantised.config == plain.config and quantised.raw_config == plain.raw_config
    for a, b in zip(quantised.shards, plain.shards, strict=True):
        for name in b.dense:
            np.testing.assert_array_equal(a.dense[name].read(), b.dense[name].read())


@pytest.mark.slow
def test_the_engine_answers_as_with_the_values_in_float32(tmp_path):
    """The whole way: convert, packed experts on both sides, logits; against the same numbers unquantised."""
    values, _ = write(tmp_path / "hf", "gptq", make=coded(group=64))
    write_plain(tmp_path / "plain", values)
    ids, answers = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], []
    for name in ("hf", "plain"):
        assert command.main([str(tmp_path / name), str(tmp_path / f"{name}-done")]) == 0
        costs = tiny.costs(open_hf(tmp_path / name).config)
        costs = dataclasses.replace(
            costs, expert_bytes=open_checkpoint(tmp_path / f"{name}-done").experts().expert_bytes
        )
        options = EngineConfig(system="cpu-only", host_kernel="reference", profile=costs)
        engine = hybrimoe_jax.load(tmp_path / f"{name}-done", options)
        answers.append(np.asarray(engine.logits(ids)))
        assert engine.store.format == ("int4z-g64" if name == "hf" else "f32")
        engine.close()
    np.testing.assert_allclose(*answers, atol=1e-4 * np.abs(answers[1]).max())
