"""GGUF files that are refused: other files, and all that would change the answer if it were dropped."""

import builtins
import re

import numpy as np
import pytest
from gguf_files import gguf, write

from hybrimoe_jax import convert as command
from hybrimoe_jax.checkpoint.gguf.file import open_gguf
from hybrimoe_jax.checkpoint.quantised.experts import packed_expert
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.packing import Format

REFUSED = {
    "experts in Q5_0": (dict(kind="Q5_0"), "ffn_gate_exps.weight is Q5_0; routed experts in Q4_0, Q8_0"),
    "sigmoid routing": (
        dict(arch="deepseek2", tamper=lambda w: w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)),
        "sigmoid",
    ),
    "rope scaling": (
        dict(tamper=lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)),
        "rope scaling 'longrope'",
    ),
    "a text for a number": (
        dict(tamper=lambda w: w.add_string("qwen2moe.rope.scaling.factor", "x")),
        r"m\.gguf: its metadata cannot be read: .*ValueError",
    ),
    "rope factors": (dict(tamper=lambda w: w.add_tensor("rope_freqs.weight", np.ones(8, np.float32))), "rope_freqs"),
    **{
        f"{name} beside {its}": (
            dict(tamper=lambda w, name=name, shape=shape: w.add_tensor(name, np.full(shape, 9, np.float32))),
            f"unexpected: {re.escape(name)}",
        )
        for name, its, shape in (
            ("blk.00.ffn_norm.weight", "blk.0", (64,)),
            ("blk.\u0660.ffn_norm.weight", "blk.0", (64,)),
            ("model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight", (64,)),
            ("model.norm.weight", "output_norm.weight", (64,)),
            ("lm_head.weight", "output.weight", (48, 64)),
            ("blk.0.ffn_gate_exps.bias", "its weight", (4, 32, 64)),
        )
    },
    **{
        f"{key} {value}": (
            dict(tamper=lambda w, key=key, value=value: put(w, f"tokenizer.ggml.{key}_token_id", value)),
            rf"tokenizer\.ggml\.{key}_token_id is .*, no token id",
        )
        for key, value in (("eos", [7, 9]), ("eos", "7"), ("eos", -1), ("eos", 2.0), ("bos", [1]), ("bos", True))
    },
    "several parts": (dict(tamper=lambda w: w.add_uint16("split.count", 2)), "one part of a split GGUF"),
    "parts that are a list": (dict(tamper=lambda w: w.add_array("split.count", [1])), "one part of a split GGUF"),
    **{
        f"attn_k_b and attn_v_b, {kind}": (
            dict(arch="deepseek2", split_kv=split),
            rf"m\.gguf: blk\.0\.attn_{part}_b\.weight is \[.*\], not \[4, ",
        )
        for kind, part, split in (
            ("keys of two axes", "k", lambda k, v: (k[0], v)),
            ("keys of four axes", "k", lambda k, v: (k[None], v)),
            ("values of one axis", "v", lambda k, v: (k, v[0, 0])),
            ("values of two heads", "v", lambda k, v: (k, v[:2])),
            ("values of another latent", "v", lambda k, v: (k, v[:, :, :16])),
            ("keys of another width", "k", lambda k, v: (k[:, :, :8], v)),
        )
    },
    "unknown tensors": (
        dict(tamper=lambda w: w.add_tensor("blk.0.mystery.weight", np.ones(8, np.float32))),
        "blk.0.mystery",
    ),
}


def put(writer, key, value):
    """In place of what the writer has at a key."""
    for data in writer.kv_data:
        data.pop(key, None)
    kind = {bool: "bool", int: "int32", float: "float32", str: "string", list: "array"}[type(value)]
    getattr(writer, f"add_{kind}")(key, value)


UNREAD = [
    ("rope.scaling.attn_factor", 0.5, 1.0),
    ("rope.scaling.yarn_attn_factor", 0.5, 1.0),
    ("rope.scaling.yarn_ext_factor", 1.0, -1.0),
    ("attention.sliding_window", 16, 0),
    ("attention.sliding_window", 127, 128),
    ("attention.scale", 0.5, 0.25),
    ("attention.clamp_kqv", 3.0, 0.0),
    ("rope.dimension_count", 8, 16),
    ("expert_weights_scale", 2.5, 1.0),
    ("expert_weights_norm", True, False),
    ("expert_gating_func", 2, 1),
    ("final_logit_softcapping", 30.0, 0.0),
    ("attention.causal", False, True),
    ("attention.value_length", 32, 16),
    ("nextn_predict_layers", 1, 0),
    ("a_new_rule", 2.0, 0.0),
]


@pytest.mark.parametrize("key, value, neutral", UNREAD, ids=lambda value: str(value))
def test_keys_that_would_change_the_answer_are_not_dropped(tmp_path, key, value, neutral):
    def tamper(number):
        kind = {bool: "bool", int: "uint32", float: "float32"}[type(number)]
        return lambda writer: getattr(writer, f"add_{kind}")(f"qwen2moe.{key}", number)

    for name, number in (("bad", value), ("good", neutral)):
        write(tmp_path / f"{name}.gguf", "qwen2moe", "Q8_0", tamper=tamper(number))
    assert open_gguf(tmp_path / "good.gguf").config.rope_scaling is None
    with pytest.raises(UserError, match=rf"qwen2moe\.{key} {value} is (not supported|a key that no rule here reads)"):
        open_gguf(tmp_path / "bad.gguf")


def test_a_deepseek_that_normalises_is_refused(tmp_path):
    """llama.cpp then normalises and scales; the published model's code does one of the two."""
    write(tmp_path / "m.gguf", "deepseek2", "Q8_0", tamper=lambda writer: writer.add_expert_weights_norm(True))
    with pytest.raises(UserError, match=r"deepseek2\.expert_weights_norm True is not supported"):
        open_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_refused_by_name(tmp_path, case):
    options, message = REFUSED[case]
    write(tmp_path / "m.gguf", **{"arch": "qwen2moe", "kind": "Q8_0", **options})
    with pytest.raises(UserError, match=message):
        open_gguf(tmp_path / "m.gguf")


def test_other_files_are_refused(tmp_path, monkeypatch):
    write(tmp_path / "m.gguf", "qwen2moe", "Q8_0")
    whole = (tmp_path / "m.gguf").read_bytes()
    for name, data in (("short", whole[: len(whole) // 2]), ("tiny", whole[:9]), ("other", b"not a gguf" * 99)):
        (tmp_path / f"{name}.gguf").write_bytes(data)
        with pytest.raises(UserError, match="not a whole GGUF file"):
            open_gguf(tmp_path / f"{name}.gguf")
    with pytest.raises(UserError, match="no such file"):
        command.main([str(tmp_path / "none.gguf"), str(tmp_path / "out")])
    writer = gguf.GGUFWriter(tmp_path / "bert.gguf", "bert")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="architecture 'bert' is not supported"):
        open_gguf(tmp_path / "bert.gguf")
    real = builtins.__import__

    def missing(name, *rest):
        if name == "gguf":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r"hybrimoe-jax\[gguf\]"):
        open_gguf(tmp_path / "m.gguf")


def test_codes_of_minus_128_are_refused(tmp_path):
    write(tmp_path / "m.gguf", "qwen2moe", "Q8_0")
    weights = open_gguf(tmp_path / "m.gguf")
    gate = weights.shards[1].experts.matrices[0][0]
    changed = np.array(gate.data)
    changed[0, 2] = 128
    experts = type(weights.shards[1].experts)(
        ((type(gate)(changed, gate.type, gate.where), *weights.shards[1].experts.matrices[0][1:]),)
    )
    with pytest.raises(UserError, match=r"ffn_gate_exps.weight \[0\]: it has codes of -128"):
        packed_expert(experts, Format.parse("int8-g32"), 0)
