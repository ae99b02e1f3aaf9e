"""Host kernels: every kernel gives the float64 answer at every load, size, format and thread; `auto` takes the best."""

from __future__ import annotations

import re
import sys
import threading
import time

import numpy as np
import pytest
from kernel_cases import TOLERANCE, assert_close, exact, make_expert, needs_onednn, tokens_of

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.packing import Format, pack_expert
from hybrimoe_jax.formats.plain import BF16, F32
from hybrimoe_jax.host_kernels import KERNELS, get_kernel, onednn_api, run_experts
from hybrimoe_jax.host_kernels.native import library as native_library
from hybrimoe_jax.host_kernels.native.kernel import NativeKernel
from hybrimoe_jax.host_kernels.onednn import MAX_LOAD, OneDnnKernel, available


def kernels() -> list:
    """Every form in which an expert can run."""
    forms = [pytest.param(lambda sample: get_kernel("reference"), id="reference")]
    for name, limit in (("plain", 0), ("packed", 1 << 30)):
        make = lambda sample, limit=limit: OneDnnKernel(pack_limit=limit)  # noqa: E731
        forms.append(pytest.param(make, id=f"onednn-{name}", marks=needs_onednn))
    for isa in ("portable", "avx2", "avxvnni", "avx512", "avx512vnni"):
        there = native_library.available() and isa in native_library.isas()
        needs = pytest.mark.skipif(not there, reason=f"no native library here, or no {isa} on this processor")
        make = lambda sample, isa=isa: NativeKernel(isa=isa)  # noqa: E731
        forms.append(pytest.param(make, id=f"native-{isa}", marks=needs))
    forms.append(pytest.param(lambda sample: get_kernel("auto", sample), id="auto"))
    return forms


every_kernel = pytest.mark.parametrize("make", kernels())
BY_DEFAULT = {"reference", "onednn-packed", "auto"}
"""Of a test that takes a second for every kernel."""
few_kernels = pytest.mark.parametrize(
    "make",
    [form if form.id in BY_DEFAULT else form._replace(marks=(*form.marks, pytest.mark.slow)) for form in kernels()],
)


@every_kernel
def test_every_load_gives_the_float64_answer(make):
    weights = make_expert(48, 32)
    kernel = make(weights)
    handle = kernel.prepare(weights)
    x = tokens_of(600, 48)
    want = exact(weights, x)
    for load in [*range(1, 131), MAX_LOAD, MAX_LOAD + 1, 600]:
        assert_close(kernel.expert(handle, x[:load].copy()), want[:load])


@every_kernel
@pytest.mark.parametrize("width, hidden", [(1, 1), (7, 5), (33, 40), (192, 64), (250, 130), (512, 320)])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_odd_sizes_and_both_formats(make, width, hidden, dtype):
    weights = make_expert(width, hidden, dtype=dtype)
    kernel = make(weights)
    handle = kernel.prepare(weights)
    for load in (1, 2, 3, 5, 9, 17):
        x = tokens_of(load, width)
        out = np.full((load, width), np.nan, np.float32)
        assert kernel.expert(handle, x, out) is out
        assert_close(out, exact(weights, x))


@every_kernel
def test_large_expert_takes_the_memory_bound_paths(make):
    weights = make_expert(576, 448)
    kernel = make(weights)
    handle = kernel.prepare(weights)
    for load in (1, 2, 4, 5, 6, 40):
        x = tokens_of(load, 576)
        assert_close(kernel.expert(handle, x), exact(weights, x))


@every_kernel
def test_saturated_gates_neither_warn_nor_become_nan(make):
    weights = make_expert(64, 32)
    kernel = make(weights)
    handle = kernel.prepare(weights)
    for load in (1, 3, 20):
        x = tokens_of(load, 64) * 1e4  # gates of +-1e4: exp overflows float32 at 88
        assert_close(kernel.expert(handle, x), exact(weights, x))
        assert not kernel.expert(handle, np.zeros_like(x)).any()


@every_kernel
def test_threads_share_a_kernel_and_its_handles(make):
    experts = [make_expert(96, 64, seed) for seed in range(3)]
    kernel = make(experts[0])
    handles = [kernel.prepare(w) for w in experts]
    cases = [(i, tokens_of(load, 96, seed=load)) for i in range(3) for load in (1, 2, 7, 19, 70)]
    want = [exact(experts[i], x) for i, x in cases]
    wrong: list = []

    def work(shift: int) -> None:
        kernel.set_threads(1)
        for turn in range(60):
            case = (turn * 7 + shift) % len(cases)
            i, x = cases[case]
            got = kernel.expert(handles[i], x)
            if np.abs(got - want[case]).max() > TOLERANCE * np.abs(want[case]).max():
                wrong.append((shift, case))

    workers = [threading.Thread(target=work, args=(shift,)) for shift in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@every_kernel
def test_inputs_are_left_alone_and_may_be_strided(make):
    weights = make_expert(48, 32)
    kernel = make(weights)
    handle = kernel.prepare(weights)
    wide = tokens_of(6, 96)
    before = wide.copy()
    x = wide[:, ::2]
    assert_close(kernel.expert(handle, x), exact(weights, x))
    assert np.array_equal(wide, before)


@every_kernel
def test_run_experts_equals_a_loop_over_tokens(make):
    width, total = 40, 12
    experts = [make_expert(width, 24, seed) for seed in range(6)]
    kernel = make(experts[0])
    handles = [kernel.prepare(w) for w in experts]
    rng = np.random.default_rng(3)
    for size in (total, 1):
        x = tokens_of(size, width)
        rows = [
            None,
            np.arange(size),
            rng.permutation(size),
            np.array([size - 1]),
            np.array([], np.int64),
            np.sort(rng.choice(size, max(1, size // 2), replace=False)),
        ]
        mix = [rng.random(size if r is None else len(r)).astype(np.float32) for r in rows]
        start = rng.standard_normal((size, width)).astype(np.float32)
        want = start.astype(np.float64)
        for expert, chosen, share in zip(experts, rows, mix):
            picked = np.arange(size) if chosen is None else chosen
            if len(picked):
                want[picked] += share[:, None] * exact(expert, x[picked])
        out = start.copy()
        assert run_experts(kernel, handles, x, rows, mix, out) is out
        assert_close(out, want)


def test_run_experts_without_work_leaves_the_output():
    out = np.ones((1, 8), np.float32)
    x = np.ones((1, 8), np.float32)
    run_experts(get_kernel("reference"), [], x, [], [], out)
    run_experts(get_kernel("reference"), [None], x, [np.array([], int)], [np.array([])], out)
    assert np.array_equal(out, np.ones((1, 8)))


@pytest.mark.alone
@few_kernels
def test_host_experts_release_the_interpreter_lock(make):
    """With forced switches off, another thread runs only when the lock is let go: often during a call, not just between
    its three products."""
    weights = make_expert(1024, 1024)
    kernel = make(weights)
    handle = kernel.prepare(weights)
    x = tokens_of(256, 1024)
    out = np.empty_like(x)
    kernel.expert(handle, x, out)
    kernel.expert(handle, x, out)
    calls, ticks = [], []

    def work() -> None:
        for _ in range(6):
            begin = time.perf_counter()
            kernel.expert(handle, x, out)
            calls.append((begin, time.perf_counter()))

    worker = threading.Thread(target=work)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(100.0)
    try:
        worker.start()
        while worker.is_alive():
            ticks.append(time.perf_counter())
            time.sleep(2e-4)
    finally:
        sys.setswitchinterval(interval)
        worker.join()
    during = [sum(begin < tick < end for tick in ticks) for begin, end in calls]
    assert max(during) > 12, during


def test_absent_libraries_are_one_clear_error_each_and_auto_goes_on(monkeypatch, tmp_path):
    def missing(name):
        raise onednn_api.importlib.metadata.PackageNotFoundError(name)

    onednn_api.api.cache_clear()
    native_library.library.cache_clear()
    monkeypatch.setattr(onednn_api.importlib.metadata, "files", missing)
    monkeypatch.setenv(native_library.VARIABLE, str(tmp_path / "none.so"))
    try:
        assert not available() and not native_library.available()
        with pytest.raises(UserError, match=r"none\.so.*C\+\+ compiler.*'auto'"):
            get_kernel("native")
        (tmp_path / "none.so").write_text("not a library")
        with pytest.raises(UserError, match=r"none\.so does not load"):
            get_kernel("native")
        with pytest.raises(UserError, match=r"onednn-cpu-gomp.*not installed.*'reference'"):
            get_kernel("onednn")
        weights = make_expert(24, 16)
        kernel = get_kernel("auto", weights)
        assert kernel.name == "reference" and not kernel.teams
        assert [re.search("onednn|native", why)[0] for why in kernel.describe()["unavailable"]] == ["native", "onednn"]
        x = tokens_of(4, 24)
        assert_close(kernel.expert(kernel.prepare(weights), x), exact(weights, x))
    finally:
        onednn_api.api.cache_clear()
        native_library.library.cache_clear()


def test_auto_is_the_first_kernel_that_is_there_and_computes_the_format(monkeypatch, tmp_path):
    plain, packed = make_expert(64, 64), pack_expert(*np.ones((3, 64, 64), np.float32), Format.parse("int4-g32"))
    if native_library.available():
        kernel = get_kernel("auto", packed)
        assert kernel.name == get_kernel("auto", plain).name == "native" and "unavailable" not in kernel.describe()
    native_library.library.cache_clear()
    monkeypatch.setenv(native_library.VARIABLE, str(tmp_path / "none.so"))
    try:
        assert get_kernel("auto", plain).name == ("onednn" if available() else "reference")
        assert get_kernel("auto", packed).name == "reference"
    finally:
        native_library.library.cache_clear()


def test_unknown_kernel_names_the_known_ones():
    with pytest.raises(UserError, match=r"'blas' is not known.*auto, reference, onednn, native"):
        get_kernel("blas")
    assert KERNELS == ("auto", "reference", "onednn", "native")
