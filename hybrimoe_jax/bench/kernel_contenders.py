"""Contenders of `bench kernels`: ours per weight format, and the peers that are installed.

All compute the same SwiGLU expert.

Shapes: D model width, F expert width, n load. A contender holds `count` experts, enough that
going round them reads weights from memory, and `run(index, x)` computes x [n, D] through one of
them, on as many threads as `set_threads` said.
"""

from __future__ import annotations

import abc
import dataclasses
import warnings
from collections.abc import Iterator
from importlib.util import find_spec

import numpy as np

from hybrimoe_jax.bench import ggml_peer
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.packing import ExpertLayout, Format, PackedExpert, pack_expert
from hybrimoe_jax.formats.plain import BF16, F32, Arena, ExpertWeights, aligned_copy, aligned_empty

PEERS = ("ggml", "torch", "onednn", "numpy")
MIN_BYTES = 160 << 20
"""Experts of one contender take at least this much, several times a last-level cache, and are at least two."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """An expert's sizes: `width` of the model, `hidden` of the expert."""

    name: str
    width: int
    hidden: int

    @property
    def weights(self) -> int:
        return 3 * self.width * self.hidden

    def flops(self, load: int) -> int:
        return 2 * self.weights * load


SHAPES = (Shape("mixtral", 4096, 14336), Shape("qwen2-57b", 3584, 2560), Shape("deepseek-v2-lite", 2048, 1408))


class Contender(abc.ABC):
    """`name`: library and format; `nbytes`: an expert's weights."""

    name: str
    nbytes: int
    count: int

    @abc.abstractmethod
    def set_threads(self, threads: int) -> None: ...

    @abc.abstractmethod
    def run(self, index: int, x: np.ndarray) -> np.ndarray | None: ...

    def close(self) -> None:
        return None


def count_of(nbytes: int) -> int:
    return max(2, -(-MIN_BYTES // nbytes))


class Weights:
    """Random experts of a shape in float32, shared by the contenders that can; one expert where all have the same."""

    def __init__(self, shape: Shape):
        self.shape = shape
        rng = np.random.default_rng(0)
        block = rng.standard_normal(1 << 20, np.float32) * np.float32(shape.width**-0.5)
        sizes = ((2 * shape.hidden, shape.width), (shape.width, shape.hidden))
        self.one = ExpertWeights(*(aligned_copy(np.resize(block, size)) for size in sizes))
        self._all: list[ExpertWeights] = []

    @property
    def matrices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        gate_up, down = self.one
        return gate_up[: self.shape.hidden], gate_up[self.shape.hidden :], down

    def copies(self, dtype: np.dtype) -> list[ExpertWeights]:
        if dtype == F32 and self._all:
            return self._all
        count, arena = count_of(self.shape.weights * dtype.itemsize), Arena()  # as the engine's store
        made = [ExpertWeights(*(aligned_copy(w, dtype, arena) for w in self.one)) for _ in range(count)]
        if dtype == F32:
            self._all = made
        return made


class Kernel(Contender):
    """One of our host kernels on experts that it takes."""

    def __init__(self, name: str, kernel, experts: list):
        self.name, self._kernel = name, kernel
        self.nbytes, self.count = experts[0].nbytes, len(experts)
        self._handles = [kernel.prepare(expert) for expert in experts]
        self._out: dict[int, np.ndarray] = {}
        self._width = experts[0].width

    def set_threads(self, threads: int) -> None:
        self._kernel.threads = threads
        self._kernel.set_threads(threads)

    def run(self, index: int, x: np.ndarray) -> np.ndarray:
        if len(x) not in self._out:
            self._out[len(x)] = aligned_empty((len(x), self._width))
        return self._kernel.expert(self._handles[index], x, self._out[len(x)])


def native(format: str, weights: Weights) -> Contender:
    from hybrimoe_jax.host_kernels.native.kernel import NativeKernel

    if format in ("f32", "bf16"):
        return Kernel(f"native {format}", NativeKernel(), weights.copies(F32 if format == "f32" else BF16))
    layout = ExpertLayout(Format.parse(format), weights.shape.width, weights.shape.hidden)
    one = pack_expert(*weights.matrices, layout.format)
    arena = Arena()
    experts = [PackedExpert(aligned_copy(one.data, arena=arena), layout) for _ in range(count_of(layout.nbytes))]
    return Kernel(f"native {format}", NativeKernel(), experts)


def numpy_peer(weights: Weights) -> Iterator[Contender]:
    from hybrimoe_jax.host_kernels.reference import ReferenceKernel

    class Numpy(Kernel):
        def set_threads(self, threads: int) -> None:
            from threadpoolctl import threadpool_limits

            self._limits = threadpool_limits(threads, user_api="blas")

        def close(self) -> None:
            self._limits.restore_original_limits()

    yield Numpy("numpy f32", ReferenceKernel(), weights.copies(F32))


def onednn_peer(weights: Weights) -> Iterator[Contender]:
    from hybrimoe_jax.host_kernels.onednn import OneDnnKernel

    kernel = OneDnnKernel(pack_limit=1 << 40)
    made = Kernel("onednn f32 packed", kernel, weights.copies(F32))
    for handle in made._handles:
        kernel.pack(handle)
    yield made


class Ggml(Contender):
    """llama.cpp's kernels on one of its types, `repack`: laid out anew for this processor."""

    def __init__(self, type: str, repack: bool, weights: Weights):
        self.name = f"ggml {type}{' repacked' if repack else ''}"
        self.nbytes = int(weights.shape.weights * ggml_peer.BITS[type] / 8)
        self.count = count_of(self.nbytes)
        self._experts = ggml_peer.GgmlExperts(type, repack, weights.matrices, self.count)

    def set_threads(self, threads: int) -> None:
        self._experts.set_threads(threads)

    def run(self, index: int, x: np.ndarray) -> np.ndarray:
        self._experts.run(index, x)
        return self._experts.read(len(x))

    def close(self) -> None:
        self._experts.close()


def ggml_contenders(weights: Weights) -> Iterator[Contender]:
    for type in ("q4_0", "q8_0"):
        yield Ggml(type, False, weights)
        if ggml_peer.repacks(type):
            yield Ggml(type, True, weights)


class Torch(Contender):
    """`quantize_dynamic` Linear layers: int8 weights per row, activations quantised per call."""

    name = "torch int8 dynamic"

    def __init__(self, weights: Weights):
        import torch

        class Expert(torch.nn.Module):
            def __init__(self, matrices):
                super().__init__()
                self.gate, self.up, self.down = (torch.nn.Linear(*m.shape[::-1], bias=False) for m in matrices)
                for layer, m in zip((self.gate, self.up, self.down), matrices):
                    layer.weight = torch.nn.Parameter(torch.from_numpy(m), requires_grad=False)

            def forward(self, x):
                return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))

        self._torch = torch
        torch.backends.quantized.engine = "x86" if "x86" in torch.backends.quantized.supported_engines else "fbgemm"
        self.nbytes = weights.shape.weights
        self.count = count_of(self.nbytes)
        quantization = torch.ao.quantization
        spec = {torch.nn.Linear: quantization.qconfig.per_channel_dynamic_qconfig}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._experts = [quantization.quantize_dynamic(Expert(weights.matrices), spec) for _ in range(self.count)]

    def set_threads(self, threads: int) -> None:
        self._torch.set_num_threads(threads)

    def run(self, index: int, x: np.ndarray) -> np.ndarray:
        with self._torch.inference_mode():
            return self._experts[index](self._torch.from_numpy(x)).numpy()


def torch_contenders(weights: Weights) -> Iterator[Contender]:
    if find_spec("torch") is None:
        raise UserError("torch is not installed")
    yield Torch(weights)


def peers_of(peer: str, weights: Weights) -> Iterator[Contender]:
    """Raises UserError, which says why, where the peer is absent."""
    makers = {"ggml": ggml_contenders, "torch": torch_contenders, "onednn": onednn_peer, "numpy": numpy_peer}
    return makers[peer](weights)
