"""Rounding with a text: what it is for (smaller errors of outputs), its edges, and the walk through the float
model."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_checkpoint
from grids import few

from hybrimoe_jax import convert as command
from hybrimoe_jax.checkpoint import calibrate as module
from hybrimoe_jax.checkpoint import writer as checkpoint_writer
from hybrimoe_jax.checkpoint.calibrate import calibrated, windows
from hybrimoe_jax.checkpoint.hugging_face import from_arrays
from hybrimoe_jax.checkpoint.reader import open_checkpoint
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.gptq import BLOCK, compensated
from hybrimoe_jax.formats.packing import Format, dequantise, pack, pack_expert, quantise
from hybrimoe_jax.models.moe import DenseExperts
from hybrimoe_jax.models.parameters import merge, split
from hybrimoe_jax.models.registry import build_model


def correlated(rng, tokens: int, columns: int) -> np.ndarray:
    return (rng.standard_normal((tokens, columns)) @ rng.standard_normal((columns, columns))).astype(np.float32)


@pytest.mark.parametrize("columns", [40, BLOCK + 60])
@pytest.mark.parametrize("name", ["int4-g32", "int4z-g64", "int4-g128-s32", "int8-g32"])
def test_outputs_are_nearer_than_with_round_to_nearest(name, columns):
    rng, format = np.random.default_rng(0), Format.parse(name)
    x, weights = correlated(rng, 400, columns), rng.standard_normal((24, columns), np.float32)
    hessian = x.T @ x / len(x)
    nearest, better = (
        dequantise(pack(format, *c)) for c in (quantise(weights, format), compensated(weights, hessian, format))
    )
    errors = [np.square((weights - rounded) @ x.T).sum() for rounded in (better, nearest)]
    assert errors[0] < 0.7 * errors[1]


def test_blocks_do_not_change_the_rounding(monkeypatch):
    rng, format = np.random.default_rng(1), Format.parse("int4-g64-s32")
    x, weights = correlated(rng, 300, 96), rng.standard_normal((8, 96), np.float32)
    whole = compensated(weights, x.T @ x, format)
    monkeypatch.setattr("hybrimoe_jax.formats.gptq.BLOCK", 7)
    codes, scales, _ = compensated(weights, x.T @ x, format)
    assert (codes != whole[0]).mean() < 0.02  # sums in another order may tip a value at a boundary
    np.testing.assert_array_equal(scales, whole[1])


def test_without_inputs_it_is_round_to_nearest():
    rng, format = np.random.default_rng(2), Format.parse("int4z-g32")
    weights = rng.standard_normal((8, 64), np.float32)
    for have, want in zip(compensated(weights, np.zeros((64, 64)), format), quantise(weights, format), strict=True):
        np.testing.assert_array_equal(have, want)
    hessian = np.diag(
        np.r_[np.ones(32), np.zeros(32)]
    )  # independent inputs, half of them never used: nothing to make up for
    np.testing.assert_array_equal(compensated(weights, hessian, format)[0], quantise(weights, format)[0])


def test_all_zero_weights_stay_zero():
    codes, scales, _ = compensated(np.zeros((8, 32), np.float32), np.eye(32) + 0.5, Format.parse("int4-g32"))
    assert not scales.any() and (codes == 8).all()


def model(family: str):
    config, dense, experts = tiny.weights(family)
    weights = from_arrays(tiny.CONFIGS[family], dense, experts)
    ids = np.random.default_rng(3).integers(0, config.vocab_size, (6, 40)).astype(np.int32)
    return config, dense, experts, weights, ids


@pytest.mark.parametrize("family", few(["deepseek_v2"], tiny.CONFIGS))
def test_the_walk_gives_every_layer_the_inputs_of_the_float_model(family, monkeypatch):
    """Against one pass of the whole model: what each router saw, and which experts it chose."""
    monkeypatch.setattr(module, "ROWS", 80)  # two windows to a call
    config, dense, experts, weights, ids = model(family)
    seen = {}

    class Spy(DenseExperts):
        def __call__(self, layer, x, routing):
            seen[layer] = np.asarray(x), np.asarray(routing.ids)
            return super().__call__(layer, x, routing)

    graph, _ = split(build_model(config))
    stacks = iter(experts)
    whole = [next(stacks) if config.is_moe(i) else None for i in range(config.num_hidden_layers)]
    net = merge(graph, {name: jnp.asarray(a) for name, a in dense.items()})
    with jax.disable_jit():
        net(ids, net.init_cache(*ids.shape), jnp.broadcast_to(jnp.arange(40), ids.shape), Spy(whole))
    run = module._Run(weights, Format.parse("int8-g32"), ids)
    for layer in config.moe_layers:
        run.packed(layer, 0)
        np.testing.assert_allclose(run.layer.x, seen[layer][0], atol=2e-4)
        assert (run.layer.ids == seen[layer][1]).mean() > 0.99


def expert_errors(weights, rounded, ids, format):
    """Summed squared error of the routed experts' outputs on the calibration tokens: rounded to nearest, and
    calibrated."""
    run = module._Run(weights, format, ids)
    sums = np.zeros(2)
    for shard, other in zip(weights.shards, rounded.shards, strict=True):
        for e in range(shard.experts.count if shard.experts else 0):
            layer = run._at(shard.layer)
            rows, choice = np.nonzero(layer.ids == e)
            x, weight = layer.x[rows], layer.weights[rows, choice][:, None]
            exact = shard.experts.read(e)
            nearest = tuple(map(dequantise, pack_expert(*(np.asarray(m) for m in exact), format).matrices))
            out = [weight * (module._inner(x, g, u) @ d.T) for g, u, d in (exact, nearest, other.experts.read(e))]
            sums += [np.square(out[0] - out[1]).sum(), np.square(out[0] - out[2]).sum()]
    return sums


def test_calibrated_experts_are_nearer_than_rounded_ones():
    _, _, _, weights, ids = model("qwen2_moe")
    format = Format.parse("int4-g32")
    nearest, better = expert_errors(weights, calibrated(weights, format, ids), ids, format)
    assert better < 0.9 * nearest


@pytest.mark.slow
def test_an_expert_that_saw_nothing_follows_the_layer():
    """Two tokens of text: most experts are never chosen, and still come out well formed."""
    config, _, _, weights, ids = model("mixtral")
    rounded = calibrated(weights, Format.parse("int4-g32"), ids[:1, :2])
    for shard in rounded.shards[1:]:
        for e in range(config.num_experts):
            for have, want in zip(shard.experts.read(e), weights.shards[shard.layer + 1].experts.read(e), strict=True):
                assert np.abs(have - want).max() < np.abs(want).max() / 3


def test_layers_are_asked_for_in_order():
    _, _, _, weights, ids = model("qwen2_moe")
    rounded = calibrated(weights, Format.parse("int4-g32"), ids)
    rounded.shards[3].experts.packed(0)
    with pytest.raises(ValueError, match="layer 0 was asked for after layer 2"):
        rounded.shards[1].experts.packed(0)
    twice = dataclasses.replace(weights, shards=rounded.shards)
    with pytest.raises(ValueError, match="quantised already"):
        calibrated(twice, Format.parse("int4-g32"), ids)


def test_windows_are_spread_over_the_text(monkeypatch):
    assert windows(list(range(100)), 4096).shape == (1, 100)
    np.testing.assert_array_equal(windows(list(range(70)), 32), np.arange(64).reshape(2, 32))
    monkeypatch.setattr(module, "TOKENS", 96)
    np.testing.assert_array_equal(windows(list(range(320)), 32)[:, 0], [0, 128, 288])
    with pytest.raises(UserError, match="has 5 tokens"):
        windows([1, 2, 3, 4, 5], 4096)


@pytest.mark.slow
def test_the_command_and_a_resumed_conversion_agree(tmp_path, monkeypatch, capsys):
    source = tiny_checkpoint.write_hf(tmp_path / "hf")
    text = tmp_path / "text.txt"
    text.write_text("the other and the father, hither and thither. " * 40)
    argv = [str(source), "--format", "int4-g32", "--calibrate", str(text)]
    assert command.main([argv[0], str(tmp_path / "a"), *argv[1:]]) == 0
    written = checkpoint_writer.write_shard

    def killed(folder, shard, *rest):
        if shard.layer == 2:
            raise KeyboardInterrupt
        return written(folder, shard, *rest)

    monkeypatch.setattr(checkpoint_writer, "write_shard", killed)
    assert command.main([argv[0], str(tmp_path / "b"), *argv[1:]]) == 130
    monkeypatch.setattr(checkpoint_writer, "write_shard", written)
    assert command.main([argv[0], str(tmp_path / "b"), *argv[1:]]) == 0
    a, b = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in "ab")
    assert a["pieces"] == b["pieces"] and a["source"]["calibration"] and a["format"] == "int4-g32"
    assert command.main([argv[0], str(tmp_path / "c"), "--format", "int4-g32"]) == 0
    plain = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert plain["pieces"][1]["experts"]["hashes"] != a["pieces"][1]["experts"]["hashes"]
    assert plain["pieces"][1]["dense"] == a["pieces"][1]["dense"]
    assert open_checkpoint(tmp_path / "a").experts().get(0, 0) is not None


@pytest.mark.parametrize(
    "options, message",
    [
        (["--calibrate", "TEXT"], "goes with a quantised --format"),
        (["--calibrate", "TEXT", "--format", "bf16"], "goes with a quantised --format"),
        (["--calibrate", "no-such-file", "--format", "int4-g64"], "no such file"),
        (["--calibrate", "SHORT", "--format", "int4-g64"], "give at least 64"),
    ],
)
def test_bad_calibrations_are_refused(tmp_path, options, message):
    source = tiny_checkpoint.write_hf(tmp_path / "hf")
    (tmp_path / "TEXT").write_text("the other " * 100)
    (tmp_path / "SHORT").write_text("the")
    options = [str(tmp_path / o) if o.isupper() else o for o in options]
    with pytest.raises(UserError, match=message):
        command.main([str(source), str(tmp_path / "out"), *options])
