"""Numbers that are none, on their way into a checkpoint, and in what a model answers."""

import checkpoint_folders as folders
import numpy as np
import pytest

from hybrimoe_jax.checkpoint import shards
from hybrimoe_jax.checkpoint.convert import convert
from hybrimoe_jax.errors import UserError

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
