"""Public routing traces, layout by layout. T tokens, L MoE layers, k experts per token.

* **ESFT expert scores** (deepseek-ai/ESFT, `results/expert_scores/<task>/expert_weights_<layer>.txt`): DeepSeek-V2-Lite
  reading task prompts. A file is a MoE layer (numbered from 1), a line a sequence: k ids for every token,
  tab-separated, two tabs, as many weights. As `.npz`: `expert_ids` [T, L, k], `weights_e4` [T, L, k] (weights times
  10,000), `seq_lens`.
* **gpt-oss fingerprints** (AmanPriyanshu/GPT-OSS-MoE-ExpertFingerprinting, `data/<dataset>/<subject>/*_examples.json`):
  one generated reply; `router_data` is a list of `{"token_<position>": {"layer_<l>": {"selected_experts",
  "selected_probs"}}}`. As `.npz`: `expert_ids`, `probs` [T, L, k], `seq_lens`; a `meta.jsonl` beside it, where there is
  one, tells how long the prompts were.

The third layout is in `route_csv`. Each function returns a `Trace` whose rows are still to be checked. `where` begins
every error.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from hybrimoe_jax.encoding import read_text
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.trace.check import LARGEST
from hybrimoe_jax.trace.columns import Trace
from hybrimoe_jax.trace.facts import MODELS, TraceFacts

ESFT_ARRAYS = {"expert_ids", "weights_e4", "seq_lens"}
FINGERPRINT_ARRAYS = {"expert_ids", "probs", "seq_lens"}
PREFILL, DECODE = 0, 1


def esft_folder(path: Path, where: str) -> Trace:
    """A folder of ESFT text files, one for each MoE layer."""
    numbers = {}
    for file in path.glob("expert_weights_*.txt"):
        if match := re.fullmatch(r"expert_weights_(\d+)\.txt", file.name):
            numbers[int(match[1])] = file
    if not numbers:
        raise UserError(f"{where}: a folder without expert_weights_<layer>.txt files")
    layers = MODELS["DeepSeek-V2-Lite"].layers
    missing = [n for n in range(1, layers + 1) if n not in numbers]
    if missing or len(numbers) != layers:
        said = f"lacks expert_weights_{missing[0]}.txt" if missing else f"has {len(numbers)} layers"
        raise UserError(f"{where}: {said}; {layers} MoE layers numbered from 1 are needed")
    parsed = [_esft_layer(numbers[n], where) for n in sorted(numbers)]
    lengths = [[len(ids) for ids, _ in layer] for layer in parsed]
    for number, found in enumerate(lengths[1:], 2):
        if found != lengths[0]:
            raise UserError(f"{where}: expert_weights_{number}.txt has other sequences than expert_weights_1.txt")
    ids = np.stack([np.concatenate([ids for ids, _ in layer]) for layer in parsed], axis=1)
    weights = np.stack([np.concatenate([weights for _, weights in layer]) for layer in parsed], axis=1)
    return _whole_prompts(MODELS["DeepSeek-V2-Lite"], ids, weights, np.array(lengths[0]), path.name)


def _esft_layer(file: Path, where: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, weights), both [tokens, k], of every line."""
    top_k = MODELS["DeepSeek-V2-Lite"].top_k
    lines = whole_lines(read_text(file, f"{where}: {file.name}"), f"{where}: {file.name}")
    found = []
    for number, line in enumerate(lines, 1):
        ids, both, weights = line.partition("\t\t")
        try:
            if not both:
                raise ValueError("no two tabs between ids and weights")
            one = np.array(ids.split("\t"), np.int64)
            other = np.array(weights.split("\t"), np.float32)
            if len(one) != len(other) or len(one) % top_k:
                raise ValueError(f"{len(one)} ids and {len(other)} weights, not {top_k} of each a token")
        except (ValueError, OverflowError) as error:
            raise UserError(f"{where}: {file.name}, line {number}: {error}") from None
        found.append((one.reshape(-1, top_k), other.reshape(-1, top_k)))
    return found


def whole_lines(text: str, where: str) -> list[str]:
    """A text's lines; refused where the last one does not end: numbers cut short are numbers too."""
    if not text.endswith("\n"):
        raise UserError(f"{where}: its last line does not end; the file is truncated")
    return text.splitlines()


def esft_arrays(arrays: dict[str, np.ndarray], path: Path, where: str) -> Trace:
    """The `.npz` form of an ESFT task."""
    facts = MODELS["DeepSeek-V2-Lite"]
    ids, lengths = _table(arrays, "weights_e4", facts, where)
    if arrays["weights_e4"].dtype.kind not in "iu":
        raise UserError(f"{where}: array weights_e4 holds {arrays['weights_e4'].dtype}; integers are needed")
    weights = arrays["weights_e4"].astype(np.float32) / 1e4
    return _whole_prompts(facts, ids, weights, lengths, path.name)


def _whole_prompts(facts: TraceFacts, ids: np.ndarray, weights: np.ndarray, lengths: np.ndarray, name: str) -> Trace:
    """Every sequence as one prefill step: rows by (sequence, layer, position)."""
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    position = places_of(lengths)
    tokens, layers = ids.shape[:2]
    order = np.lexsort(
        (np.tile(np.arange(tokens), layers), np.repeat(np.arange(layers), tokens), np.tile(sequence, layers))
    )

    def rows(array: np.ndarray) -> np.ndarray:
        return array.swapaxes(0, 1).reshape(tokens * layers, -1)[order]

    by_layer = np.tile(sequence, layers)[order].astype(np.int32)
    return Trace(
        facts,
        step=by_layer,
        layer=np.repeat(np.arange(layers, dtype=np.int32), tokens)[order],
        phase=np.full(tokens * layers, PREFILL, np.uint8),
        sequence=by_layer.copy(),
        position=np.tile(position, layers)[order].astype(np.int32),
        ids=rows(ids).astype(np.int64),
        weights=rows(weights),
        about={"source": "ESFT expert scores", "model": "DeepSeek-V2-Lite", "file": name},
    )


def fingerprint_arrays(arrays: dict[str, np.ndarray], path: Path, where: str) -> Trace:
    """The `.npz` form of gpt-oss fingerprints: decode steps of batch 1."""
    model = _gpt_oss(arrays["expert_ids"], where)
    ids, lengths = _table(arrays, "probs", MODELS[model], where)
    probs = arrays["probs"]
    if probs.dtype.kind != "f":
        raise UserError(f"{where}: array probs holds {probs.dtype}; floats are needed")
    about = {"source": "gpt-oss fingerprints", "model": model, "file": path.name}
    prompts = _prompt_lengths(path.with_name("meta.jsonl"), lengths)
    if prompts is None:
        about["positions"] = "counted from the first decoded token"
    return _token_steps(MODELS[model], ids, probs.astype(np.float32), lengths, prompts, about)


def _prompt_lengths(path: Path, lengths: np.ndarray) -> np.ndarray | None:
    """Tokens of every sequence's prompt, from the `meta.jsonl` beside the arrays; None where there is none."""
    if not path.is_file():
        return None
    try:
        lines = [json.loads(line) for line in read_text(path).split("\n") if line]
        told = [line["n_prompt_tokens"] for line in lines]
        if not all(type(count) is int for count in told):
            raise ValueError("n_prompt_tokens is a whole number")
        prompts = np.array(told, np.int64)
        steps = [line["n_decode_steps"] for line in lines]
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: not a line of JSON for every sequence ({error})") from None
    if steps != lengths.tolist() or prompts.min(initial=0) < 0 or (prompts + lengths).max(initial=0) > LARGEST:
        raise UserError(f"{path}: its sequences are not those of the arrays beside it; remove the one that is wrong")
    return prompts


def fingerprint_json(text: str, path: Path, where: str) -> Trace:
    """One reply's fingerprint, or a list of them."""
    try:
        read = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not whole JSON ({error})") from None
    if read == []:
        raise UserError(f"{where}: an empty list, no reply in it")
    ids, probs, lengths, prompts = [], [], [], []
    for number, reply in enumerate(read if isinstance(read, list) else [read]):
        steps = reply.get("router_data") if isinstance(reply, dict) else None
        if not isinstance(steps, list) or not steps:
            raise UserError(f"{where}: reply {number} has no `router_data`; give a *_examples.json file")
        chosen = [_fingerprint_step(step, f"{where}: reply {number}, step {i}") for i, step in enumerate(steps)]
        positions = [position for position, _, _ in chosen]
        if positions != list(range(positions[0], positions[0] + len(positions))):
            bad = next(i for i, p in enumerate(positions) if p != positions[0] + i)
            raise UserError(
                f"{where}: reply {number}, step {bad}: token_{positions[bad]} does not follow the one before"
            )
        prompts.append(positions[0])
        lengths.append(len(chosen))
        ids += [i for _, i, _ in chosen]
        probs += [p for _, _, p in chosen]
    if len({i.shape for i in ids}) > 1:
        raise UserError(f"{where}: its steps have different numbers of layers or experts")
    stacked = np.stack(ids)
    model = _gpt_oss(stacked, where)
    about = {"source": "gpt-oss fingerprints", "model": model, "file": path.name}
    return _token_steps(MODELS[model], stacked, np.stack(probs), np.array(lengths), np.array(prompts), about)


def _fingerprint_step(step: Any, where: str) -> tuple[int, np.ndarray, np.ndarray]:
    """(position, ids [L, k], probabilities [L, k]) of one decoded token."""
    try:
        ((name, layers),) = step.items()
        position = int(name.removeprefix("token_"))
        chosen = [layers[f"layer_{i}"] for i in range(len(layers))]
        ids = [layer["selected_experts"] for layer in chosen]
        if not 0 <= position <= LARGEST or not all(type(e) is int for row in ids for e in row):
            raise ValueError("ids and positions are whole numbers")
        probs = np.array([layer["selected_probs"] for layer in chosen], np.float32)
        table = np.array(ids, np.int64)
        if table.ndim != 2 or table.shape != probs.shape:
            raise ValueError("not the same number of experts and probabilities in each layer")
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{where}: not one token's selected_experts and selected_probs by layer ({error})") from None
    return position, table, probs


def _gpt_oss(ids: np.ndarray, where: str) -> str:
    """Which gpt-oss has so many layers."""
    shape = ids.shape[1:] if ids.ndim == 3 else None
    for name, facts in MODELS.items():
        if facts.model_type == "gpt_oss" and shape == (facts.layers, facts.top_k):
            return name
    raise UserError(f"{where}: experts of shape {list(ids.shape)}; [steps, 24 or 36 layers, 4 experts] is needed")


def _token_steps(facts, ids, weights, lengths, prompts, about) -> Trace:
    """Every token as one decode step; `prompts` [sequences], tokens before the first one of each, or None."""
    tokens, layers, top_k = ids.shape
    first = np.zeros(len(lengths), np.int64) if prompts is None else prompts

    def rows(column: np.ndarray) -> np.ndarray:
        return np.repeat(column, layers).astype(np.int32)

    return Trace(
        facts,
        step=rows(np.arange(tokens)),
        layer=np.tile(np.arange(layers, dtype=np.int32), tokens),
        phase=np.full(tokens * layers, DECODE, np.uint8),
        sequence=rows(np.repeat(np.arange(len(lengths)), lengths)),
        position=rows(places_of(lengths) + np.repeat(first, lengths)),
        ids=ids.reshape(-1, top_k).astype(np.int64),
        weights=weights.reshape(-1, top_k).astype(np.float32),
        about=about,
    )


def _table(arrays: dict[str, np.ndarray], weights: str, facts: TraceFacts, where: str) -> tuple[np.ndarray, np.ndarray]:
    """(ids, sequence lengths) of an `.npz` form, shapes checked."""
    ids, lengths = arrays["expert_ids"], arrays["seq_lens"]
    if ids.ndim != 3 or ids.shape[1:] != (facts.layers, facts.top_k) or ids.dtype.kind not in "iu":
        raise UserError(
            f"{where}: array expert_ids is {ids.dtype} {list(ids.shape)}; "
            f"integers [tokens, {facts.layers}, {facts.top_k}] are needed"
        )
    if arrays[weights].shape != ids.shape:
        raise UserError(
            f"{where}: array {weights} has shape {list(arrays[weights].shape)}, expert_ids {list(ids.shape)}"
        )
    fits = lengths.ndim == 1 and lengths.dtype.kind in "iu" and not ((lengths < 1) | (lengths > len(ids))).any()
    if not fits or lengths.sum() != len(ids):  # numbers that each fit cannot add up to more than 64 bits hold
        raise UserError(f"{where}: array seq_lens must hold positive integers that add up to {len(ids)} tokens")
    return ids, lengths.astype(np.int64)


def places_of(lengths: np.ndarray) -> np.ndarray:
    """0, 1, 2 ... within each sequence."""
    starts = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) - np.repeat(starts, lengths)
