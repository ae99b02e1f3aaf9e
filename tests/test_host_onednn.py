"""The oneDNN kernel beyond the contract of all kernels (test_host_kernels.py): packing, threads, torch beside it."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading

import pytest
from kernel_cases import assert_close, exact, make_expert, needs_onednn, tokens_of

from hybrimoe_jax.host_kernels.onednn import MAX_LOAD, OneDnnKernel, bucket_of


@needs_onednn
def test_the_first_call_packs_and_copies_are_counted_and_freed():
    weights = make_expert(64, 32)
    kernel = OneDnnKernel()
    handle = kernel.prepare(weights)
    assert not handle.is_packed and kernel.packed_bytes == 0
    kernel.expert(handle, tokens_of(2, 64))
    assert handle.is_packed and kernel.packed_bytes >= weights.nbytes
    assert kernel.describe()["packed_experts"] == 1
    del handle
    gc.collect()
    assert kernel.packed_bytes == 0


@needs_onednn
def test_pack_limit_holds_and_the_answer_stays():
    experts = [make_expert(64, 32, seed) for seed in range(3)]
    measuring = OneDnnKernel()
    one = measuring.prepare(experts[0])
    assert measuring.pack(one)
    kernel = OneDnnKernel(pack_limit=2 * measuring.packed_bytes)
    handles = [kernel.prepare(w) for w in experts]
    x = tokens_of(9, 64)
    for weights, handle in zip(experts, handles):
        assert_close(kernel.expert(handle, x), exact(weights, x))
        assert_close(kernel.expert(handle, x), exact(weights, x))
    assert [h.is_packed for h in handles] == [True, True, False]
    assert kernel.packed_bytes <= kernel.pack_limit
    assert not kernel.pack(handles[2])


@needs_onednn
def test_primitives_are_bounded():
    buckets = {bucket_of(load) for load in range(1, MAX_LOAD + 1)}
    assert all(load <= bucket_of(load) <= 1.25 * load for load in range(1, MAX_LOAD + 1))
    assert len(buckets) <= 36 and {bucket_of(n) for n in range(1, 17)} == set(range(1, 17))
    kernel = OneDnnKernel(pack_limit=0)
    handle = kernel.prepare(make_expert(16, 8))
    for load in range(1, 400):
        kernel.expert(handle, tokens_of(load, 16))
    assert kernel.describe()["primitives"] <= 3 * len(buckets)


@needs_onednn
def test_a_thread_may_use_two_openmp_threads_while_another_uses_one():
    weights = make_expert(256, 128)
    kernel = OneDnnKernel()
    handle = kernel.prepare(weights)
    x = tokens_of(50, 256)
    got = {}

    def work(threads: int) -> None:
        kernel.set_threads(threads)
        got[threads] = [kernel.expert(handle, x) for _ in range(10)][-1]

    workers = [threading.Thread(target=work, args=(n,)) for n in (1, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert_close(got[1], exact(weights, x))
    assert_close(got[2], exact(weights, x))


@pytest.mark.slow
@needs_onednn
def test_onednn_lives_beside_torch():
    """torch carries a oneDNN of its own; the two must not be mixed up, whichever is loaded first."""
    pytest.importorskip("torch")
    program = (
        "import {first}\n"
        "import numpy as np, torch\n"
        "from hybrimoe_jax.host_kernels import ExpertWeights, get_kernel\n"
        "rng = np.random.default_rng(0)\n"
        "w = ExpertWeights(rng.standard_normal((48, 32), np.float32), rng.standard_normal((32, 24), np.float32))\n"
        "x = rng.standard_normal((9, 32), np.float32)\n"
        "kernel = get_kernel('onednn')\n"
        "handle = kernel.prepare(w)\n"
        "for _ in range(5): y = kernel.expert(handle, x)\n"
        "assert handle.is_packed and kernel.describe()['library'].startswith('oneDNN 3.')\n"
        "g, u, d = (torch.tensor(a) for a in (w.gate_up[:24], w.gate_up[24:], w.down))\n"
        "t = torch.tensor(x)\n"
        "want = ((torch.nn.functional.silu(t @ g.T) * (t @ u.T)) @ d.T).numpy()\n"
        "assert np.abs(y - want).max() < 1e-5 * np.abs(want).max()\n"
    )
    for first in ("torch", "hybrimoe_jax.host_kernels.onednn"):
        subprocess.run([sys.executable, "-c", program.format(first=first)], check=True, timeout=120)
