"""GGUF files of tiny random models (`gguf_files`), read back: the file's own numbers, and the answers they give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_files import COMMON, MODELS, write
from grids import each_once

from hybrimoe_jax import convert as command
from hybrimoe_jax.checkpoint.gguf.file import open_gguf
from hybrimoe_jax.checkpoint.quantised.experts import packed_expert, quantised_format
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.packing import dequantise
from hybrimoe_jax.models.moe import DenseExperts
from hybrimoe_jax.models.parameters import merge, split
from hybrimoe_jax.models.registry import build_model, parse_config


def logits(config, dense, experts) -> np.ndarray:
    """The dense model's answer."""
    ids = np.arange(40).reshape(2, 20) % config.vocab_size
    graph, _ = split(build_model(config))
    stacks = []
    for layer in range(config.num_hidden_layers):
        if layer not in config.moe_layers:
            stacks.append(None)
            continue
        triples = [experts[layer, e] for e in range(config.num_experts)]
        stacks.append((np.stack([np.concatenate(t[:2]) for t in triples]), np.stack([t[2] for t in triples])))

    @jax.jit
    def forward(dense, stacks):
        net = merge(graph, dense)
        positions = jnp.broadcast_to(jnp.arange(20), ids.shape)
        return net(ids, net.init_cache(2, 20), positions, DenseExperts(stacks))[0]

    return np.asarray(forward({n: jnp.asarray(a, jnp.float32) for n, a in dense.items()}, stacks))


def read(weights):
    """Everything as float32: dense by name and experts by (layer, expert)."""
    dense = {n: np.asarray(t.read(), np.float32) for shard in weights.shards for n, t in shard.dense.items()}
    experts = {
        (shard.layer, e): [np.asarray(m, np.float32) for m in shard.experts.read(e)]
        for shard in weights.shards
        if shard.experts is not None
        for e in range(shard.experts.count)
    }
    return dense, experts


@pytest.mark.parametrize(
    ("arch", "kind"),
    each_once(MODELS, ["Q4_0", "Q8_0", "F16"]),
)
def test_logits_are_those_of_the_numbers_in_the_file(tmp_path, arch, kind):
    config, dense, experts = write(tmp_path / "m.gguf", arch, kind)
    weights = open_gguf(tmp_path / "m.gguf")
    have_dense, have_experts = read(weights)
    for key, triple in experts.items():
        for have, want in zip(have_experts[key], triple, strict=True):
            np.testing.assert_array_equal(have, want)
    for name, want in dense.items():
        np.testing.assert_array_equal(have_dense[name], want, err_msg=name)
    np.testing.assert_array_equal(logits(weights.config, have_dense, have_experts), logits(config, dense, experts))
    format = quantised_format(weights)
    assert str(format) == {"Q4_0": "int4-g32", "Q8_0": "int8-g32", "F16": "None"}[kind]
    if format is not None:
        last = weights.shards[-1]
        for matrix, want in zip(packed_expert(last.experts, format, 3).matrices, experts[last.layer, 3], strict=True):
            np.testing.assert_array_equal(dequantise(matrix), want)


def test_quantised_dense_tensors_are_read_too(tmp_path):
    _, dense, _ = write(tmp_path / "m.gguf", "qwen2moe", "F32", dense_kind="Q4_1")
    have, _ = read(open_gguf(tmp_path / "m.gguf"))
    for name, want in dense.items():
        np.testing.assert_array_equal(have[name], want, err_msg=name)


def test_split_keys_and_values_are_joined(tmp_path):
    def tamper(writer):
        writer.add_key_length_mla(24)
        writer.add_value_length_mla(24)

    _, dense, _ = write(
        tmp_path / "m.gguf", "deepseek2", "Q8_0", split_kv=lambda keys, values: (keys, values), tamper=tamper
    )
    have, _ = read(open_gguf(tmp_path / "m.gguf"))
    for name, want in dense.items():
        np.testing.assert_array_equal(have[name], want, err_msg=name)
        part = have[name][1:2]
        assert part.shape[0] == min(1, max(0, len(want) - 1))


def test_the_command_packs_experts_without_rounding(tmp_path, capsys):
    from hybrimoe_jax.checkpoint.reader import open_checkpoint

    _, _, experts = write(tmp_path / "m.gguf", "qwen2moe", "Q4_0")
    assert command.main([str(tmp_path / "m.gguf"), str(tmp_path / "out")]) == 0
    assert "vocabulary is not read" in capsys.readouterr().err
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.format == "int4-g32" and checkpoint.config == parse_config(
        {**COMMON, **MODELS["qwen2moe"], "head_dim": None, "mlp_only_layers": []}
    )
    stored = checkpoint.experts().get(1, 2)
    for matrix, want in zip(stored.matrices, experts[1, 2], strict=True):
        np.testing.assert_array_equal(dequantise(matrix), want)
    assert command.main([str(tmp_path / "m.gguf"), str(tmp_path / "f32"), "--format", "f32"]) == 0
    with pytest.raises(UserError, match="rounding them again to int4-g64"):
        command.main([str(tmp_path / "m.gguf"), str(tmp_path / "no"), "--format", "int4-g64"])


@pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.scale_linear"])
def test_a_rope_factor_without_a_type_is_linear(tmp_path, key):
    for name, factor in (("scaled", 4.0), ("plain", 1.0), ("zero", 0.0)):
        write(
            tmp_path / name,
            "qwen3moe",
            "Q8_0",
            tamper=lambda writer, f=factor: writer.add_float32(f"qwen3moe.{key}", f),
        )
    want = parse_config({**COMMON, **MODELS["qwen3moe"], "rope_scaling": {"type": "linear", "factor": 4.0}})
    assert open_gguf(tmp_path / "scaled").config.rope == want.rope
    assert open_gguf(tmp_path / "plain").config.rope_scaling is open_gguf(tmp_path / "zero").config.rope_scaling is None
