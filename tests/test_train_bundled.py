"""The model that ships: small enough, its loss below the recorded one, its experts in use, and the same model to
transformers."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrimoe_jax.checkpoint.export import export_hf
from hybrimoe_jax.checkpoint.reader import open_checkpoint
from hybrimoe_jax.engine.load import bundled_model
from hybrimoe_jax.train import evaluation, export, loop
from hybrimoe_jax.train.corpus import HELD_OUT, Text

EXCERPT = Path(__file__).parent / "data" / "macbeth-excerpt.txt"
# Nats per byte, 0.3 below what a byte trigram model of the training works gave on the excerpt and on all held-out
# works.
EXCERPT_LOSS, HELD_OUT_LOSS = 1.8089, 1.7716
LEAST_SHARE = 0.1  # of the uniform share, for every expert of every layer
LEAST_OVERLAP = 1.15  # times chance, on average over the layers; every layer above chance


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


@pytest.mark.slow
def test_loss_on_unseen_text_is_below_the_recorded_figure(measured):
    assert measured.bytes == len(EXCERPT.read_bytes()) > 20000
    assert measured.loss < EXCERPT_LOSS


@pytest.mark.slow
def test_router_is_neither_collapsed_nor_random(measured):
    assert min(measured.least_share) >= LEAST_SHARE
    ratios = np.asarray(measured.overlap) / np.asarray(measured.chance)
    assert ratios.min() > 1.0 and ratios.mean() >= LEAST_OVERLAP


def test_record_of_its_training_names_the_held_out_works_and_their_loss():
    record = json.loads((bundled_model().parent / "bundled-training.json").read_text(encoding="utf-8"))
    assert record["held_out"] == sorted(HELD_OUT) and not set(HELD_OUT) & set(record["works"])
    for values in record["evaluations"]:
        assert values["loss_nats_per_byte"] <= HELD_OUT_LOSS


def test_it_ships_expert_frequencies_for_static_placements(model):
    config, _, _ = model
    counts = np.asarray(open_checkpoint(bundled_model()).frequencies())
    assert counts.shape == (6, config.num_experts) and (counts.sum(1) == counts.sum(1)[0]).all() and counts.sum() > 1e5


@pytest.mark.slow
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
