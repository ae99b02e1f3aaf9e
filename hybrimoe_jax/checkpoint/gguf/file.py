"""GGUF files: llama.cpp's tensors under the names of the original checkpoint.

They are read through PyPI's `gguf` (the extra `gguf`).

    Q4_0   blocks of 32 inputs: float16 d, 16 bytes; input j in the low half of byte j,
           input j + 16 in its high half; w = d * (q - 8)
    Q8_0   blocks of 32 inputs: float16 d, 32 int8; w = d * q

Routed experts may be Q4_0, Q8_0 (packed exactly as int4-g32 and int8-g32), F16, BF16 or F32; dense tensors any type
that `gguf` can dequantise. llama.cpp's converter changed some tensors, which is undone here: it permutes the rows of q
and k of `llama` models for its form of the rotary embedding, and splits DeepSeek's `kv_b_proj` into keys (transposed)
and values. The vocabulary in the file is not read.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hybrimoe_jax.checkpoint.gguf.config import hf_config
from hybrimoe_jax.checkpoint.gguf.header import Place, read_gguf
from hybrimoe_jax.checkpoint.hugging_face import match_names
from hybrimoe_jax.checkpoint.quantised.codes import F32, Codes, Kind, QuantisedTensor
from hybrimoe_jax.checkpoint.weights import ArrayTensor, Tensor, Weights, by_new_name
from hybrimoe_jax.errors import UserError, reading, shown_name
from hybrimoe_jax.formats.plain import BF16
from hybrimoe_jax.models.config import ModelConfig
from hybrimoe_jax.models.registry import family_of, parse_config

BLOCK = 32
BLOCK_BYTES = {"Q4_0": 18, "Q8_0": 34}
FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": BF16}
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "{block}.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.{shared}.gate_proj",
    "ffn_up_shexp": "mlp.{shared}.up_proj",
    "ffn_down_shexp": "mlp.{shared}.down_proj",
}
"""Below `blk.N.` -> below `model.layers.N.`."""
EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
"""Below `blk.N.`, the stacks of all experts' matrices."""


@dataclasses.dataclass(frozen=True)
class BlockTensor(QuantisedTensor):
    """A Q4_0 or Q8_0 matrix [R, K]: `data` uint8 [R, K / 32 * bytes of a block], in the file."""

    data: np.ndarray
    type: str
    place: str

    @property
    def where(self) -> str:
        return self.place

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.data), self.data.shape[1] // BLOCK_BYTES[self.type] * BLOCK

    @property
    def kind(self) -> Kind:
        return Kind(4 if self.type == "Q4_0" else 8, BLOCK, False, "f16")

    def group_of(self) -> np.ndarray:
        return np.arange(self.shape[1]) // BLOCK

    def codes(self) -> Codes:
        blocks = np.array(self.data).reshape(len(self.data), -1, BLOCK_BYTES[self.type])
        scales = np.ascontiguousarray(blocks[:, :, :2]).view("<f2")[:, :, 0].astype(np.float32)
        body = blocks[:, :, 2:]
        if self.type == "Q4_0":
            codes = np.concatenate([body & 15, body >> 4], axis=2)
        else:
            codes = np.ascontiguousarray(body).view(np.int8)
        return Codes(codes.reshape(self.shape), scales, None, self.group_of())


@dataclasses.dataclass(frozen=True)
class OtherTensor:
    """A matrix [R, K] of another type: floats as they are, everything else as the float32 values that `gguf` gives."""

    data: np.ndarray
    type: str
    shape: tuple[int, ...]
    where: str

    @property
    def dtype(self) -> np.dtype:
        return FLOATS.get(self.type, np.dtype(np.float32))

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        rows = np.array(self.data[start:stop])
        if self.type in FLOATS:
            return rows.view(self.dtype)
        import gguf

        return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[self.type])


@dataclasses.dataclass(frozen=True)
class DerivedTensor:
    """A tensor that is made of stored ones whenever it is read."""

    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]
    dtype: np.dtype

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        return np.ascontiguousarray(self.make()[start:stop])


def open_gguf(path: str | Path) -> Weights:
    """Opens a GGUF file; its data stay in the file until they are read.

    Raises UserError where the extra `gguf` is not installed, the file is damaged, and for architectures,
    types and tensors that are not supported.
    """
    path = Path(path)
    try:
        import gguf
    except ImportError:
        raise UserError(f"{path}: reading GGUF needs the extra: pip install 'hybrimoe-jax[gguf]'") from None
    types = {kind.value: (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    fields, places = read_gguf(path, types)
    with reading(f"{path}: its metadata"):
        raw = hf_config(fields, {name: place.shape for name, place in places.items()}, path)
    config = parse_config(raw)
    data = np.memmap(path, np.uint8, "r")
    stored = {name: Stored(path, name, place, data) for name, place in places.items()}
    tensors = original(config, fields["general.architecture"], stored)
    status = path.stat()
    files = {path.name: [status.st_size, status.st_mtime_ns]}
    return Weights(config, raw, match_names(config, tensors, path), path, files)


class Stored(NamedTuple):
    """A tensor of the file, and the file's bytes."""

    path: Path
    name: str
    place: Place
    file: np.ndarray

    def matrices(self) -> np.ndarray:
        """Its bytes, uint8 [..., bytes of a row]."""
        _, shape, offset, nbytes = self.place
        return self.file[offset : offset + nbytes].reshape(*shape[:-1], -1)


def original(config: ModelConfig, arch: str, stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    """Every tensor under its original name.

    Names that are not known stay as they are, and are then refused with the others. UserError where two stand for one.
    """
    path = next(iter(stored.values())).path
    return by_new_name(named(config, arch, stored), path)


def named(config: ModelConfig, arch: str, stored: Mapping[str, Stored]) -> Iterator[tuple[str, str, Tensor]]:
    """(the original name, the file's, the tensor) of each."""
    family = family_of(config.model_type)
    words = {"block": family.block, "shared": "shared_expert" if arch == "qwen2moe" else "shared_experts"}
    for name, tensor in stored.items():
        stem, _, part = name.rpartition(".")
        match = re.fullmatch(r"blk\.(0|[1-9][0-9]*)\.(.+)", stem)
        if match is None:
            foreign = name.startswith(("model.", "lm_head."))  # as in the original, where it may mean another layout
            new = f"{OUTER[stem]}.{part}" if stem in OUTER else f"{name} (no name of a GGUF file)" if foreign else name
            yield new, name, plain(tensor)
            continue
        layer, inner = int(match[1]), match[2]
        if inner in EXPERTS and part == "weight":
            for e, matrix in enumerate(expert_matrices(tensor)):
                yield family.expert_names(layer, e)[EXPERTS.index(inner)], name, matrix
        elif arch == "deepseek2" and inner in ("attn_k_b", "attn_v_b") and part == "weight":
            keys, values = (stored.get(f"blk.{layer}.{n}.weight") for n in ("attn_k_b", "attn_v_b"))
            if (
                keys is not None
                and values is not None
                and tensor is keys
                and f"blk.{layer}.attn_kv_b.weight" not in stored
            ):
                yield f"model.layers.{layer}.self_attn.kv_b_proj.weight", name, joined_kv(config, keys, values)
        elif inner in LAYER:
            made = plain(tensor)
            if inner == "ffn_gate_inp_shexp":
                made = ArrayTensor(made.read().reshape(1, -1))  # stored as a vector
            elif arch == "llama" and inner in ("attn_q", "attn_k"):
                heads = config.num_attention_heads if inner == "attn_q" else config.kv_heads
                made = halves_first(made, heads)
            yield f"model.layers.{layer}.{LAYER[inner].format(**words)}.{part}", name, made
        else:
            yield name, name, plain(tensor)


def plain(tensor: Stored) -> Tensor:
    """A dense tensor of any number of axes; UserError for a type that `gguf` cannot dequantise."""
    kind, shape = tensor.place.kind, tensor.place.shape
    if kind not in BLOCK_BYTES and kind not in FLOATS and not dequantisable(kind):
        raise UserError(f"{tensor.path}: {shown_name(tensor.name)} is {kind}, which holds no weights")
    rows = math.prod(shape[:-1])
    where = f"{tensor.path}: {tensor.name}"
    matrix = wrapped(tensor.matrices().reshape(rows, -1), kind, (rows, shape[-1]), where)
    if len(shape) == 2:
        return matrix
    return DerivedTensor(shape, lambda: matrix.read().reshape(shape), matrix.dtype)


def wrapped(data: np.ndarray, kind: str, shape: tuple[int, ...], where: str) -> Tensor:
    if kind in BLOCK_BYTES:
        return BlockTensor(data, kind, where)
    return OtherTensor(data, kind, shape, where)


@functools.cache
def dequantisable(kind: str) -> bool:
    """Whether `gguf` expands blocks of this type."""
    import gguf

    quantised = gguf.GGMLQuantizationType[kind]
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[quantised][1]), np.uint8), quantised)
    except NotImplementedError:
        return False
    return True


def expert_matrices(tensor: Stored) -> list[Tensor]:
    """The matrices of a stack [E, R, K]; UserError for a type that routed experts may not have."""
    kind, shape = tensor.place.kind, tensor.place.shape
    if len(shape) != 3:
        raise UserError(f"{tensor.path}: {tensor.name} is {list(shape)}; experts are a stack of matrices")
    if kind not in BLOCK_BYTES and kind not in FLOATS:
        raise UserError(
            f"{tensor.path}: {tensor.name} is {kind}; routed experts in {', '.join([*BLOCK_BYTES, *FLOATS])} are "
            "supported: quantise the model to Q4_0 or Q8_0 without mixing types (llama-quantize --pure)"
        )
    where = f"{tensor.path}: {tensor.name}"
    return [wrapped(matrix, kind, shape[1:], f"{where} [{e}]") for e, matrix in enumerate(tensor.matrices())]


def halves_first(tensor: Tensor, heads: int) -> Tensor:
    """Rows of a head as rotary halves again, where llama.cpp has pairs.

    Its row 2i + j of a head is row j * d / 2 + i.
    """

    def make() -> np.ndarray:
        array = tensor.read()
        pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
        return pairs.swapaxes(1, 2).reshape(array.shape)

    return DerivedTensor(tensor.shape, make, tensor.dtype)


def joined_kv(config: Any, keys: Stored, values: Stored) -> Tensor:
    """`keys` [H, r, n] and values [H, v, r] -> `kv_b_proj` [H * (n + v), r]; UserError where they have other shapes."""
    heads, latent = config.num_attention_heads, config.kv_lora_rank
    shapes = (heads, latent, config.qk_nope_head_dim), (heads, config.v_head_dim, latent)
    for tensor, shape in zip((keys, values), shapes):
        if tensor.place.shape != shape:
            raise UserError(f"{tensor.path}: {tensor.name} is {list(tensor.place.shape)}, not {list(shape)}")
    first, second = plain(keys), plain(values)

    def make() -> np.ndarray:
        return np.concatenate([first.read().swapaxes(1, 2), second.read()], axis=1).reshape(-1, latent).astype(F32)

    return DerivedTensor((heads * (shapes[0][2] + config.v_head_dim), latent), make, F32)
