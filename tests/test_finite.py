"""Numbers that are none, on their way into a checkpoint, and in what a model answers."""

import dataclasses

import checkpoint_folders as folders
import numpy as np
import pytest
import tiny

from hybrimoe_jax.checkpoint import shards
from hybrimoe_jax.checkpoint.convert import convert
from hybrimoe_jax.engine.fused import select
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.host_kernels.native import ffi

NORM, QUERY = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"
UP, DOWN = folders.expert(1, 2, "up"), folders.expert(0, 3, "down")
HUGE, LARGEST = 1e6, np.finfo(np.float32).max

BAD = [
    (NORM, np.nan, {}, r"holds nan at \[3\], which is no finite number; download"),
    (NORM, np.inf, {"fmt": "int4-g32"}, r"holds inf at \[3\]"),
    (QUERY, -np.inf, {"fmt": "bf16"}, r"holds -inf at \[0, 3\]"),
    (QUERY, LARGEST, {"fmt": "bf16"}, r"has numbers up to 3\.4e\+38, which overflow in bfloat16; give --format f32"),
    (QUERY, np.nan, {"dense_format": "int8-g32"}, r"holds nan at \[0, 3\]"),
    (QUERY, 127 * HUGE, {"dense_format": "int8-g32"}, r"has numbers up to 1\.27e\+08, which overflow in int8-g32"),
    (UP, np.nan, {}, r"holds nan at \[0, 3\]"),
    (UP, np.nan, {"fmt": "int4-g32"}, r"holds nan at \[0, 3\]"),
    (UP, np.inf, {"fmt": "int4z-g32"}, r"holds inf at \[0, 3\]"),
    (UP, LARGEST, {"fmt": "bf16"}, "has numbers up to .* overflow in bfloat16"),
    (DOWN, 8 * HUGE, {"fmt": "int4-g32"}, "has numbers up to .* overflow in int4-g32"),
    (DOWN, 15 * HUGE, {"fmt": "int4z-g32"}, "has numbers up to .* overflow in int4z-g32"),
    (DOWN, 15 * HUGE, {"fmt": "int4z-g32-s32"}, None),
    (DOWN, 8 * HUGE, {"fmt": "int4-g32-s32"}, None),
    (QUERY, LARGEST, {}, None),
]


def read_all(folder, leaves) -> None:
    """In place of Orbax, which takes most of a conversion's time."""
    for leaf in leaves.values():
        for start in range(0, leaf.shape[0], leaf.rows):
            leaf.read(start, min(start + leaf.rows, leaf.shape[0]))


@pytest.mark.parametrize(("name", "value", "options", "why"), BAD)
def test_what_is_no_finite_number_is_refused_by_tensor_name(tmp_path, monkeypatch, name, value, options, why):
    monkeypatch.setattr(shards, "save_item", read_all)
    weights = folders.tensors()
    weights[name].reshape(-1)[3] = value
    src = folders.write_hf(tmp_path / "hf", weights)
    if why is None:
        convert(src, tmp_path / "out", **options)
        return
    with pytest.raises(UserError, match=rf"model\.safetensors: {name} {why}"):
        convert(src, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WAYS = {
    "dense": {"executor": "dense"},
    "callback": {"executor": "callback"},
    "overlapped": {"executor": "overlapped"},
    "fused": {"host_kernel": "native", "slots": "separate"},
}


def damage(monkeypatch, tensor: str | tuple[int, int], row=..., value=np.nan):
    """`value` in a row of a dense tensor, or in the down matrix of (MoE layer, expert), of tiny models from now on.

    Returns their configuration.
    """
    config, dense, experts = tiny.weights("qwen2_moe")
    dense, experts = {name: array.copy() for name, array in dense.items()}, [(g, d.copy()) for g, d in experts]
    if isinstance(tensor, str):
        dense[tensor][row] = value
    else:
        experts[tensor[0]][1][tensor[1]] = value
    monkeypatch.setattr(tiny, "weights", lambda *_: (config, dense, experts))
    return config


def damaged(monkeypatch, way: str, *what):
    """A tiny engine with a `damage`."""
    config, options = damage(monkeypatch, *what), dict(WAYS[way])
    if way == "fused":
        if not ffi.available():
            pytest.skip("no native kernels for jitted programs here")
        monkeypatch.setattr(select, "is_faster", lambda *_: True)
        fast = {"alone_expert": 1e-6, "alone_token": 1e-7, "alone_first": 1e-6, "handover": 1e-4, "look": 1.0}
        options["profile"] = dataclasses.replace(tiny.costs(config), **fast)
    return tiny.engine(**options)


@pytest.mark.parametrize("way", WAYS)
def test_logits_that_are_no_numbers_are_one_error(monkeypatch, way):
    """At which step, in which layer; greedy and drawn; and the next answer is right."""
    with tiny.engine(executor="dense") as dense:
        want = dense.generate([[1, 2, 3]], max_new_tokens=4).token_ids[0]
    with damaged(monkeypatch, way, EMBEDDING, want[1]) as engine:
        assert (way == "fused") == hasattr(engine._forward, "fused")
        for sampling in ({}, {"temperature": 1e-9}):
            with pytest.raises(UserError, match=r"NaN or infinite at step 2: .* first in the token table; the weights"):
                engine.generate([[1, 2, 3]], max_new_tokens=4, **sampling)
            assert engine.generate([[1, 2, 3]], max_new_tokens=2, **sampling).token_ids == [want[:2]]
        with pytest.raises(UserError, match=r"at step 0: .* the token table"):
            engine.logits([1, want[1]])


DAMAGES = [
    (EMBEDDING, 7, np.inf, "the token table"),
    ("model.layers.1.self_attn.v_proj.weight", 3, np.nan, "layer 1, in its attention"),
    ("model.layers.1.mlp.gate.weight", 3, np.nan, "layer 1, in its norm or router"),
    ("model.layers.0.mlp.shared_expert.up_proj.weight", 0, 3e38, "layer 0, in its shared experts"),
    ((2, slice(None)), ..., np.nan, r"layer 2, in its expert \d"),
    (HEAD, 5, -np.inf, "the last norm or the head"),
    (HEAD, 5, np.nan, "the last norm or the head"),
]


@pytest.mark.parametrize(("tensor", "row", "value", "where"), DAMAGES)
def test_a_second_pass_says_where_they_come_up_first(monkeypatch, tensor, row, value, where):
    with damaged(monkeypatch, "overlapped", tensor, row, value) as engine:
        with pytest.raises(UserError, match=f"NaN or infinite at step 0: a second pass .* first in {where}"):
            engine.generate([[1, 2, 3, 7], [4, 5]], max_new_tokens=4)
