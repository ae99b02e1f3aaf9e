"""Small files in the public layouts, written from random routing, and where the real ones are."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest

from hybrimoe_jax.trace.facts import MODELS

DATA = Path(os.environ.get("HYBRIMOE_DATA") or Path(__file__).parents[2] / "shared" / "data")
ESFT, GPT_OSS = MODELS["DeepSeek-V2-Lite"], MODELS["gpt-oss-20b"]


def shared(path: str) -> Path:
    """A real trace; skips the test where the data is not there."""
    if not (DATA / path).exists():
        pytest.skip(f"no {path} in HYBRIMOE_DATA or ../shared/data")
    return DATA / path


def routing(facts, tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(ids, weights in whole ten-thousandths), both [tokens, layers, k]."""
    rng = np.random.default_rng(seed)
    ids = rng.random((tokens, facts.layers, facts.experts)).argsort(axis=2)[:, :, : facts.top_k]
    return ids, rng.integers(1, 2000, ids.shape)


def esft_folder(folder: Path, ids, weights, lengths) -> Path:
    folder.mkdir()
    ends = np.cumsum(lengths)
    for layer in range(ids.shape[1]):
        lines = []
        for begin, end in zip(ends - lengths, ends):
            one = "\t".join(map(str, ids[begin:end, layer].ravel().tolist()))
            other = "\t".join(f"{w / 1e4:g}" for w in weights[begin:end, layer].ravel().tolist())
            lines.append(f"{one}\t\t{other}\n")
        (folder / f"expert_weights_{layer + 1}.txt").write_text("".join(lines))
    return folder


def fingerprint(ids, probs, first: int) -> dict:
    return {
        "dataset": "d",
        "router_data": [
            {
                f"token_{first + i}": {
                    f"layer_{layer}": {"selected_experts": e.tolist(), "selected_probs": p.tolist()}
                    for layer, (e, p) in enumerate(zip(*step))
                }
            }
            for i, step in enumerate(zip(ids, probs))
        ],
    }


def fingerprint_json(path: Path, ids, probs, first: int = 7) -> Path:
    path.write_text(json.dumps(fingerprint(ids, probs, first), indent=2))
    return path


def route_csv(path: Path, prompt: int = 3, decode: int = 4, layers: int = 5, experts: int = 16, k: int = 2) -> Path:
    """As that engine writes it: prompt tokens layer by layer, the last layer at the last of them only."""
    rng = np.random.default_rng(1)
    lines = [
        "# route_trace v1",
        f"# model=/data/m.gguf arch=qwen3moe n_layer={layers} n_expert={experts} n_expert_used={k}",
    ]
    lines += [f"# layer={layer} expert_bytes={1000 + layer} dense_bytes=5" for layer in range(layers)]
    lines.append("turn,phase,step,layer,slot,expert,weight,residency,expert_bytes")

    def record(phase, step, layer):
        for slot, expert in enumerate(rng.permutation(experts)[:k].tolist()):
            lines.append(f"0,{phase},{step},{layer},{slot},{expert},{0.5 / (slot + 1):.6g},{slot % 2},1000")

    for layer in range(layers):
        for step in range(prompt):
            if layer < layers - 1 or step == prompt - 1:
                record(0, step, layer)
    for step in range(prompt, prompt + decode):
        for layer in range(layers):
            record(1, step, layer)
    text = "\n".join(lines) + "\n"
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path
