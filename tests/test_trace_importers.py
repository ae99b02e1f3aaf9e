"""Public layouts become the traces that they are, by independent readings; damaged ones become one clear error."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import json

import numpy as np
import pytest
from public_traces import ESFT, GPT_OSS, esft_folder, fingerprint, fingerprint_json, route_csv, routing, shared

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.trace.facts import MODELS
from hybrimoe_jax.trace.file import save_trace
from hybrimoe_jax.trace.importers import join_traces, open_trace


def table(trace, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """ids and weights [tokens, layers, k] by (sequence, position), read row by row."""
    shape = (tokens, trace.facts.layers, trace.facts.top_k)
    ids, weights = np.full(shape, -1), np.full(shape, np.nan)
    order = sorted({(int(s), int(p)) for s, p in zip(trace.sequence, trace.position)})
    index = {token: i for i, token in enumerate(order)}
    for row in range(len(trace)):
        at = index[int(trace.sequence[row]), int(trace.position[row])]
        ids[at, trace.layer[row]] = trace.ids[row]
        weights[at, trace.layer[row]] = trace.weights[row]
    return ids, weights


def test_esft_text_and_arrays_are_one_prefill_a_prompt(tmp_path):
    ids, weights = routing(ESFT, 9)
    lengths = np.array([4, 2, 3])
    np.savez(
        tmp_path / "t.npz", expert_ids=ids.astype(np.uint8), weights_e4=weights.astype(np.uint16), seq_lens=lengths
    )
    from_arrays = open_trace(tmp_path / "t.npz")
    from_text = open_trace(esft_folder(tmp_path / "task", ids, weights, lengths))
    for trace in (from_arrays, from_text):
        got_ids, got_weights = table(trace, 9)
        assert np.array_equal(got_ids, ids)
        np.testing.assert_allclose(got_weights, weights / 1e4, rtol=1e-6)
        assert [(r.step, r.layer, r.phase, len(r.ids)) for r in trace.records()] == [
            (step, layer, "prefill", n) for step, n in enumerate(lengths) for layer in range(26)
        ]
        assert all(r.position.tolist() == list(range(len(r.ids))) for r in trace.records())
        assert trace.scores is None and trace.facts.expert_bytes["int4"] == 3 * 2048 * 1408 // 2
    assert np.array_equal(from_arrays.ids, from_text.ids)


def test_fingerprints_are_decode_steps_after_their_prompts(tmp_path):
    ids, weights = routing(GPT_OSS, 7)
    probs = (weights / 1e4).astype(np.float16)
    np.savez(tmp_path / "decode.npz", expert_ids=ids.astype(np.uint8), probs=probs, seq_lens=[4, 3])
    alone = open_trace(tmp_path / "decode.npz")
    assert "first decoded token" in alone.about["positions"] and alone.position[0] == 0
    meta = [{"n_prompt_tokens": 11, "n_decode_steps": 4}, {"n_prompt_tokens": 5, "n_decode_steps": 3}]
    (tmp_path / "meta.jsonl").write_text("".join(json.dumps(line) + "\n" for line in meta))
    trace = open_trace(tmp_path / "decode.npz")
    replies = [fingerprint(ids[:4], probs[:4], 11), fingerprint(ids[4:], probs[4:], 5)]
    (tmp_path / "both_examples.json").write_text(json.dumps(replies))
    for got in (trace, open_trace(tmp_path / "both_examples.json")):
        got_ids, got_probs = table(got, 7)
        assert np.array_equal(got_ids, ids) and np.array_equal(got_probs, probs)
        assert [r.position.tolist() for r in got.records()][::24] == [[11], [12], [13], [14], [5], [6], [7]]
        assert {r.phase for r in got.records()} == {"decode"} and "positions" not in got.about
    (tmp_path / "meta.jsonl").write_text(json.dumps(meta[0]) + "\n")
    with pytest.raises(UserError, match=r"meta.jsonl: its sequences are not those"):
        open_trace(tmp_path / "decode.npz")


@pytest.mark.parametrize("name", ["t.route.csv", "t.route.csv.gz"])
def test_a_route_trace_is_what_its_rows_say(tmp_path, name):
    path = route_csv(tmp_path / name)
    trace = open_trace(path)
    text = (gzip.decompress(path.read_bytes()) if name.endswith("gz") else path.read_bytes()).decode()
    rows = list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))
    want = {}
    for row in rows:
        key = (int(row["step"]), int(row["layer"]), ("prefill", "decode")[int(row["phase"])])
        want.setdefault(key, []).append((int(row["expert"]), float(np.float32(row["weight"]))))
    got = {(r.step, r.layer, r.phase): list(zip(r.ids[0].tolist(), r.weights[0].tolist())) for r in trace.records()}
    assert got == want and len(got) == 5 * 7 - 2
    assert trace.extra["residency"].tolist() == [[0, 1]] * 33
    assert trace.extra["layer_bytes"].tolist() == [1000, 1001, 1002, 1003, 1004]
    assert trace.facts.expert_bytes == {"as-stored": 1002} and trace.facts.model_type == "qwen3moe"


def test_the_shared_traces_read_as_their_readmes_say():
    law = open_trace(shared("trace-deepseek-v2-lite-esft/law.npz"))
    assert len(law) == 8327 * 26 and law.step.max() + 1 == 33
    oss = open_trace(shared("trace-gpt-oss-20b/decode.npz"))
    assert len(oss) == 25717 * 24 and oss.sequence.max() + 1 == 74 and oss.position[0] == 136
    np.testing.assert_allclose(oss.weights.sum(axis=1), 1, atol=0.02)
    edge = open_trace(shared("trace-edge-routes/qwen3-30b-a3b.route.csv.gz"))
    assert edge.ids.size == 44766 and edge.step.max() + 1 == 28 + 128 and edge.facts.top_k == 6
    assert edge.facts.expert_bytes["bf16"] == 3 * 2048 * 768 * 2


@pytest.mark.parametrize(
    ("model", "file"),
    [
        ("DeepSeek-V2-Lite", "deepseek-ai--DeepSeek-V2-Lite"),
        ("gpt-oss-20b", "openai--gpt-oss-20b"),
        ("gpt-oss-120b", "openai--gpt-oss-120b"),
        ("Qwen3-30B-A3B", "Qwen--Qwen3-30B-A3B"),
    ],
)
def test_model_facts_are_those_of_their_config_files(model, file):
    config, facts = json.loads(shared(f"hf-configs/{file}.json").read_text()), MODELS[model]
    experts = next(config[k] for k in ("n_routed_experts", "num_experts", "num_local_experts") if k in config)
    width = config.get("moe_intermediate_size", config["intermediate_size"])
    assert facts.layers == config["num_hidden_layers"] - config.get("first_k_dense_replace", 0)
    assert (facts.model_type, facts.experts, facts.top_k) == (
        config["model_type"],
        experts,
        config["num_experts_per_tok"],
    )
    assert facts.expert_bytes["bf16"] == 6 * config["hidden_size"] * width


@pytest.mark.parametrize("layers, top_k, weights", [(26, 6, "weights_e4"), (24, 4, "probs")])
@pytest.mark.parametrize("lengths", [[2**62] * 4 + [3], np.array([2**63] * 2 + [3], np.uint64), [4, -1], [[3]], [1.5]])
def test_lengths_that_do_not_fit_are_refused_before_they_are_summed(tmp_path, layers, top_k, weights, lengths):
    ids = np.tile(np.arange(top_k, dtype=np.uint8), (3, layers, 1))
    table = np.ones(ids.shape, int if weights == "weights_e4" else float)
    np.savez(tmp_path / "t.npz", expert_ids=ids, seq_lens=np.array(lengths), **{weights: table})
    with pytest.raises(UserError, match=r"t.npz: array seq_lens must hold positive integers that add up to 3 tokens"):
        open_trace(tmp_path / "t.npz")


@pytest.mark.parametrize("count", ["4", [4], 4.7, True, None])
def test_a_prompt_is_a_whole_number_of_tokens(tmp_path, count):
    ids, weights = routing(GPT_OSS, 2)
    np.savez(tmp_path / "t.npz", expert_ids=ids, probs=weights / 1e4, seq_lens=[2])
    (tmp_path / "meta.jsonl").write_text(json.dumps({"n_prompt_tokens": count, "n_decode_steps": 2}) + "\n")
    with pytest.raises(UserError, match=r"meta.jsonl: .*n_prompt_tokens is a whole number"):
        open_trace(tmp_path / "t.npz")


@pytest.mark.parametrize("column, what", [("step", "steps"), ("sequence", "sequences"), ("batch", "batches")])
def test_numbers_that_do_not_fit_when_joined_are_refused(tmp_path, column, what):
    ids, weights = routing(GPT_OSS, 1)
    one = open_trace(fingerprint_json(tmp_path / "a.json", ids, weights / 1e4))
    one = dataclasses.replace(one, batch=np.zeros(len(one), np.int32))
    last = dataclasses.replace(one, **{column: np.full(len(one), 2**31 - 1, np.int32)})
    assert getattr(join_traces([one, one]), column)[-1] == 1
    with pytest.raises(UserError, match=f"2147483649 {what} together; 2147483648 fit"):
        join_traces([last, one])


def test_joining_renumbers_steps_and_sequences(tmp_path):
    ids, weights = routing(GPT_OSS, 5)
    one = open_trace(fingerprint_json(tmp_path / "a.json", ids[:2], weights[:2] / 1e4))
    two = open_trace(fingerprint_json(tmp_path / "b.json", ids[2:], weights[2:] / 1e4, first=3))
    both = join_traces([one, two])
    save_trace(both, tmp_path / "both.npz")
    both = open_trace(tmp_path / "both.npz")
    got_ids, _ = table(both, 5)
    assert np.array_equal(got_ids, ids)
    assert np.unique(both.step).tolist() == [0, 1, 2, 3, 4] and sorted(set(both.sequence.tolist())) == [0, 1]
    other = open_trace(route_csv(tmp_path / "t.csv"))
    with pytest.raises(UserError, match="different models"):
        join_traces([one, other])
