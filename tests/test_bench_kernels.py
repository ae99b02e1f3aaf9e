"""`bench kernels`: it measures what it is asked for, in turns, and gives a ratio only where everything was measured."""

import json

import golden
import numpy as np
import pytest

from hybrimoe_jax.bench import __main__ as bench
from hybrimoe_jax.bench import ggml_peer, kernel_contenders, kernel_ratios, kernels
from hybrimoe_jax.bench.kernel_contenders import SHAPES, Shape, Weights
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.packing import Format, dequantise, pack_expert
from hybrimoe_jax.formats.plain import BF16
from hybrimoe_jax.host_kernels.native import library

needs_native = pytest.mark.skipif(not library.available(), reason="the package was installed without a C++ compiler")


def row(shape, load, contender, seconds):
    return kernel_ratios.Row(shape, load, 2, contender, seconds, 10**6, 10**9, 1e10, 0.25, 0.5)


def test_a_ratio_is_the_geometric_mean_over_shapes_and_loads_against_the_fastest_peer():
    ratio = kernel_ratios.Ratio("x", "ours", (2, 4), ("a", "b"))
    rows = [row(s.name, n, "ours", 1.0) for s in SHAPES for n in (2, 4)]
    rows += [row(s.name, n, "a", 9.0) for s in SHAPES for n in (2, 4)]
    rows += [row(s.name, n, "b", 1.0 if n == 2 else 4.0) for s in SHAPES for n in (2, 4)]
    assert kernel_ratios.mean_ratio(ratio, rows, [s.name for s in SHAPES]) == pytest.approx(2.0)


@pytest.mark.parametrize("without", ["ours", "a", "mixtral"])
def test_a_ratio_with_a_peer_or_shape_absent_is_not_measured(without):
    rows = [row(s.name, 1, name, 1.0) for s in SHAPES for name in ("ours", "a")]
    rows = [r for r in rows if without not in (r.contender, r.shape)]
    assert (
        kernel_ratios.mean_ratio(kernel_ratios.Ratio("x", "ours", (1,), ("a",)), rows, [s.name for s in SHAPES]) is None
    )


@needs_native
def test_it_prints_limits_tables_ratios_and_one_json_line(monkeypatch, capsys):
    monkeypatch.setattr(kernel_contenders, "MIN_BYTES", 1)
    monkeypatch.setattr(kernels, "PROBE_BYTES", 1 << 20)
    monkeypatch.setattr(ggml_peer, "folder", lambda: None)
    options = ["--peers", "ggml,numpy", "--formats", "f32,int4-g32-a8", "--shapes", "64x96", "--loads", "1,9"]
    assert bench.main(["kernels", *options, "--threads", "1", "--seconds", "0.01"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    record = json.loads(lines[-1])
    golden.check(record)
    assert {(r["contender"], r["load"]) for r in record["rows"]} == {
        (name, load) for name in ("native f32", "native int4-g32-a8", "numpy f32") for load in (1, 9)
    }
    assert all(r["ms"] > 0 and r["gb_s"] > 0 and r["share"] > 0 for r in record["rows"])
    assert "ggml" in record["absent"] and any("ggml: absent" in line for line in lines)
    assert lines[0].startswith("limits on 1 thread: reads") and set(record["ratios"].values()) == {None}
    assert all(0 < r["of_bandwidth"] <= r["share"] for r in record["rows"])
    assert sum("not measured" in line for line in lines) == len(record["ratios"])


@needs_native
@pytest.mark.parametrize("format", ["f32", "bf16", "int8-g32", "int4-g32"])
def test_a_contender_computes_the_expert_that_its_format_stands_for(format):
    weights = Weights(Shape("small", 64, 96))
    x = np.random.default_rng(0).standard_normal((3, 64), np.float32)
    matrices = [m.astype(np.float64) for m in weights.matrices]
    if format == "bf16":
        matrices = [m.astype(BF16).astype(np.float64) for m in weights.matrices]
    elif format != "f32":
        matrices = [
            dequantise(m).astype(np.float64) for m in pack_expert(*weights.matrices, Format.parse(format)).matrices
        ]
    gate, up = x @ matrices[0].T, x @ matrices[1].T
    want = (gate / (1 + np.exp(-gate)) * up) @ matrices[2].T
    contender = kernel_contenders.native(format, weights)
    contender.set_threads(1)
    assert np.abs(contender.run(0, x) - want).max() < 1e-5 * np.abs(want).max()


@pytest.mark.parametrize(
    "options, says",
    [
        (["--peers", "fbgemm"], "known: ggml, torch"),
        (["--shapes", "llama"], "say mixtral"),
        (["--formats", "int3"], "is not known"),
        (["--loads", "0"], "at least 1"),
        (["--seconds", "0"], "above 0"),
        (["--seconds", "nan"], "above 0"),
        (["--loads", "\N{SUPERSCRIPT TWO}"], "numbers of at least 1"),
    ],
)
def test_wrong_options_are_named(options, says):
    with pytest.raises(UserError, match=says):
        bench.main(["kernels", *options])
