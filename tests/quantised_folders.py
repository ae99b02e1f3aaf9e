"""Writers of quantised folders, from the formats' public descriptions and with plain loops: GPTQ, AWQ,
compressed-tensors.

The model is a Qwen2-MoE of 2 layers, 4 experts, D 128, F 64. Every expert matrix, and the attention projections, are
quantised.
"""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

CONFIG = {
    "model_type": "qwen2_moe",
    "vocab_size": 24,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "intermediate_size": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}


def shapes(config=CONFIG) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, int]]]:
    """Shapes of what stays float, by tensor name, and of what is quantised, by module name."""
    width, hidden, vocab = config["hidden_size"], config["moe_intermediate_size"], config["vocab_size"]
    plain = {
        "model.embed_tokens.weight": (vocab, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (vocab, width),
    }
    coded = {}
    for i in range(config["num_hidden_layers"]):
        base = f"model.layers.{i}."
        plain |= {f"{base}{n}.weight": (width,) for n in ("input_layernorm", "post_attention_layernorm")}
        for name, rows in (("q", width), ("k", width // 2), ("v", width // 2)):
            coded[f"{base}self_attn.{name}_proj"] = (rows, width)
            plain[f"{base}self_attn.{name}_proj.bias"] = (rows,)
        coded[f"{base}self_attn.o_proj"] = (width, width)
        plain[f"{base}mlp.gate.weight"] = (config["num_experts"], width)
        plain[f"{base}mlp.shared_expert_gate.weight"] = (1, width)
        blocks = [f"{base}mlp.shared_expert", *(f"{base}mlp.experts.{e}" for e in range(config["num_experts"]))]
        for block in blocks:
            coded |= {f"{block}.gate_proj": (hidden, width), f"{block}.up_proj": (hidden, width)}
            coded[f"{block}.down_proj"] = (width, hidden)
    return plain, coded


def words(fields: np.ndarray, bits: int, order=None) -> np.ndarray:
    """[n, k] unsigned fields -> [n, k * bits / 32] int32, neighbours of the last axis in one word."""
    per = 32 // bits
    out = np.zeros((fields.shape[0], -(-fields.shape[1] // per)), np.uint32)
    for column in range(fields.shape[1]):
        word, place = divmod(column, per)
        if order is not None:
            place = list(order).index(place)
        out[:, word] |= fields[:, column].astype(np.uint32) << np.uint32(place * bits)
    return out.view(np.int32)


class Coded:
    """A random quantised matrix: unsigned `codes` [R, K], `scales` [R, N], `zeros` [R, N], `group_of` [K]."""

    def __init__(self, rng, rows, columns, group, bits=4, symmetric=False, scale=np.float16, group_of=None, least=1):
        count = -(-columns // group)
        self.bits = bits
        self.group_of = np.arange(columns) // group if group_of is None else group_of
        self.codes = rng.integers(1 if bits == 8 else 0, 2**bits, (rows, columns))
        self.scales = (rng.uniform(0.5, 1.5, (rows, count)) * 2 / 2**bits / columns**0.5).astype(scale)
        middle = np.full((rows, count), 2 ** (bits - 1))
        self.zeros = middle if symmetric else rng.integers(least, 2**bits, (rows, count))
        self.symmetric = symmetric

    def values(self) -> np.ndarray:
        out = np.zeros(self.codes.shape, np.float32)
        for k, n in enumerate(self.group_of):
            out[:, k] = self.scales[:, n].astype(np.float32) * (self.codes[:, k] - self.zeros[:, n]).astype(np.float32)
        return out

    def gptq(self, version: int = 1) -> dict[str, np.ndarray]:
        zeros = words(self.zeros.T, self.bits) if version == 2 else self._less_one()
        return {
            "qweight": words(self.codes, self.bits).T,
            "qzeros": zeros,
            "scales": self.scales.T,
            "g_idx": self.group_of.astype(np.int32),
        }

    def _less_one(self) -> np.ndarray:
        less = sum(1 << at for at in range(0, 32, self.bits))
        plain = words(self.zeros.T, self.bits).view(np.uint32).astype(np.int64)
        return ((plain - less) & 0xFFFFFFFF).astype(np.uint32).view(np.int32)

    def awq(self) -> dict[str, np.ndarray]:
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        return {
            "qweight": words(self.codes.T, 4, order),
            "qzeros": words(self.zeros.T, 4, order),
            "scales": self.scales.T,
        }

    def compressed(self, act_order: bool = False) -> dict[str, np.ndarray]:
        parts = {
            "weight_packed": words(self.codes, self.bits),
            "weight_scale": self.scales,
            "weight_shape": np.array(self.codes.shape, np.int64),
        }
        if not self.symmetric:
            parts["weight_zero_point"] = words(self.zeros.T, self.bits).T
        if act_order:
            parts["weight_g_idx"] = self.group_of.astype(np.int32)
        return parts


SETTINGS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False},
            }
        },
        "ignore": ["lm_head"],
    },
}


def write(folder: Path, method: str, encode=None, make=None, settings=(), seed: int = 0, config=CONFIG):
    """Writes the folder; returns {tensor name: float32 values} of the model it stands for and {module: Coded}.

    `make(rng, module, rows, columns)` draws a matrix, `encode(coded)` gives its stored parts.
    """
    rng = np.random.default_rng(seed)
    plain, coded = shapes(config)
    values = {}
    for name, shape in plain.items():
        drawn = rng.standard_normal(shape).astype(np.float32)
        values[name] = 1 + 0.1 * drawn if "norm" in name else drawn * (0.2 if "bias" in name else 1)
    stored = dict(values)
    make = make or (lambda rng, module, rows, columns: Coded(rng, rows, columns, 32))
    encode = encode or {"gptq": Coded.gptq, "awq": Coded.awq, "compressed-tensors": Coded.compressed}[method]
    matrices = {}
    for module, shape in coded.items():
        matrices[module] = made = make(rng, module, *shape)
        values[f"{module}.weight"] = made.values()
        stored |= {f"{module}.{part}": np.ascontiguousarray(array) for part, array in encode(made).items()}
    folder.mkdir(parents=True)
    raw = {**config, "quantization_config": {**SETTINGS[method], **dict(settings)}}
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    return values, matrices


def write_plain(folder: Path, values: dict[str, np.ndarray], config=CONFIG) -> Path:
    """The same model unquantised, float32."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({n: np.ascontiguousarray(a) for n, a in values.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


BF16 = ml_dtypes.bfloat16


def coded(**options):
    group = options.pop("group", 32)
    return lambda rng, module, rows, columns: Coded(rng, rows, columns, group, **options)


def symmetric_bits(bits):
    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


def unlisted(method):
    """A matrix's parts without the list that says which group an input is in."""
    encode = {"gptq": Coded.gptq, "compressed-tensors": Coded.compressed}[method]
    return lambda made: {part: array for part, array in encode(made).items() if part != "g_idx"}


def grouped_by(method, size):
    if method == "gptq":
        return {"group_size": size}
    scheme = {"group_size": size, "strategy": "group"} if size != -1 else {"strategy": "channel"}
    return {"config_groups": {"g": {"weights": {"num_bits": 4, "type": "int", **scheme}}}}


def parts(encoded: dict, **changed) -> dict:
    """The stored parts of a matrix, some of another type (a dtype), or left out (None)."""
    kept = {name: array for name, array in encoded.items() if changed.get(name, array) is not None}
    return {name: array.astype(changed.get(name, array.dtype)) for name, array in kept.items()}
