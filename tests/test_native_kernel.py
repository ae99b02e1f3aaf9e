"""The native kernel beyond the contract of all kernels (test_host_kernels.py): runs of experts over fuzzed shapes, the
same bits whatever is computed beside a token, calls at once from several threads, refusals, its build, and
sanitizers."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from grids import examples
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import assert_close, exact, make_expert, tokens_of
from native_cases import HERE, every_isa, needs_native, routing, runs

from hybrimoe_jax.engine.lanes.clock import WallClock
from hybrimoe_jax.engine.lanes.host import HostExecutor, HostWork
from hybrimoe_jax.formats.plain import BF16, F32
from hybrimoe_jax.host_kernels import run_experts
from hybrimoe_jax.host_kernels.native import library
from hybrimoe_jax.host_kernels.native.kernel import NativeKernel

ROOT = Path(__file__).parents[1]
NATIVE = ROOT / "hybrimoe_jax" / "host_kernels" / "native"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def layer(seed: int, width: int, hidden: int, total: int, count: int, dtype):
    """Experts, x, and per expert random rows (some none) and routing weights."""
    rng = np.random.default_rng(seed)
    experts = [make_expert(width, hidden, seed + i, dtype) for i in range(count)]
    return experts, tokens_of(total, width, seed), *routing(rng, total, count)


def expected(experts, x, rows, mix) -> np.ndarray:
    want = np.zeros(x.shape)
    for expert, chosen, share in zip(experts, rows, mix, strict=True):
        if len(chosen):
            want[chosen] += share[:, None] * exact(expert, x[chosen])
    return want


@every_isa
@examples(60)
@given(**runs(width=130, hidden=90, count=5), dtype=st.sampled_from([F32, BF16]))
def test_runs_of_experts_give_the_float64_answer(isa, seed, width, hidden, total, count, threads, dtype):
    experts, x, rows, mix = layer(seed, width, hidden, total, count, dtype)
    kernel = NativeKernel(isa=isa)
    out = np.zeros_like(x)
    run_experts(kernel, [kernel.prepare(e) for e in experts], x, rows, mix, out, threads)
    want = expected(experts, x, rows, mix)
    assert np.abs(out - want).max() <= 5e-6 * max(1, np.abs(want).max())


@every_isa
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_token_gets_the_same_bits_alone_and_in_company_and_on_any_number_of_threads(isa, dtype):
    experts, x, _, _ = layer(7, 1100, 200, 30, 3, dtype)  # deeper than a block, large enough for several threads
    rows = [np.arange(30), np.arange(30)[::-1].copy(), np.array([4])]
    mix = [np.linspace(-1, 1, len(r), dtype=np.float32) for r in rows]
    kernel = NativeKernel(isa=isa)
    handles = [kernel.prepare(e) for e in experts]
    together = [run_experts(kernel, handles, x, rows, mix, np.zeros_like(x), threads) for threads in (1, 2, 3, 7)]
    for other in together[1:]:
        assert np.array_equal(together[0], other)
    for token in (0, 4, 17, 29):
        own = [np.flatnonzero(r == token) for r in rows]
        alone = run_experts(
            kernel,
            handles,
            x[token : token + 1],
            [np.zeros(len(at), np.int64) for at in own],
            [share[at] for share, at in zip(mix, own)],
            np.zeros((1, 1100), np.float32),
        )
        assert np.array_equal(alone[0], together[0][token])


@every_isa
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("hidden", [200, 201])
def test_a_token_s_bits_are_those_of_any_number_of_tokens(isa, dtype, hidden):
    experts, x, _, _ = layer(7, 1100, hidden, 40, 1, dtype)  # several blocks deep
    kernel = NativeKernel(isa=isa)
    handles = [kernel.prepare(expert) for expert in experts]

    def first(count: int) -> np.ndarray:
        every = [np.arange(count)]
        return run_experts(kernel, handles, x[:count], every, [np.ones(count, np.float32)], np.zeros_like(x[:count]), 2)

    want = first(40)
    for count in (1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 19, 24, 25):
        assert np.array_equal(first(count), want[:count]), count


@needs_native
def test_several_threads_call_at_once_and_share_the_helpers():
    kernel = NativeKernel()
    cases = []
    for seed in range(4):
        experts, x, rows, mix = layer(seed, 160, 96, 24 if seed else 1, 4, F32)
        cases.append(([kernel.prepare(e) for e in experts], x, rows, mix, expected(experts, x, rows, mix)))
    wrong = []

    def work(shift: int) -> None:
        for turn in range(80):
            handles, x, rows, mix, want = cases[(turn + shift) % len(cases)]
            got = run_experts(kernel, handles, x, rows, mix, np.zeros_like(x), 1 + (turn + shift) % 4)
            if np.abs(got - want).max() > 5e-6 * max(1, np.abs(want).max()):
                wrong.append((shift, turn))

    callers = [threading.Thread(target=work, args=(shift,)) for shift in range(5)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@needs_native
def test_more_tokens_than_the_scratch_holds_go_in_waves():
    total = 300_000  # times 16 floats of activations: more than SCRATCH_FLOATS
    experts, x = [make_expert(8, 16, seed) for seed in range(2)], tokens_of(total, 8)
    kernel = NativeKernel()
    every, mix = np.arange(total), np.ones(total, np.float32)
    out = np.zeros_like(x)
    run_experts(kernel, [kernel.prepare(e) for e in experts], x, [every, every], [mix, mix], out, 2)
    assert_close(out, exact(experts[0], x) + exact(experts[1], x))


@every_isa
def test_silu_is_accurate_everywhere(isa):
    gate = np.concatenate(
        [np.linspace(-87, 87, 200_001), np.geomspace(1e-30, 1, 1000), [0, -0.0, 1e4, -1e4, 3e38, -3e38]]
    )
    gate = gate.astype(np.float32)
    up, out = np.ones_like(gate), np.full_like(gate, np.nan)
    library.library().experts_silu_times(HERE[isa], *(a.ctypes.data for a in (gate, up, out)), len(gate))
    exactly = gate.astype(np.float64) / (1 + np.exp(-np.clip(gate.astype(np.float64), -700, 700)))
    large = np.abs(exactly) > 1e-30
    assert np.abs(out[large] / exactly[large] - 1).max() < 4e-7  # of 6e-8 for the last bit
    assert np.abs(out[~large] - exactly[~large]).max() < 1e-30
    nan = np.full(20, np.nan, np.float32)
    library.library().experts_silu_times(HERE[isa], *(a.ctypes.data for a in (nan, up, out)), len(nan))
    assert np.isnan(out[:20]).all()


@needs_native
def test_what_does_not_fit_is_refused_before_anything_is_written():
    kernel = NativeKernel()
    handle = kernel.prepare(make_expert(24, 16))
    x, out, mix = tokens_of(3, 24), np.zeros((3, 24), np.float32), np.ones(2, np.float32)
    two = np.array([0, 1])
    for rows in (np.array([0, 3]), np.array([-1, 0])):
        with pytest.raises(IndexError):
            run_experts(kernel, [handle, handle], x, [two, rows], [mix, mix], out)
    with pytest.raises(ValueError, match="width"):
        run_experts(kernel, [handle], tokens_of(3, 25), [two], [mix], np.zeros((3, 25), np.float32))
    with pytest.raises(ValueError, match="2 are needed"):
        run_experts(kernel, [handle], x, [two], [mix[:1]], out)
    for bad in (np.zeros((3, 24)), np.zeros((2, 24), np.float32)):
        with pytest.raises(ValueError, match="out is"):
            run_experts(kernel, [handle], x, [two], [mix], bad)
    with pytest.raises((TypeError, ValueError)):
        run_experts(kernel, [handle], x, [two], [mix], np.zeros((3, 48), np.float32)[:, ::2])
    assert not out.any()


@needs_native
def test_any_type_of_rows_and_weights_counts():
    experts, x, _, _ = layer(3, 40, 24, 9, 2, F32)
    kernel = NativeKernel()
    handles = [kernel.prepare(e) for e in experts]
    rows, mix = [np.array([1, 5, 6]), np.array([2, 8])], [np.array([0.5, 1, 2]), np.array([0.25, 4])]
    want = expected(experts, x, rows, mix)
    for index, number in ((np.int32, np.float64), (np.uint8, np.float32), (np.int64, np.float64)):
        striped = [np.repeat(m.astype(number), 2)[::2] for m in mix]
        got = run_experts(kernel, handles, x, [r.astype(index) for r in rows], striped, np.zeros_like(x))
        assert_close(got, want)


@needs_native
def test_the_executor_gives_a_layer_to_the_kernel_whole():
    experts, x, rows, mix = layer(5, 64, 48, 20, 4, F32)
    calls = []

    class Counting(NativeKernel):
        def run_experts(self, handles, *rest):
            calls.append((len(handles), rest[-1]))
            return super().run_experts(handles, *rest)

    host = HostExecutor(Counting(), lambda layer, expert: experts[expert], 3, 1, WallClock())
    try:
        work = HostWork(0, [0, 1, 2, 3], x, rows, mix)
        for wide, inline in ((False, False), (True, False), (False, True)):
            assert_close(host.submit(work, inline, wide).result(), expected(experts, x, rows, mix))
    finally:
        host.close()
    assert calls == [(4, 1), (4, 3), (4, 1)]


# its build


@pytest.fixture
def sources(tmp_path):
    """What the build needs, apart from this checkout's own build."""
    shutil.copytree(
        NATIVE,
        tmp_path / "hybrimoe_jax" / "host_kernels" / "native",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def build(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(command, cwd=folder, env={**os.environ, **env}, capture_output=True, text=True, timeout=300)


def test_without_a_compiler_the_build_says_so_and_goes_on(sources):
    done = build(sources, "build_ext", "--build-lib", "made", CC="no-such-compiler", CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert "libexperts" in done.stderr and "no-such-compiler" in done.stderr
    assert not list(sources.rglob("*.so"))


@pytest.mark.slow
@needs_compiler
def test_it_builds_from_a_source_distribution(sources, tmp_path):
    shutil.copytree(
        ROOT / "hybrimoe_jax",
        sources / "hybrimoe_jax",
        ignore=shutil.ignore_patterns("*.so", "assets"),
        dirs_exist_ok=True,
    )
    done = build(sources, "sdist", "--dist-dir", "made")
    assert done.returncode == 0, done.stderr
    archive = next((sources / "made").glob("*.tar.gz"))
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path / "unpacked", filter="data")
    (folder,) = (tmp_path / "unpacked").iterdir()
    done = build(folder, "build_ext", "--build-lib", "made")
    assert done.returncode == 0, done.stderr
    built = folder / "made" / "hybrimoe_jax" / "host_kernels" / "native" / "libexperts.so"
    program = "from hybrimoe_jax.host_kernels.native.library import isas; print(*isas())"
    env = {**os.environ, library.VARIABLE: str(built)}
    said = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True).stdout
    assert "portable" in said.split()


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(sanitizer, tmp_path):
    """Helpers join in for the smallest run, and the 16-lane code is compiled for this processor if it has no
    AVX-512."""
    flags = ["-std=c++17", "-O1", "-g", "-ffp-contract=fast", "-pthread", "-fno-sanitize-recover=all", f"-I{NATIVE}"]
    flags += [f"-fsanitize={sanitizer}", "-DEXPERTS_GRAIN=1"]
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    vnni = [*avx2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"]
    own = {"isa_avx2": avx2, "isa_avxvnni": [*avx2, "-mavxvnni"], "isa_avx512": [*avx2, "-mavx512f"]}
    own = own | {"isa_avx512vl": vnni, "isa_avx512vnni": vnni} if x86 else {}
    if "avx512" not in HERE:
        own["isa_avx512"] = ["-DEXPERTS_EMULATE", "-Wno-psabi"]
    objects = []
    sources = [source for source in sorted(NATIVE.glob("*.cpp")) if not source.stem.startswith("ffi")]  # those need XLA
    for source in [*sources, ROOT / "tests" / "native_check.cpp"]:
        objects.append(str(tmp_path / f"{source.stem}.o"))
        done = subprocess.run(
            [COMPILER, *flags, *own.get(source.stem, []), "-c", str(source), "-o", objects[-1]],
            capture_output=True,
            text=True,
            timeout=300,
        )
        if "libasan" in done.stderr or "unrecognized" in done.stderr:
            pytest.skip(f"the compiler has no {sanitizer} sanitizer")
        assert done.returncode == 0, done.stderr
    program = str(tmp_path / "check")
    done = subprocess.run([COMPILER, *flags, *objects, "-o", program], capture_output=True, text=True, timeout=300)
    if done.returncode and "cannot find" in done.stderr:
        pytest.skip(f"the compiler has no {sanitizer} sanitizer")
    assert done.returncode == 0, done.stderr
    done = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "portable agrees" in done.stdout
    if x86:
        assert "avx512 agrees" in done.stdout
