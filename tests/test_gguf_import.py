"""GGUF files written here with PyPI's `gguf` from tiny random models, as llama.cpp's converter lays them out, and
read back."""

import builtins

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import each_once

from hybrimoe_jax import convert as command
from hybrimoe_jax.checkpoint.gguf.file import open_gguf
from hybrimoe_jax.checkpoint.quantised.experts import packed_expert, quantised_format
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.packing import Format, dequantise
from hybrimoe_jax.models.moe import DenseExperts
from hybrimoe_jax.models.parameters import merge, split
from hybrimoe_jax.models.registry import build_model, parse_config

gguf = pytest.importorskip("gguf")

COMMON = dict(
    vocab_size=48,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts_per_tok=2,
    max_position_embeddings=128,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    eos_token_id=7,
    bos_token_id=None,
)
MODELS = {
    "qwen2moe": dict(
        model_type="qwen2_moe",
        num_experts=4,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=96,
        intermediate_size=64,
    ),
    "qwen3moe": dict(
        model_type="qwen3_moe",
        num_experts=4,
        moe_intermediate_size=32,
        intermediate_size=64,
        head_dim=32,
        norm_topk_prob=True,
    ),
    "olmoe": dict(model_type="olmoe", num_experts=4, intermediate_size=32, clip_qkv=3.0),
    "llama": dict(model_type="mixtral", num_local_experts=4, intermediate_size=32, rope_theta=1e6),
    "deepseek2": dict(
        model_type="deepseek_v2",
        num_key_value_heads=4,
        n_routed_experts=4,
        n_shared_experts=2,
        moe_intermediate_size=32,
        intermediate_size=96,
        first_k_dense_replace=1,
        kv_lora_rank=32,
        q_lora_rank=None,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=24,
        rope_scaling=dict(
            type="yarn", factor=4.0, original_max_position_embeddings=32, mscale=0.707, mscale_all_dim=0.707
        ),
    ),
}


def model(arch: str, seed: int = 0):
    """-> config, dense tensors by name, {(layer, expert): (gate, up, down)}."""
    config = parse_config({**COMMON, **MODELS[arch]})
    rng = np.random.default_rng(seed)
    dense = {}
    for name, leaf in split(build_model(config))[1].items():
        drawn = rng.standard_normal(leaf.shape).astype(np.float32)
        dense[name] = 1 + 0.1 * drawn if "norm" in name else drawn * leaf.shape[-1] ** -0.5
    width, hidden = config.hidden_size, config.moe_width
    shapes = ((hidden, width), (hidden, width), (width, hidden))
    experts = {
        (layer, e): [rng.standard_normal(s).astype(np.float32) * s[1] ** -0.5 for s in shapes]
        for layer in config.moe_layers
        for e in range(config.num_experts)
    }
    return config, dense, experts


NAMES = [
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("self_attn.kv_a_proj_with_mqa", "attn_kv_a_mqa"),
    ("self_attn.kv_a_layernorm", "attn_kv_a_norm"),
    ("self_attn.kv_b_proj", "attn_kv_b"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("shared_expert_gate", "ffn_gate_inp_shexp"),
    ("shared_expert.gate_proj", "ffn_gate_shexp"),
    ("shared_expert.up_proj", "ffn_up_shexp"),
    ("shared_expert.down_proj", "ffn_down_shexp"),
    ("shared_experts.gate_proj", "ffn_gate_shexp"),
    ("shared_experts.up_proj", "ffn_up_shexp"),
    ("shared_experts.down_proj", "ffn_down_shexp"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("mlp.gate", "ffn_gate_inp"),
    ("block_sparse_moe.gate", "ffn_gate_inp"),
]


def gguf_name(name: str) -> str:
    outer = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if not name.startswith("model.layers."):
        return outer.get(name, "output.weight")
    _, _, layer, rest = name.split(".", 3)
    stem, part = rest.rsplit(".", 1)
    return next(f"blk.{layer}.{theirs}.{part}" for ours, theirs in NAMES if stem.endswith(ours))


def metadata(writer, arch: str, config) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_eos_token_id(7)
    if arch in ("qwen2moe", "qwen3moe", "deepseek2"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if arch == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if arch == "qwen3moe":
        writer.add_key_length(config.head_dim)
    if arch == "olmoe":
        writer.add_clamp_kqv(config.clip_qkv)
    if arch == "llama":
        writer.add_rope_dimension_count(config.head_width)
    if arch == "deepseek2":
        writer.add_rope_dimension_count(config.qk_rope_head_dim)
        writer.add_leading_dense_block_count(config.first_k_dense_replace)
        writer.add_kv_lora_rank(config.kv_lora_rank)
        writer.add_key_length(config.qk_nope_head_dim + config.qk_rope_head_dim)
        writer.add_value_length(config.v_head_dim)
        writer.add_expert_shared_count(config.n_shared_experts)
        writer.add_expert_weights_scale(1.0)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(32)
        writer.add_rope_scaling_yarn_log_mul(0.0707)


def pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of q and k of llama models."""
    half = weight.shape[0] // heads // 2
    out = np.empty_like(weight)
    for h in range(heads):
        for i in range(half):
            for j in range(2):
                out[h * 2 * half + 2 * i + j] = weight[h * 2 * half + j * half + i]
    return out


def write(path, arch: str, kind: str, *, dense_kind: str = "F32", split_kv: bool = False, tamper=lambda writer: None):
    """Writes the file; returns config, dense tensors and experts as the file's numbers stand for them."""
    config, dense, experts = model(arch)
    writer = gguf.GGUFWriter(path, arch)
    metadata(writer, arch, config)
    tamper(writer)

    def add(name, array, kind) -> np.ndarray:
        type = gguf.GGMLQuantizationType[kind]
        if kind in ("F32", "F16"):
            writer.add_tensor(name, array.astype(np.float32 if kind == "F32" else np.float16))
            return array.astype(np.float32 if kind == "F32" else np.float16).astype(np.float32)
        data = gguf.quants.quantize(array, type)
        writer.add_tensor(name, data, raw_dtype=type)
        return gguf.quants.dequantize(data, type)

    for name, array in list(dense.items()):
        matrix = array.ndim == 2 and ".gate.weight" not in name and "shared_expert_gate" not in name
        stored = array
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            stored = pairs(array, config.num_attention_heads if "q_proj" in name else config.kv_heads)
        if split_kv and "kv_b_proj" in name:
            layer, heads = name.split(".")[2], config.num_attention_heads
            both = array.reshape(heads, config.qk_nope_head_dim + config.v_head_dim, config.kv_lora_rank)
            writer.add_tensor(f"blk.{layer}.attn_k_b.weight", np.ascontiguousarray(both[:, :16].transpose(0, 2, 1)))
            writer.add_tensor(f"blk.{layer}.attn_v_b.weight", np.ascontiguousarray(both[:, 16:]))
            continue
        back = add(gguf_name(name), stored.squeeze(), dense_kind if matrix else "F32").reshape(stored.shape)
        if dense_kind != "F32" and stored is array:
            dense[name] = back
    for layer in config.moe_layers:
        for part, name in enumerate(("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")):
            stack = np.stack([experts[layer, e][part] for e in range(config.num_experts)])
            back = add(f"blk.{layer}.{name}.weight", stack, kind)
            for e in range(config.num_experts):
                experts[layer, e][part] = back[e]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return config, dense, experts


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

    _, dense, _ = write(tmp_path / "m.gguf", "deepseek2", "Q8_0", split_kv=True, tamper=tamper)
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
    "unknown tensors": (
        dict(tamper=lambda w: w.add_tensor("blk.0.mystery.weight", np.ones(8, np.float32))),
        "blk.0.mystery",
    ),
}


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
