"""Every key that transformers' configuration classes and code know is read, must be neutral, or is shown harmless."""

import dataclasses
import functools
import inspect
import json
import re
from pathlib import Path

import hf
import pytest
from grids import few

from hybrimoe_jax.models import rope
from hybrimoe_jax.models.config_keys import GENERATION, HARMLESS
from hybrimoe_jax.models.registry import FAMILIES

transformers = pytest.importorskip("transformers")
CASE = {
    "mixtral": "mixtral",
    "qwen2_moe": "qwen2",
    "qwen3_moe": "qwen3",
    "olmoe": "olmoe",
    "deepseek_v2": "deepseek-lite",
}
every_family = pytest.mark.parametrize("family", sorted(FAMILIES))
OF_THE_OBJECT = {
    "sub_configs",
    "default_theta",
    "rope_parameters",
    "get_text_config",
    "base_config_key",
    "extra_files",
    "hf_quantizer",
}
"""Attributes of a configuration in Python that no file has, or whose parts `unify_rope` reads."""
SHARED = ("masking_utils.py", "cache_utils.py", "modeling_rope_utils.py")
DERIVED = ("num_key_value_heads", "head_dim", "sliding_window", "layer_types", "mlp_only_layers")
"""Where nothing is given, transformers puts what other keys make of it."""


def config_class(family: str):
    return type(hf.hf_config(CASE[family]))


@functools.cache
def read_by_code(file: str) -> set[str]:
    """The attributes of a `config` that a file of transformers reads."""
    text = (Path(transformers.__file__).parent / file).read_text(encoding="utf-8")
    found = re.findall(r"\b(?:self\.|decoder_|text_)*config\.([a-z]\w*)", text)
    found += re.findall(r"getattr\(\s*(?:self\.|decoder_|text_)*config,\s*\"([a-z]\w*)\"", text)
    return {name for name in found if not hasattr(dict, name) and name != "json"}


@every_family
def test_every_key_of_transformers_is_read_or_refused_or_harmless(family):
    theirs, ours = config_class(family), FAMILIES[family].config
    base = transformers.configuration_utils.PreTrainedConfig
    popped = set(re.findall(r"kwargs\.(?:pop|get)\(\"(\w+)\"", inspect.getsource(base.__post_init__)))
    methods = {name for name in dir(theirs) if callable(getattr(theirs, name, None))}
    keys = {f.name for f in dataclasses.fields(theirs)} | set(theirs.attribute_map) | popped
    for file in (f"models/{family}/modeling_{family}.py", *SHARED):
        keys |= read_by_code(file)
    assert ours.passed_over(dict.fromkeys(sorted(keys - methods - OF_THE_OBJECT))) == []
    assert {"is_causal", "per_layer_config"} <= keys, "the walk does not see what it is for"


@every_family
def test_defaults_are_those_of_transformers(family):
    theirs, ours = config_class(family)(), FAMILIES[family].config
    for field in dataclasses.fields(ours):
        if field.default is not dataclasses.MISSING and field.name in {f.name for f in dataclasses.fields(theirs)}:
            if field.name not in DERIVED:
                assert field.default == getattr(theirs, field.name), field.name


def test_parts_of_rope_are_those_of_transformers():
    assert set(transformers.modeling_rope_utils.RopeParameters.__annotations__) <= rope.PARAMETERS


OTHER = {bool: lambda value: not value, int: lambda value: value + 1, float: lambda value: value + 0.5}
NOT_TRIED = ("transformers_version", "dtype", "return_dict", "head_dim", "max_window_layers", "use_sliding_window")
"""The last three are read by the families that have them; `return_dict` false is an error in transformers."""
VALUES = {"problem_type": "regression", "id2label": {"0": "a"}, "label2id": {"a": 0}, "architectures": ["Other"]}


@pytest.mark.parametrize("family", few(["mixtral"], dict.fromkeys(sorted(FAMILIES))))
def test_harmless_keys_change_no_logit(family):
    """Each of the class's fields that is listed as harmless gets another value: transformers computes the same."""
    torch = pytest.importorskip("torch")
    model = hf.hf_model(CASE[family])
    ids = torch.arange(24)[None] % 96
    fields = {f.name for f in dataclasses.fields(FAMILIES[family].config)}
    saved = json.loads(json.dumps(model.config.to_dict()))

    def logits(**more):
        raw = {k: v for k, v in saved.items() if k not in more} | more
        other = type(model)._from_config(type(model.config)(**raw), attn_implementation="eager").eval()
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            return other(ids, return_dict=True).logits

    want, tried = logits(), []
    for field in dataclasses.fields(type(model.config)):
        if field.name in fields or not any(field.name in keys for keys in HARMLESS.values()):
            continue
        if field.name in NOT_TRIED:
            continue
        value = getattr(model.config, field.name)
        changed = VALUES.get(field.name) or OTHER.get(type(value), lambda value: 3)(value)
        tried.append(field.name)
        assert torch.equal(logits(**{field.name: changed}), want), field.name
    assert len(tried) >= 8
    assert not torch.equal(logits(is_causal=False), want), "a changed key cannot be seen here"


def test_generation_settings_in_a_configuration_are_dropped_by_transformers_too():
    dropped = set(transformers.GenerationConfig._get_default_generation_params())
    assert dropped - {"use_cache"} <= set(GENERATION)
