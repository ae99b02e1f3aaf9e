"""Plain experts: widening is exact, arrays are aligned and share nothing, malformed ones are refused."""

from __future__ import annotations

import numpy as np
import pytest

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.plain import ALIGNMENT, BF16, F32, Arena, aligned_copy, aligned_empty, check_expert, to_f32
from hybrimoe_jax.host_kernels import ExpertWeights, get_kernel


def is_aligned(array: np.ndarray) -> bool:
    return array.flags.c_contiguous and (array.size == 0 or array.ctypes.data % ALIGNMENT == 0)


def test_widening_is_exact_for_every_bfloat16():
    every = np.arange(1 << 16, dtype=np.uint16).view(BF16)
    widened = to_f32(every)
    with np.errstate(invalid="ignore"):
        assert np.array_equal(widened, every.astype(np.float32), equal_nan=True)
        finite = ~np.isnan(widened)
        assert np.array_equal(widened[finite].astype(BF16).view(np.uint16), every[finite].view(np.uint16))
    assert is_aligned(widened)


def test_arrays_of_an_arena_lie_side_by_side_and_share_nothing():
    arena = Arena()
    sizes = [(7,), (3, 5), (1 << 20,), (9 << 20,), 11]  # the fourth is larger than what is left of a block
    arrays = [arena.empty(shape, dtype) for shape in sizes for dtype in (F32, BF16, np.uint8)]
    for value, array in enumerate(arrays):
        assert is_aligned(array)
        array.fill(value)
    assert all((array == np.array(value, array.dtype)).all() for value, array in enumerate(arrays))
    assert arrays[1].ctypes.data - arrays[0].ctypes.data == 64
    source = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert np.array_equal(aligned_copy(source, BF16, arena).astype(np.float32), source)


def test_aligned_arrays_start_on_a_cache_line():
    for shape in (1, (3, 5), (0, 4), (7, 2, 2)):
        for dtype in (np.float32, BF16, np.int8):
            array = aligned_empty(shape, dtype)
            assert is_aligned(array) and array.dtype == dtype and array.shape == ((shape,) if shape == 1 else shape)
    source = np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4))
    assert is_aligned(aligned_copy(source)) and np.array_equal(aligned_copy(source), source)


@pytest.mark.parametrize(
    "gate_up, down, said",
    [
        (np.zeros((6, 4), F32), np.zeros((5, 3), F32), r"gate_up has shape \(6, 4\), down \(5, 3\)"),
        (np.zeros((6, 4), np.float64), np.zeros((4, 3), np.float64), "gate_up has dtype float64"),
        (np.zeros((6, 4), BF16), np.zeros((4, 3), F32), "gate_up is bfloat16 but down is float32"),
        (np.zeros(6, F32), np.zeros((4, 3), F32), r"gate_up has shape \(6,\)"),
    ],
)
def test_malformed_experts_are_refused(gate_up, down, said):
    with pytest.raises(UserError, match=said):
        check_expert(ExpertWeights(gate_up, down), "layer 3 expert 7")
    with pytest.raises(UserError, match=said):
        get_kernel("reference").prepare(ExpertWeights(gate_up, down))
