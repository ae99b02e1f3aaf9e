"""Configurations: every real one parses or is refused by name; nothing that changes the answer is ignored."""

import json
import os
from pathlib import Path

import pytest
from test_models_moe import COMMON, TINY, tiny

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.models.registry import FAMILIES, family_of, parse_config

DATA = Path(os.environ.get("HYBRIMOE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
FILES = sorted((DATA / "hf-configs").glob("*.json"))
PUBLISHED = {
    # file -> (MoE layers, experts, top-k, expert width, head width)
    "mistralai--Mixtral-8x7B-v0.1": (32, 8, 2, 14336, 128),
    "mistralai--Mixtral-8x22B-v0.1": (56, 8, 2, 16384, 128),
    "Qwen--Qwen1.5-MoE-A2.7B": (24, 60, 4, 1408, 128),
    "Qwen--Qwen2-57B-A14B": (28, 64, 8, 2560, 128),
    "Qwen--Qwen3-30B-A3B": (48, 128, 8, 768, 128),
    "allenai--OLMoE-1B-7B-0125": (16, 64, 8, 1024, 128),
    "deepseek-ai--DeepSeek-V2-Lite": (26, 64, 6, 1408, 128),
}


def raw(family, **more):
    return dict(model_type=family) | COMMON | TINY[family] | more


@pytest.mark.skipif(not FILES, reason=f"no configuration files under {DATA / 'hf-configs'} (set HYBRIMOE_DATA)")
def test_every_published_configuration_parses_or_is_refused_by_name():
    parsed = set()
    for path in FILES:
        published = json.loads(path.read_text())
        if published["model_type"] not in FAMILIES:
            with pytest.raises(UserError, match=f"model_type '{published['model_type']}' is not supported"):
                parse_config(published)
            continue
        config = parse_config(published)
        assert config.passed_over(published) == []
        shape = (
            len(config.moe_layers),
            config.num_experts,
            config.num_experts_per_tok,
            config.moe_width,
            config.head_width,
        )
        assert shape == PUBLISHED[path.stem]
        assert all(config.window(layer) is None for layer in range(config.num_hidden_layers))
        parsed.add(path.stem)
    assert parsed == set(PUBLISHED)


REFUSED = [
    ("mixtral", dict(hidden_act="gelu"), "hidden_act 'gelu'"),
    ("mixtral", dict(attention_bias=True), "attention_bias True"),
    ("mixtral", dict(partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
    ("mixtral", dict(rope_parameters=dict(rope_theta=1e4, partial_rotary_factor=0.5)), "partial_rotary_factor 0.5"),
    ("mixtral", dict(norm_topk_prob=False), r"norm_topk_prob False .*\(true or null is\)"),
    ("mixtral", dict(is_causal=False), "is_causal False"),
    ("qwen3_moe", dict(is_causal=None), "is_causal None"),
    ("qwen2_moe", dict(per_layer_config={"0": dict(num_experts_per_tok=1)}), "per_layer_config"),
    ("olmoe", dict(transformers_weights="other.safetensors"), "transformers_weights 'other.safetensors'"),
    ("olmoe", dict(text_config=dict(num_experts=2)), "text_config"),
    ("olmoe", dict(attention_chunk_size=8), "attention_chunk_size 8"),
    ("mixtral", dict(sliding_window=0), "sliding_window must be null or at least 1"),
    ("mixtral", dict(num_experts=5), "num_local_experts 4 and num_experts 5 are one number and differ"),
    ("qwen3_moe", dict(head_dim=0), "head_dim must be at least 1"),
    ("deepseek_v2", dict(routed_scaling_factor=1e300), "routed_scaling_factor must be a number that float32 holds"),
    ("deepseek_v2", dict(rope_interleave=False), "rope_interleave False"),
    ("mixtral", dict(rope_interleave=True), "rope_interleave True"),
    ("mixtral", dict(rope_scaling=dict(type="linear", factor=2.0, apply_scaling=False)), "'apply_scaling'"),
    (
        "deepseek_v2",
        dict(rope_scaling=dict(type="yarn", factor=4.0, mscale_all_dim=float("nan"))),
        "mscale_all_dim must be a number of at least 0",
    ),
    *(
        (
            "mixtral",
            dict(rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=low, high_freq_factor=high)),
            f"high_freq_factor {high:g} must be above low_freq_factor {low:g}",
        )
        for low, high in ((4.0, 1.0), (2.0, 2.0))
    ),
    ("mixtral", dict(quantization_config=dict(quant_method="awq")), "quantization_config .awq."),
    ("mixtral", dict(rope_scaling=dict(rope_type="dynamic", factor=2.0)), "'dynamic'"),
    ("mixtral", dict(rope_parameters=dict(full_attention=dict(rope_type="default"))), "full_attention"),
    ("mixtral", dict(layer_types=["chunked_attention"] * 3), "'chunked_attention'"),
    ("mixtral", dict(layer_types=["sliding_attention"] * 3), "window is none"),
    ("mixtral", dict(layer_types=["full_attention"] * 3, sliding_window=4), "window is 4"),
    *(
        ("mixtral", dict(eos_token_id=wrong), "eos_token_id must be")
        for wrong in (["</s>"], "2", True, 2.0, [[2]], {}, -1, [2, -1])
    ),
    ("mixtral", dict(max_position_embeddings=0), "max_position_embeddings"),
    ("mixtral", dict(num_key_value_heads=3), "num_key_value_heads 3"),
    ("mixtral", dict(num_experts_per_tok=5), "num_experts_per_tok 5"),
    ("mixtral", dict(final_logit_softcapping=30.0), "final_logit_softcapping"),
    ("qwen2_moe", dict(use_sliding_window=True, sliding_window=None), "sliding_window"),
    ("qwen2_moe", dict(layer_types=["full_attention"]), "layer_types"),
    ("qwen2_moe", dict(decoder_sparse_step=0), "decoder_sparse_step"),
    ("qwen2_moe", dict(mlp_only_layers=[0, 1, 2]), "no layer has routed experts"),
    ("qwen2_moe", dict(hidden_size="16"), "hidden_size must be of type int"),
    ("qwen2_moe", dict(norm_topk_prob=1), "norm_topk_prob must be of type bool"),
    ("qwen3_moe", dict(use_sliding_window=True, layer_types=["full_attention"] * 3), "window is 4096"),
    ("qwen3_moe", dict(n_shared_experts=1), "n_shared_experts 1"),
    ("olmoe", dict(sliding_window=128), "sliding_window 128"),
    ("olmoe", dict(head_dim=8), "head_dim 8"),
    ("olmoe", dict(scoring_func="sigmoid"), "scoring_func 'sigmoid'"),
    ("deepseek_v2", dict(sliding_window=128), "sliding_window 128"),
    ("mixtral", dict(rope_theta=0.0), "rope_theta must be a number above 0, not 0.0"),
    ("mixtral", dict(rope_theta=-1.0), "rope_theta must be a number above 0"),
    ("mixtral", dict(rope_theta=float("nan")), "rope_theta must be a number that float32 holds"),
    ("mixtral", dict(rope_theta=10**400), "rope_theta must be a number that float32 holds"),
    ("mixtral", dict(rope_scaling=dict(type="linear", factor=0.0)), "factor must be a number above 0, not 0.0"),
    ("mixtral", dict(rope_scaling=dict(type="linear", factor=-4.0)), "factor must be a number above 0"),
    ("mixtral", dict(rope_scaling=dict(type="linear", factor="x")), "factor must be a number above 0, not 'x'"),
    (
        "deepseek_v2",
        dict(rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=0)),
        "original_max_position_embeddings must be a number above 0",
    ),
    ("mixtral", dict(rms_norm_eps=-1.0), "rms_norm_eps must be at least 0"),
    ("mixtral", dict(num_hidden_layers=10**9), "num_hidden_layers is 1000000000; no model has more than 4,096"),
    ("mixtral", dict(hidden_size=2**40), "hidden_size is 1099511627776; no model has more than"),
    ("qwen3_moe", dict(moe_intermediate_size=8, head_dim=-4), "head_dim"),
    ("olmoe", dict(clip_qkv=0.0), "clip_qkv must be above 0"),
    ("mixtral", dict(model_type=["a"]), "model_type must be a text"),
    ("mixtral", dict(rope_scaling="x"), "rope_scaling must be an object, not 'x'"),
    ("mixtral", dict(rope_scaling=dict(rope_type=["x"])), "rope_scaling type"),
    ("mixtral", dict(layer_types=1.5), "layer_types must be a list, not 1.5"),
    ("mixtral", dict(quantization_config="x"), "quantization_config .x."),
    ("qwen3_moe", dict(mlp_only_layers=-1), "mlp_only_layers must be a list"),
    ("qwen3_moe", dict(mlp_only_layers=["x"]), "mlp_only_layers must be a list"),
    (
        "deepseek_v2",
        dict(rope_scaling=dict(type="yarn", factor=None, mscale_all_dim="x")),
        "mscale_all_dim must be a number",
    ),
]


@pytest.mark.parametrize("family, change, message", REFUSED, ids=lambda value: str(value)[:40])
def test_what_would_change_the_answer_is_refused_by_name(family, change, message):
    parse_config(raw(family))  # the same without the change is fine
    with pytest.raises(UserError, match=message):
        parse_config(raw(family, **change))


def test_keys_that_nobody_knows_are_passed_over_and_told():
    odd = raw("mixtral", my_note=1, rope_theta=1e4)
    assert parse_config(odd).passed_over(odd) == ["my_note"]


def test_missing_keys_are_named_together():
    partial = raw("mixtral")
    del partial["hidden_size"], partial["num_local_experts"]
    with pytest.raises(UserError, match="lacks hidden_size, num_local_experts"):
        parse_config(partial)
    with pytest.raises(UserError, match="no model_type"):
        parse_config({})


def test_both_spellings_of_rope():
    old = parse_config(raw("qwen3_moe", rope_theta=5e5, rope_scaling=dict(type="linear", factor=2.0)))
    new = parse_config(raw("qwen3_moe", rope_parameters=dict(rope_theta=5e5, rope_type="linear", factor=2.0)))
    assert old.rope == new.rope and old.rope != tiny("qwen3_moe").rope
    plain = parse_config(raw("qwen3_moe", rope_parameters=dict(rope_theta=10000.0, rope_type="default")))
    assert plain.rope == tiny("qwen3_moe").rope and plain.rope_scaling is None


def test_both_spellings_of_the_number_of_experts():
    for family, name, other in [
        ("mixtral", "num_local_experts", "num_experts"),
        ("qwen3_moe", "num_experts", "num_local_experts"),
        ("deepseek_v2", "n_routed_experts", "num_experts"),
    ]:
        keys = raw(family)
        keys[other] = keys.pop(name)
        assert parse_config(keys) == tiny(family)


def test_null_is_false_or_none_where_it_says_something_and_refused_elsewhere():
    assert parse_config(raw("qwen2_moe", norm_topk_prob=None)).norm_topk_prob is False
    assert parse_config(raw("qwen2_moe", qkv_bias=None)).qkv_bias is False  # which is true where it is left out
    for name in ("rms_norm_eps", "rope_theta", "hidden_act", "hidden_size", "max_position_embeddings"):
        with pytest.raises(UserError, match=f"{name} must not be null"):  # transformers stops at it, too
            parse_config(raw("qwen2_moe", **{name: None}))
    heads = raw("mixtral", num_attention_heads=16, head_dim=4)
    assert parse_config(heads | dict(num_key_value_heads=None)).kv_heads == 16
    del heads["num_key_value_heads"]
    assert parse_config(heads).kv_heads == 8
    latent = raw("deepseek_v2")
    assert parse_config(latent).q_lora_rank is None
    del latent["q_lora_rank"]
    assert parse_config(latent).q_lora_rank == 1536


def test_sliding_windows():
    assert parse_config(raw("mixtral", sliding_window=5)).window(2) == 5
    on = dict(use_sliding_window=True, sliding_window=5)
    by_rule = parse_config(raw("qwen2_moe", **on, max_window_layers=2))
    assert [by_rule.window(i) for i in range(3)] == [5, None, None]
    types = ["full_attention", "sliding_attention", "sliding_attention"]
    assert [parse_config(raw("qwen2_moe", **on, layer_types=types)).window(i) for i in range(3)] == [None, 5, 5]
    assert [parse_config(raw("qwen3_moe", **on)).window(i) for i in range(3)] == [5, 5, 5]
    assert parse_config(raw("qwen3_moe", sliding_window=5, use_sliding_window=False)).window(0) is None


@pytest.mark.parametrize("below", [0, 2, 5, 28])
def test_the_rule_for_sliding_layers_is_that_of_transformers(below):
    """For files that carry no `layer_types`; those that transformers saves do."""
    transformers = pytest.importorskip("transformers")
    on = dict(use_sliding_window=True, sliding_window=5, max_window_layers=below, num_hidden_layers=6)
    theirs = transformers.Qwen2MoeConfig(**on).layer_types
    ours = parse_config(raw("qwen2_moe", **on))
    assert [ours.window(i) is not None for i in range(6)] == [kind == "sliding_attention" for kind in theirs]


def test_sparse_layers():
    assert parse_config(raw("qwen3_moe", decoder_sparse_step=2, mlp_only_layers=[])).moe_layers == (1,)
    assert parse_config(raw("qwen2_moe", mlp_only_layers=[1])).moe_layers == (0, 2)


def test_end_of_sequence_ids():
    assert parse_config(raw("mixtral", eos_token_id=[3, 4])).eos_ids == (3, 4)
    assert parse_config(raw("mixtral", eos_token_id=7)).eos_ids == (7,)
    assert parse_config(raw("mixtral", eos_token_id=None)).eos_ids == ()


def test_names_on_disk():
    mixtral = family_of("mixtral")
    spelt = "model.layers.2.block_sparse_moe.gate.weight"
    assert mixtral.canonical("model.layers.2.mlp.gate.weight") == mixtral.canonical(spelt) == spelt
    assert mixtral.expert_names(1, 5)[1] == "model.layers.1.block_sparse_moe.experts.5.w3.weight"
    qwen = family_of("qwen2_moe")
    assert qwen.canonical("model.layers.2.mlp.gate.weight") == "model.layers.2.mlp.gate.weight"
    assert qwen.fused_names(0) == ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj")
