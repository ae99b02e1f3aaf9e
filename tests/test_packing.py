"""The quantised formats: names, layout, and what their numbers mean."""

import numpy as np
import pytest

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.packing import (
    ExpertLayout,
    Format,
    dequantise,
    pack,
    pack_expert,
    quantise,
    quantise_activations,
    unpack,
)

FORMATS = ["int8-g32", "int8-g128-s32", "int4-g32", "int4-g64-a8", "int4-g128", "int4z-g32-s32", "int4z-g64"]
SHAPES = [(8, 32), (16, 256), (5, 40), (13, 1), (64, 200)]


def random_codes(rng, format, rows, columns):
    groups = -(-columns // format.group)
    scales = rng.uniform(0.5, 2, (rows, groups)).astype(format.scale_dtype).astype(np.float32)
    zeros = rng.integers(0, 17, (rows, groups), dtype=np.uint8) if format.zeros else None
    if format.bits == 4:
        return rng.integers(0, 16, (rows, columns), dtype=np.uint8), scales, zeros
    return rng.integers(-127, 128, (rows, columns), dtype=np.int8), scales, zeros


@pytest.mark.parametrize("name", FORMATS)
def test_a_name_survives_parsing(name):
    assert str(Format.parse(name)) == name


@pytest.mark.parametrize("name", ["int3-g32", "int4-g16", "int8z-g32", "int4-g32-a4", "f32", ""])
def test_other_names_are_refused(name):
    with pytest.raises(UserError, match="is not known; say a quantised one"):
        Format.parse(name)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMATS)
def test_packing_keeps_every_number(name, shape):
    format = Format.parse(name)
    given = random_codes(np.random.default_rng(0), format, *shape)
    matrix = pack(format, *given)
    assert matrix.data.nbytes == matrix.layout.nbytes and matrix.data.ctypes.data % 64 == 0
    for have, want in zip(unpack(matrix), given, strict=True):
        np.testing.assert_array_equal(have, want)


def test_the_bytes_lie_where_the_documentation_says():
    rng = np.random.default_rng(1)
    for name, row, column in [("int8-g32", 11, 37), ("int4-g32", 11, 37), ("int4-g32", 3, 45)]:
        format = Format.parse(name)
        codes, scales, _ = random_codes(rng, format, 16, 64)
        data = pack(format, codes, scales).data
        panel, lane = divmod(row, 8)
        if format.bits == 8:
            at = panel * 64 * 8 + column // 4 * 32 + lane * 4 + column % 4
            assert data[at].view(np.int8) == codes[row, column]
        else:
            at = panel * 64 * 4 + column // 8 * 32 + lane * 4 + column % 4
            assert (data[at] >> (4 if column % 8 >= 4 else 0)) & 15 == codes[row, column]
        start = 16 * 64 * format.bits // 8 + (panel * 2 + column // 32) * 16 + lane * 2
        assert data[start : start + 2].view("<f2")[0] == scales[row, column // 32]


@pytest.mark.parametrize("name", FORMATS)
def test_padding_means_zero(name):
    """Rows and columns that a matrix does not have must add nothing to a product over the whole panel."""
    format = Format.parse(name)
    narrow = pack(format, *random_codes(np.random.default_rng(2), format, 5, 40))
    wide = type(narrow)(narrow.data, type(narrow.layout)(format, 8, 64)) if format.group == 32 else None
    if wide is None:
        return
    full = dequantise(wide)
    np.testing.assert_array_equal(full[:5, :40], dequantise(narrow))
    assert not full[5:].any() and not full[:, 40:].any()


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_is_within_half_a_step(name):
    format = Format.parse(name)
    weights = np.random.default_rng(3).standard_normal((24, 200), np.float32)
    codes, scales, zeros = quantise(weights, format)
    have = dequantise(pack(format, codes, scales, zeros))
    step = np.abs(scales)[:, np.arange(200) // format.group]
    error = np.abs(have - weights) / step
    # int4's most positive value may lie up to a step outside; int4z's zero point is rounded itself; float16 scales
    # shift both
    assert error.max() <= {8: 0.6, 4: 1.05}[format.bits] and np.median(error) < 0.3


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_zeros(name):
    format = Format.parse(name)
    assert not dequantise(pack(format, *quantise(np.zeros((8, 64), np.float32), format))).any()


def test_activations_are_rounded_as_documented():
    x = np.random.default_rng(4).standard_normal((3, 100), np.float32)
    x[1, 64:] = 0
    x[2, 0] = 5
    codes, scales = quantise_activations(x, 64)
    assert codes.shape == x.shape and scales.shape == (3, 2) and codes.min() >= -127 and codes[2, 0] == 127
    back = codes * scales[:, np.arange(100) // 64]
    assert np.abs(back - x).max() <= scales.max() / 2 * 1.001 and not codes[1, 64:].any() and scales[1, 1] == 0


def test_an_expert_is_its_three_matrices():
    rng = np.random.default_rng(5)
    gate, up, down = (rng.standard_normal(s, np.float32) for s in ((24, 40), (24, 40), (40, 24)))
    format = Format.parse("int8-g32")
    expert = pack_expert(gate, up, down, format)
    assert expert.layout == ExpertLayout(format, 40, 24) and expert.data.nbytes == expert.nbytes
    for matrix, want in zip(expert.matrices, (gate, up, down), strict=True):
        assert matrix.data.base is not None and np.abs(dequantise(matrix) - want).max() < 0.03
