"""`bench llamacpp`: the files it writes for llama.cpp hold the checkpoint's weights, and what it refuses.
llama.cpp itself is not needed."""

from __future__ import annotations

import numpy as np
import pytest

from hybrimoe_jax.bench import __main__ as bench
from hybrimoe_jax.bench import llamacpp
from hybrimoe_jax.bench.random_models import DEEPSEEK_V2_LITE, MID, write_random_hf
from hybrimoe_jax.checkpoint.gguf.file import open_gguf
from hybrimoe_jax.checkpoint.hugging_face import open_hf
from hybrimoe_jax.checkpoint.reader import open_checkpoint
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.models.registry import parse_config

gguf = pytest.importorskip("gguf")
QWEN = dict(MID, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=96)
QWEN |= dict(intermediate_size=64, moe_intermediate_size=32, shared_expert_intermediate_size=64, num_experts=4)
DEEPSEEK = dict(DEEPSEEK_V2_LITE, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=96)
DEEPSEEK |= dict(num_key_value_heads=2, intermediate_size=96, moe_intermediate_size=32, n_routed_experts=8)
DEEPSEEK |= dict(kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32)


def tensors(weights) -> dict[str, np.ndarray]:
    found = {name: np.asarray(t.read(), np.float32) for shard in weights.shards for name, t in shard.dense.items()}
    for shard in weights.shards:
        for expert in range(shard.experts.count if shard.experts else 0):
            for part, matrix in enumerate(shard.experts.read(expert)):
                found[f"{shard.layer} {expert} {part}"] = np.asarray(matrix, np.float32)
    return found


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0"])
def test_a_checkpoint_s_own_weights_are_written(kind, tmp_path):
    from safetensors import safe_open

    from hybrimoe_jax.bench.gguf_writer import write_gguf

    hf = write_random_hf(tmp_path / "hf", QWEN)
    with safe_open(hf / "model.safetensors", "np") as stored:
        file = write_gguf(tmp_path / "m.gguf", parse_config(QWEN), kind, stored.get_tensor)
    want, have = tensors(open_hf(hf)), tensors(open_gguf(file))
    assert want.keys() == have.keys()
    step = {"F32": 0, "Q8_0": 1 / 127, "Q4_0": 1 / 7}[kind]  # of what is greatest in a block
    for name, array in want.items():
        assert np.abs(array - have[name]).max() <= 1.01 * step * np.abs(array).max(), name
    assert [f.name for f in tmp_path.iterdir() if "part" in f.name] == []


@pytest.mark.parametrize("kind", ["F32", "Q4_0"])
def test_random_weights_of_deepseek_s_shapes_are_read_and_keep_unit_variance(kind, tmp_path):
    from hybrimoe_jax.bench.gguf_writer import write_gguf

    weights = open_gguf(write_gguf(tmp_path / "m.gguf", parse_config(DEEPSEEK), kind))
    for name, array in tensors(weights).items():
        assert np.isfinite(array).all(), name
        if name.endswith(("q_proj.weight", "o_proj.weight")):
            assert 0.8 < array.std() * array.shape[1] ** 0.5 < 1.25, name
    assert weights.config.num_experts == 8 and weights.config.kv_lora_rank == 32


def test_other_families_are_refused():
    from hybrimoe_jax.bench.gguf_writer import check_known

    with pytest.raises(UserError, match="no GGUF is written for mixtral"):
        check_known(parse_config(dict(model_type="mixtral", hidden_size=64, num_attention_heads=4, num_hidden_layers=1,
                                 num_key_value_heads=2, intermediate_size=32, vocab_size=64, num_local_experts=4,
                                 num_experts_per_tok=2)))  # fmt: skip


def test_both_sides_are_prepared_once_and_at_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(llamacpp, "MID", QWEN)
    monkeypatch.setattr(llamacpp, "write_random_hf", lambda folder: write_random_hf(folder, QWEN))
    for format, kind in llamacpp.TYPES.items():
        ours, theirs = llamacpp.prepare("mid", format, tmp_path)
        assert open_checkpoint(ours).format == format and theirs.name.endswith(f"{kind}.gguf")
        assert open_checkpoint(ours).dense_format == (None if format == "f32" else format)
        written = theirs.stat().st_mtime_ns
        assert llamacpp.prepare("mid", format, tmp_path) == (ours, theirs) and theirs.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--models", "gpt"], "--models 'gpt'"),
        (["--formats", "int3"], "--formats 'int3'"),
        (["--rounds", "0"], "--rounds"),
    ],
)
def test_bad_options_are_one_line(argv, said):
    with pytest.raises(UserError, match=said):
        bench.main(["llamacpp", *argv])


def test_without_llama_cpp_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(llamacpp, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install llama-cpp-python gguf"):
        llamacpp.require_peer()


def test_a_ratio_is_the_median_of_the_rounds_where_the_machine_drifts(monkeypatch):
    """Ours needs half of the time of llama.cpp in every round but one, in which something else had the machine;
    medians alone would say 1.33."""

    class Turns:
        def __init__(self, seconds):
            self.about = {"names": []}
            self.left = {what: iter([9.0, *seconds]) for what in ("prefill", "decode")}

        def ask(self, run, **asked):
            return {"seconds": next(self.left[run]), "token_ids": [1, 2]}

    monkeypatch.setattr(llamacpp, "SETTLE_S", 0)
    monkeypatch.setattr(llamacpp, "read_bandwidth", lambda seconds: 2e10)
    sides = {llamacpp.OURS: Turns([1.0, 3.0, 1.5, 4.0]), llamacpp.THEIRS: Turns([2.0, 3.0, 3.0, 8.0])}
    result = llamacpp.compared("mid", "f32", sides, llamacpp.Options(rounds=4), lambda text: None)
    assert result["ratios"] == {"prefill": 2.0, "decode": 2.0}
    assert result["ratios_of_medians"] == {"prefill": 3.0 / 2.25, "decode": 3.0 / 2.25}
    assert result["decode_tokens_s"] == {llamacpp.OURS: 1 / 2.25, llamacpp.THEIRS: 1 / 3.0}
    assert "2.00x" in llamacpp.table([result])
