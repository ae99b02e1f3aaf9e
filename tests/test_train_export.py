"""A trained model as a Hugging Face folder: transformers reads it and agrees; converting it changes nothing."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train_loop import VERSES

from hybrimoe_jax.checkpoint.convert import convert
from hybrimoe_jax.checkpoint.export import export_hf
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.models import parameters
from hybrimoe_jax.models.moe import DenseExperts
from hybrimoe_jax.models.registry import build_model, parse_config
from hybrimoe_jax.train import evaluation, export, loop, tokens
from hybrimoe_jax.train.corpus import Text


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(folder, config, bfloat16-rounded parameters, tokenizer) of an untrained model with spread routers."""
    folder = tmp_path_factory.mktemp("export") / "model"
    tokenizer = tokens.train_tokenizer([Text("sonnet", "modern", VERSES)], 300)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "max_position_embeddings": 64,
    }
    raw = export.raw_config(tokenizer, shape)
    config = parse_config(raw)
    params = loop.init_params(config, 2)
    params["dense"] = {k: v * (20.0 if k == "lm_head.weight" else 1.0) for k, v in params["dense"].items()}
    params = evaluation.round_bf16(params)
    export.write_hf(folder, raw, params, tokenizer)
    return folder, config, params, tokenizer


def dense_model(config, params):
    """-> f(ids [T]) -> logits [T, V] of the dense model; one compilation for every T below the padded length."""
    graphdef, _ = parameters.split(build_model(config))
    length = 32

    @jax.jit
    def forward(params, ids):
        decoder = parameters.merge(graphdef, params["dense"])
        experts = DenseExperts(loop.expert_weights(params))
        return decoder(ids[None], decoder.init_cache(1, length), jnp.arange(length)[None], experts)[0][0]

    def logits(ids):
        assert len(ids) <= length
        return np.array(forward(params, jnp.asarray(ids + [0] * (length - len(ids)), jnp.int32)))[: len(ids)]

    return logits


def assert_same_params(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_transformers_gives_the_same_logits_and_greedy_tokens(model):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder, config, params, tokenizer = model
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = tokenizer.encode("Shall I compare the buds").ids
    logits = dense_model(config, params)
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
        continued = theirs.generate(
            torch.tensor([ids]), max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0
        )
    np.testing.assert_allclose(logits(ids), expected, atol=2e-5 * np.abs(expected).max())
    for _ in range(8):
        ids.append(1 + int(logits(ids)[-1, 1:].argmax()))  # min_new_tokens forbids id 0, the end of text
    assert ids == continued[0].tolist()
    assert len(set(ids[-8:])) > 2, "a constant continuation would prove nothing"


def test_transformers_tokenizer_agrees(model):
    transformers = pytest.importorskip("transformers")
    folder, _, _, tokenizer = model
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in (VERSES, "caf\u00e9 \U0001f600 <|endoftext|>x", "  two  spaces\n\n"):
        assert theirs(text)["input_ids"] == tokenizer.encode(text).ids
        assert theirs.decode(theirs(text)["input_ids"]) == text
    assert theirs.eos_token == theirs.bos_token == tokens.END_OF_TEXT and theirs.eos_token_id == 0


def test_folder_reads_back_also_after_conversion(model, tmp_path):
    folder, config, params, tokenizer = model
    read_config, read, _ = export.read_model(folder)
    assert read_config == config
    assert_same_params(read, params)
    converted = convert(folder, tmp_path / "converted")
    read_config, read, read_tokenizer = export.read_model(converted)
    assert read_config == config
    assert_same_params(read, params)
    assert read_tokenizer.to_str() == tokenizer.to_str()


@pytest.mark.slow
def test_of_a_quantised_checkpoint_the_numbers_are_read_that_its_codes_stand_for(model, tmp_path):
    folder, config, params, _ = model
    quantised = convert(folder, tmp_path / "quantised", "int4-g32", dense_format="int8-g32")
    read_config, read, _ = export.read_model(quantised)
    assert read_config == config
    _, stands_for, _ = export.read_model(export_hf(quantised, tmp_path / "hf"))
    assert_same_params(read, stands_for)
    head, rounded = params["dense"]["lm_head.weight"], read["dense"]["lm_head.weight"]
    assert 0 < np.abs(head - rounded).max() < 0.02 * np.abs(head).max()


def test_rewriting_replaces_the_folder_whole(model, tmp_path):
    _, _, params, tokenizer = model
    folder = tmp_path / "model"
    raw = export.raw_config(tokenizer, {"max_position_embeddings": 64})
    for scale in (1.0, 2.0):
        export.write_hf(folder, raw, jax.tree.map(lambda leaf, s=scale: s * leaf, params), tokenizer)
    assert [p.name for p in tmp_path.iterdir()] == ["model"], "nothing is left beside it"
    (folder / "config.json").write_text(json.dumps({**raw, **json.loads((model[0] / "config.json").read_text())}))
    assert_same_params(export.read_model(folder)[1], jax.tree.map(lambda leaf: 2.0 * leaf, params))


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_incomplete_folder_is_named(model, tmp_path, missing):
    for path in model[0].iterdir():
        if path.name != missing:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=missing):
        export.read_model(tmp_path)


def test_absent_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        export.read_model(tmp_path / "nowhere")
