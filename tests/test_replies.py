"""What ends a reply and what is left out of `generation_config.json`, said before weights are read."""

from __future__ import annotations

import json
import os
import types
import warnings

import pytest

import hybrimoe_jax
from hybrimoe_jax.checkpoint.reader import Checkpoint
from hybrimoe_jax.engine.load import read_model
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.text.replies import eos_ids, warn_of_what_is_left_out

SILENT = types.SimpleNamespace(eos_token_id=None)


@pytest.mark.parametrize("given", ["</s>", ["2"], {"id": 2}, [[2]], [2, None], 2.0, True, -1, [True]])
def test_what_is_no_id_is_refused_by_name(given):
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id"):
        eos_ids({"eos_token_id": given}, None, SILENT)


def test_an_empty_list_says_nothing():
    assert eos_ids({"eos_token_id": []}, None, types.SimpleNamespace(eos_token_id=7)) == (7,)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"repetition_penalty": 1.05, "min_p": 0.1, "temperature": 0.7}, "repetition_penalty 1.05, min_p"),
        ({"suppress_tokens": [5], "begin_suppress_tokens": []}, r"suppress_tokens \[5\] not applied"),
        ({"repetition_penalty": True, "min_p": 0, "num_beams": 1}, "repetition_penalty True not applied"),
        ({"repetition_penalty": "1.2"}, "repetition_penalty '1.2'"),
        ({"stop_strings": ["###"]}, "stop_strings"),
        ({"forced_eos_token_id": 2}, "forced_eos_token_id"),
    ],
)
def test_a_setting_that_is_not_applied_is_named(settings, named):
    with pytest.warns(UserWarning, match=named):
        warn_of_what_is_left_out(settings, (), 10)


def test_settings_that_change_nothing_are_not_named():
    neutral = {"repetition_penalty": 1.0, "min_p": 0.0, "suppress_tokens": [], "num_beams": 1, "temperature": 0.6}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_what_is_left_out({**neutral, "typical_p": None}, (2,), 10)
    with pytest.warns(UserWarning, match="eos_token_id 99 is outside"):
        warn_of_what_is_left_out({}, (2, 99), 10)
    with pytest.warns(UserWarning, match="eos_token_id an integer of [0-9,]+ bits is outside"):
        warn_of_what_is_left_out({}, (2, 10**5000), 10)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("generation_config.json", json.dumps({"eos_token_id": "</s>"}), "eos_token_id"),
        ("tokenizer.json", "{}", "tokenizer"),
        ("expert_frequencies.json", "[", "expert_frequencies"),
    ],
)
def test_small_files_are_read_before_weights(file, content, said, tmp_path, monkeypatch):
    for path in hybrimoe_jax.bundled_model().iterdir():
        if path.name != file:
            os.symlink(path, tmp_path / path.name)
    (tmp_path / file).write_text(content)
    monkeypatch.delattr(Checkpoint, "experts")
    monkeypatch.delattr(Checkpoint, "dense")
    with pytest.raises(UserError, match=said):
        read_model(tmp_path)
