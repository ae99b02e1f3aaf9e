"""The model that ships: small enough, better than counting bytes, its experts in use, and the same model to transformers."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrimoe_jax.checkpoint.reader import open_checkpoint
from hybrimoe_jax.convert import export_hf
from hybrimoe_jax.engine.load import bundled_model
from hybrimoe_jax.train import evaluation, export, loop
from hybrimoe_jax.train.corpus import HELD_OUT, Text

EXCERPT = Path(__file__).parent / "data" / "macbeth-excerpt.txt"
# Nats per byte on the excerpt of the byte trigram model fitted on all training works: `evaluation.trigram_loss`.
TRIGRAM_ON_EXCERPT = 2.1089


@pytest.fixture(scope="module")
def model():
    return export.read_model(bundled_model())


@pytest.fixture(scope="module")
def measured(model):
    config, params, tokenizer = model
    work = Text("macbeth", "modern", EXCERPT.read_text(encoding="utf-8"))
    return evaluation.evaluate(config, params, tokenizer, [work], context=256, rows=8)


def test_it_is_what_the_readme_says_and_small(model):
    config, params, _ = model
    assert config.model_type == "qwen2_moe" and len(config.moe_layers) >= 6
    assert config.num_experts == 32 and config.num_experts_per_tok == 4 and config.shared_expert_intermediate_size > 0
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) <= 12e6
    assert sum(p.stat().st_size for p in bundled_model().rglob("*") if p.is_file()) <= 25e6


def test_loss_on_unseen_text_is_well_below_a_byte_trigram(measured):
    assert measured.bytes == len(EXCERPT.read_bytes()) > 20000
    assert measured.loss < TRIGRAM_ON_EXCERPT - evaluation.MARGIN


def test_router_is_neither_collapsed_nor_random(measured):
    assert min(measured.least_share) >= evaluation.LEAST_SHARE
    ratios = np.asarray(measured.overlap) / np.asarray(measured.chance)
    assert ratios.min() > 1.0 and ratios.mean() >= evaluation.LEAST_OVERLAP


def test_record_of_its_training_meets_every_bar():
    record = json.loads((bundled_model().parent / "bundled-training.json").read_text(encoding="utf-8"))
    assert record["held_out"] == sorted(HELD_OUT) and not set(HELD_OUT) & set(record["works"])
    for values in record["evaluations"]:
        assert all(values["bars"].values())
        assert values["loss_nats_per_byte"] <= values["trigram_nats_per_byte"] - evaluation.MARGIN


def test_it_ships_expert_frequencies_for_static_placements(model):
    config, _, _ = model
    counts = np.asarray(open_checkpoint(bundled_model()).frequencies())
    assert counts.shape == (6, config.num_experts) and (counts.sum(1) == counts.sum(1)[0]).all() and counts.sum() > 1e5


def test_transformers_gives_the_same_greedy_tokens(model, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config, params, tokenizer = model
    folder = export_hf(bundled_model(), tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    prompt = tokenizer.encode("HAMLET.\nTo be, or not to be").ids
    with torch.no_grad():
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=32, do_sample=False, pad_token_id=0)[
            0
        ].tolist()
    forward = jax.jit(loop.make_forward(config))
    ids, length = list(prompt), 64
    while len(ids) < len(expected):
        padded = jnp.asarray([ids + [0] * (length - len(ids))], jnp.int32)
        logits, _ = forward(params, padded, jnp.arange(length)[None])
        ids.append(int(logits[0, len(ids) - 1].argmax()))
    assert ids == expected
    assert len(expected) == len(prompt) + 32 and len(set(expected[len(prompt) :])) > 8
