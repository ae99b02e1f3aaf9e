"""Quantised folders of others that are refused: damaged ones, settings that belie them, what is not supported."""

import re

import numpy as np
import pytest
from quantised_folders import Coded, coded, grouped_by, parts, symmetric_bits, unlisted, write
from safetensors.numpy import load_file, save_file

from hybrimoe_jax import convert as command
from hybrimoe_jax.checkpoint.hugging_face import open_hf
from hybrimoe_jax.checkpoint.quantised.experts import packed_expert, quantised_format
from hybrimoe_jax.errors import UserError


@pytest.mark.parametrize("method", ["gptq", "compressed-tensors"])
@pytest.mark.parametrize("size", [64, None, "32"])
def test_a_group_size_that_belies_the_number_of_groups_is_refused(tmp_path, method, size):
    write(tmp_path / "hf", method, encode=unlisted(method), settings=grouped_by(method, size))
    with pytest.raises(UserError, match=r"layers\.0\..*: [24] groups of .* inputs do not follow"):
        open_hf(tmp_path / "hf")


def test_sorted_inputs_without_a_list_of_groups_are_refused(tmp_path):
    settings = grouped_by("gptq", 32) | {"desc_act": True}
    write(tmp_path / "hf", "gptq", encode=unlisted("gptq"), settings=settings)
    with pytest.raises(UserError, match="desc_act is set, but there is no g_idx"):
        open_hf(tmp_path / "hf")


def test_numbers_that_belie_the_configuration_are_refused(tmp_path):
    write(tmp_path / "asymmetric", "gptq", settings={"sym": True})
    with pytest.raises(UserError, match=r"calls it symmetric .* not all 8; set sym to false"):
        open_hf(tmp_path / "asymmetric")

    write(tmp_path / "moved", "compressed-tensors", settings=symmetric_bits(4))
    tensor = open_hf(tmp_path / "moved").shards[1].dense["model.layers.0.self_attn.o_proj.weight"]
    with pytest.raises(UserError, match=r"weight_zero_point moves its zeros, though config\.json calls .* symmetric"):
        tensor.read()

    def least(rng, module, rows, columns):
        made = Coded(rng, rows, columns, 32, bits=8, symmetric=True)
        made.codes[0, 0] = 0
        return made

    write(tmp_path / "least", "compressed-tensors", make=least, settings=symmetric_bits(8))
    weights = open_hf(tmp_path / "least")
    with pytest.raises(UserError, match="codes of -128"):
        packed_expert(weights.shards[1].experts, quantised_format(weights), 0)


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
@pytest.mark.parametrize("name", ["self_attn.o_proj", "mlp.experts.1.up_proj"])
@pytest.mark.parametrize("first", [False, True])
def test_a_plain_matrix_beside_a_quantised_one_is_refused(tmp_path, method, name, first):
    values, _ = write(tmp_path / "hf", method)
    path, name = tmp_path / "hf/model.safetensors", f"model.layers.0.{name}.weight"
    extra, stored = {name: np.full_like(values[name], 7)}, load_file(path)
    save_file({**extra, **stored} if first else {**stored, **extra}, path, {"format": "pt"})
    with pytest.raises(UserError, match=rf"{re.escape(name[:-7])}\.\w+ and .* are both {re.escape(name)}"):
        open_hf(tmp_path / "hf")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("settings, stored", [({}, 2), ({"sym": False}, 2), ({"checkpoint_format": "gptq_v2"}, 1)])
def test_zero_points_of_the_other_version_are_seen_and_the_advice_is_right(tmp_path, bits, settings, stored):
    """GPTQ's two versions store the zero points of symmetric weights as 7 and as 8; labels are wrong or absent."""

    def make(rng, module, rows, columns):
        return Coded(rng, rows, columns, 32, bits=bits, symmetric=True)

    options = {"make": make, "encode": lambda coded: coded.gptq(version=stored)}
    settings = {"bits": bits, "sym": True} | settings
    write(tmp_path / "wrong", "gptq", settings=settings, **options)
    right = "gptq_v2" if stored == 2 else "gptq"
    with pytest.raises(UserError, match=rf"but stored as '{right}'; set checkpoint_format to '{right}'"):
        open_hf(tmp_path / "wrong")
    values, _ = write(tmp_path / "right", "gptq", settings=settings | {"checkpoint_format": right}, **options)
    name, tensor = next(iter(open_hf(tmp_path / "right").shards[1].dense.items()))
    np.testing.assert_array_equal(tensor.read(), values[name])


REFUSED = [
    ("gptq", {}, {"encode": lambda c: parts(c.gptq(), qweight=np.int64)}, "qweight is stored as I64.* words are I32"),
    ("gptq", {}, {"encode": lambda c: parts(c.gptq(), qzeros=np.int16)}, "qzeros is stored as I16"),
    ("gptq", {}, {"encode": lambda c: parts(c.gptq(), scales=np.int32)}, "scales is stored as I32; only F32"),
    ("awq", {}, {"encode": lambda c: parts(c.awq(), qweight=np.uint32)}, "qweight is stored as U32"),
    ("awq", {}, {"encode": lambda c: parts(c.awq(), qzeros=None)}, "has no qzeros"),
    (
        "compressed-tensors",
        {},
        {"encode": lambda c: parts(c.compressed(), weight_packed=np.int64)},
        "weight_packed is stored as I64",
    ),
    (
        "compressed-tensors",
        {},
        {"encode": lambda c: parts(c.compressed(), weight_zero_point=None)},
        "has no weight_zero_point, though config.json calls its 4 bits asymmetric",
    ),
    ("gptq", {"checkpoint_format": "marlin"}, {}, "checkpoint_format 'marlin' is not supported"),
    ("gptq", {"format": "marlin"}, {}, "checkpoint_format 'marlin' is not supported"),
    ("gptq", {"adapter": {"name": "lora"}}, {}, "GPTQ adapter .* is not supported"),
    ("gptq", {"bits": 3}, {"encode": lambda c: {k: v for k, v in c.gptq().items() if k != "g_idx"}}, "has 3 bits"),
    ("gptq", {}, {"encode": lambda c: {k: v for k, v in c.gptq().items() if k != "qzeros"}}, "has no qzeros"),
    ("gptq", {}, {"encode": lambda c: c.gptq() | {"qzeros": c.gptq()["qzeros"][:, 1:]}}, "shapes of qweight, qzeros"),
    ("gptq", {"quant_method": "bitsandbytes"}, {}, r"quantization_config \(bitsandbytes\) is not supported"),
    ("awq", {"version": "gemv"}, {}, "version 'gemv' is not supported"),
    ("awq", {"bits": 3}, {}, "AWQ with 3 bits"),
    ("awq", {}, {"encode": lambda c: c.awq() | {"scales": c.awq()["scales"][:, 8:]}}, "do not belong together"),
    ("compressed-tensors", {"transform_config": {"config_groups": {"u": {}}}}, {}, "transform_config is not supported"),
    ("gptq", {"quant_method": []}, {}, r"quantization_config \(\[\]\) is not supported"),
    ("gptq", {"checkpoint_format": ["gptq"]}, {}, "quantization_config, or .* cannot be read: .*unhashable type"),
    ("compressed-tensors", {"config_groups": ["Linear"]}, {}, "config_groups must be an object of objects"),
    ("compressed-tensors", {"config_groups": {"g": {"weights": "x"}}}, {}, "weights 'x' is not supported"),
    (
        "compressed-tensors",
        {},
        {"encode": lambda c: c.compressed() | {"weight_shape": np.array([1, 2, 3], np.int64)}},
        "config.json: quantization_config, or .* cannot be read: .*too many values to unpack",
    ),
    ("compressed-tensors", {"format": "nvfp4-pack-quantized"}, {}, "format 'nvfp4-pack-quantized' is not supported"),
    (
        "compressed-tensors",
        {"config_groups": {"g": {"weights": {"num_bits": 4, "strategy": "tensor"}}}},
        {},
        "strategy 'tensor' is not supported",
    ),
    (
        "compressed-tensors",
        {},
        {"encode": lambda c: c.compressed() | {"weight_scale": c.compressed()["weight_scale"][1:]}},
        "weight_packed .* do not",
    ),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_what_is_not_supported_or_damaged_is_refused_by_name(tmp_path, number):
    method, settings, options, message = REFUSED[number]
    write(tmp_path / "hf", method, settings=settings, **options)
    with pytest.raises(UserError, match=message):
        open_hf(tmp_path / "hf")


def test_a_second_rounding_is_refused(tmp_path):
    write(tmp_path / "hf", "gptq", make=coded(group=64))
    for format in ("int4z-g128", "int4-g32", "int8-g64"):
        with pytest.raises(UserError, match=f"rounding them again to {format} would lose accuracy twice"):
            command.main([str(tmp_path / "hf"), str(tmp_path / "out"), "--format", format])
    (tmp_path / "text").write_text("words")
    with pytest.raises(UserError, match="quantised already; leave out --calibrate"):
        command.main(
            [
                str(tmp_path / "hf"),
                str(tmp_path / "out"),
                "--format",
                "int4z-g32",
                "--calibrate",
                str(tmp_path / "text"),
            ]
        )
    assert command.main([str(tmp_path / "hf"), str(tmp_path / "out"), "--format", "int4z-g32-a8"]) == 0
