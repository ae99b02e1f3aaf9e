"""A trace in the public layouts that `layouts` and `route_csv` read, and what each of them cannot hold.

T tokens, L MoE layers, k experts per token. All of them hold the chosen experts and their weights, one sequence after
another, and so none holds which sequences ran side by side. Each function writes a trace that is sound, and returns
what is left out, in words.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hybrimoe_jax.errors import UserError, is_name
from hybrimoe_jax.files import check_folder_to_be, replacing
from hybrimoe_jax.trace.check import LARGEST
from hybrimoe_jax.trace.columns import Trace
from hybrimoe_jax.trace.facts import MODELS, TraceFacts
from hybrimoe_jax.trace.layouts import DECODE, PREFILL, places_of
from hybrimoe_jax.trace.route_csv import ROUTE_COLUMNS
from hybrimoe_jax.trace.rows import write_lines
from hybrimoe_jax.trace.tokens import Tokens, by_token, one_token_steps

ROUTE_EXTRA = ("residency", "layer_bytes")


def esft_folder(trace: Trace, path: Path) -> list[str]:
    """A folder of `expert_weights_<layer>.txt`, which must not be there yet, or be empty."""
    check_folder_to_be(path, "the destination")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"{path}: the folder is not empty; give a new one")
    tokens, lengths = _esft_tokens(trace, path)
    path.mkdir(parents=True, exist_ok=True)
    ends = np.cumsum(lengths)
    for layer in range(trace.facts.layers):
        write_lines(path / f"expert_weights_{layer + 1}.txt", _esft_lines(tokens, layer, ends - lengths, ends))
    return _left_out(trace) + _as_prompts(trace, tokens)


def esft_arrays(trace: Trace, path: Path) -> list[str]:
    """The `.npz` form, whose weights are whole ten-thousandths."""
    tokens, lengths = _esft_tokens(trace, path)
    scaled = np.asarray(tokens.weights, np.float64) * 1e4
    whole = np.rint(scaled).astype(np.int64)
    rounded = bool((whole.astype(np.float32) / np.float32(1e4) != tokens.weights).any())
    _save(path, expert_ids=tokens.ids.astype(np.uint8), weights_e4=whole, seq_lens=lengths)
    return _left_out(trace) + _as_prompts(trace, tokens) + ["digits of weights behind the fourth"] * rounded


def fingerprint_json(trace: Trace, path: Path) -> list[str]:
    """Replies of gpt-oss, token by token; more than one as a list."""
    tokens, lengths = _replies(trace, path)
    ends = np.cumsum(lengths)
    replies = [_reply(tokens, begin, end) for begin, end in zip(ends - lengths, ends)]
    write_lines(path, [json.dumps(replies[0] if len(replies) == 1 else replies) + "\n"])
    return _left_out(trace) + _without_prompts(trace)


def fingerprint_arrays(trace: Trace, path: Path) -> list[str]:
    """The `.npz` form. Where replies do not begin at position 0, a `meta.jsonl` beside it says where."""
    tokens, lengths = _replies(trace, path)
    first = tokens.position[np.cumsum(lengths) - lengths]
    beside = path.with_name("meta.jsonl")
    if beside.exists():
        raise UserError(f"{beside}: it would be taken for this trace's; give a folder of its own")
    _save(path, expert_ids=tokens.ids.astype(np.uint8), probs=np.asarray(tokens.weights, np.float32), seq_lens=lengths)
    if first.any():
        said = ({"n_prompt_tokens": int(f), "n_decode_steps": int(n)} for f, n in zip(first, lengths))
        write_lines(beside, [json.dumps(line) + "\n" for line in said])
    return _left_out(trace) + _without_prompts(trace)


def route_csv(trace: Trace, path: Path) -> list[str]:
    """A route_trace: every token a step of its own, prompts written layer by layer."""
    tokens = _tokens(trace, f"trace for {path}", last_layer=False)
    _check_engine_facts(trace, f"trace for {path}")
    write_lines(path, _route_lines(one_token_steps(trace)))
    left = _left_out(trace, ROUTE_EXTRA) + _numbered(tokens)
    if len(np.unique(trace.step)) < len(tokens.step):
        left.append("which tokens ran in one step")
    if not np.array_equal(tokens.position, places_of(_lengths(tokens))):
        left.append("positions: they are counted from the first token of each sequence")
    if "residency" not in trace.extra:
        left.append("that residency is unknown: its column is 0 throughout")
    return left


def _check_engine_facts(trace: Trace, where: str) -> None:
    """UserError where the additions that the layout has columns for are not what it holds there."""
    for name, shape, least, most in (
        ("residency", trace.ids.shape, 0, 127),
        ("layer_bytes", (trace.facts.layers,), 1, LARGEST),
    ):
        array = trace.extra.get(name)
        if array is None:
            continue
        if array.shape != shape or array.dtype.kind not in "iu" or array.min() < least or array.max() > most:
            raise UserError(
                f"{where}: array x_{name} is {array.dtype} {list(array.shape)}; the layout has integers "
                f"{list(shape)} from {least} to {most} there: leave it out"
            )
    if max(_layer_bytes(trace), default=0) > LARGEST:
        raise UserError(f"{where}: an expert of {max(_layer_bytes(trace))} bytes; the layout holds {LARGEST} at most")


def _route_lines(trace: Trace) -> Iterator[str]:
    facts, sizes = trace.facts, _layer_bytes(trace)
    told = trace.about.get("model")
    model = str(told if is_name(told) else facts.model_type).replace(" ", "-")
    yield "# route_trace v1\n"
    yield (
        f"# model={model} arch={facts.model_type} n_layer={facts.layers} n_expert={facts.experts} "
        f"n_expert_used={facts.top_k}\n"
    )
    for layer, size in enumerate(sizes):
        yield f"# layer={layer} expert_bytes={size} dense_bytes=0\n"
    yield ROUTE_COLUMNS + "\n"
    prefill = trace.phase == PREFILL
    outer, inner = np.where(prefill, trace.layer, trace.step), np.where(prefill, trace.step, trace.layer)
    residency = trace.extra.get("residency", np.zeros_like(trace.ids))
    assert trace.weights is not None
    for row in np.lexsort((inner, outer, ~prefill, trace.sequence)).tolist():
        head = f"{trace.sequence[row]},{trace.phase[row]},{trace.position[row]},{trace.layer[row]}"
        size = sizes[trace.layer[row]] if sizes else 0
        for slot, (expert, weight) in enumerate(zip(trace.ids[row].tolist(), trace.weights[row].tolist())):
            yield f"{head},{slot},{expert},{weight:.9g},{residency[row, slot]},{size}\n"


def _layer_bytes(trace: Trace) -> list[int]:
    """An expert's bytes in each layer, as the file stored it; empty where the trace does not tell."""
    sizes = trace.extra.get("layer_bytes")
    if sizes is not None:
        return sizes.tolist()
    stored = trace.facts.expert_bytes.get("as-stored")
    return [stored] * trace.facts.layers if stored else []


def _esft_tokens(trace: Trace, path: Path) -> tuple[Tokens, np.ndarray]:
    name = "DeepSeek-V2-Lite"
    if not _alike(trace.facts, MODELS[name]):
        raise UserError(f"{path}: the ESFT layout is of {name} alone: {_shape(MODELS[name])}; {_here(trace)}")
    tokens = _tokens(trace, f"trace for {path}")
    return tokens, _lengths(tokens)


def _esft_lines(tokens: Tokens, layer: int, starts: np.ndarray, ends: np.ndarray) -> Iterator[str]:
    assert tokens.weights is not None
    ids, weights = tokens.ids[:, layer].astype(str), tokens.weights[:, layer].astype(str)
    for begin, end in zip(starts, ends):
        yield "\t".join(ids[begin:end].ravel()) + "\t\t" + "\t".join(weights[begin:end].ravel()) + "\n"


def _replies(trace: Trace, path: Path) -> tuple[Tokens, np.ndarray]:
    """Decoded tokens, one reply after another, and how many each has."""
    models = {name: facts for name, facts in MODELS.items() if facts.model_type == "gpt_oss"}
    if not any(_alike(trace.facts, facts) for facts in models.values()):
        known = "; ".join(f"{name}: {_shape(facts)}" for name, facts in models.items())
        raise UserError(f"{path}: the layout of fingerprints is of gpt-oss alone ({known}); {_here(trace)}")
    if not (trace.phase == DECODE).any():
        raise UserError(
            f"{path}: the layout of fingerprints holds decoded tokens only, and the trace lacks decode steps"
        )
    tokens = _tokens(trace.select(trace.phase == DECODE), f"trace for {path}")
    follows = np.diff(tokens.sequence) == 0
    gaps = np.flatnonzero(follows & (np.diff(tokens.position) != 1))
    if len(gaps):
        before, after = tokens.position[gaps[0] : gaps[0] + 2]
        raise UserError(f"{path}: position {after} of sequence {tokens.sequence[gaps[0]]} comes after {before}")
    return tokens, _lengths(tokens)


def _reply(tokens: Tokens, begin: int, end: int) -> dict[str, Any]:
    assert tokens.weights is not None
    steps = []
    for token in range(begin, end):
        weights = tokens.weights[token].astype(str).astype(float).tolist()
        layers = {
            f"layer_{layer}": {"selected_experts": ids, "selected_probs": probs}
            for layer, (ids, probs) in enumerate(zip(tokens.ids[token].tolist(), weights))
        }
        steps.append({f"token_{tokens.position[token]}": layers})
    return {"router_data": steps}


def _tokens(trace: Trace, where: str, last_layer: bool = True) -> Tokens:
    """The table of tokens; UserError for what every layout needs. `last_layer`: of prompts, too."""
    tokens = by_token(trace, where)
    if trace.weights is None or tokens.weights is None or np.isnan(trace.weights).any():
        raise UserError(f"{where}: the trace lacks router weights, which the layout needs")
    absent = tokens.ids[:, :, 0] < 0
    if not last_layer:
        absent[tokens.phase == PREFILL, -1] = False
    if absent.any():
        token, layer = np.argwhere(absent)[0]
        said = f"layer {layer} of position {tokens.position[token]}, sequence {tokens.sequence[token]}"
        raise UserError(f"{where}: the trace lacks {said}; the layout needs all layers")
    return tokens


def _lengths(tokens: Tokens) -> np.ndarray:
    return np.unique(tokens.sequence, return_counts=True)[1]


def _left_out(trace: Trace, held: tuple[str, ...] = ()) -> list[str]:
    """What no public layout holds, of what this trace has."""
    additions = sorted(trace.extra.keys() - set(held))
    said = {
        "full router scores": trace.scores is not None,
        "lookahead predictions": bool(trace.lookahead),
        "which sequences ran side by side": trace.batch is not None,
        f"additions: {', '.join(additions)}": bool(additions),
        "what the trace says of its origin": bool(trace.about.keys() - {"source", "model", "file", "positions"}),
    }
    return [what for what, lost in said.items() if lost]


def _numbered(tokens: Tokens) -> list[str]:
    found = np.unique(tokens.sequence)
    return [] if np.array_equal(found, np.arange(len(found))) else ["the numbers of sequences: they are counted"]


def _as_prompts(trace: Trace, tokens: Tokens) -> list[str]:
    """What is lost where every sequence becomes one prefill step."""
    decoded = int((tokens.phase == DECODE).sum())
    said = {
        f"that {decoded} tokens were decoded: each sequence is one prefill step": decoded > 0,
        "which tokens ran in one step": decoded == 0 and not np.array_equal(trace.step, trace.sequence),
        "positions: they are counted from 0": not np.array_equal(tokens.position, places_of(_lengths(tokens))),
    }
    return [what for what, lost in said.items() if lost] + _numbered(tokens)


def _without_prompts(trace: Trace) -> list[str]:
    decoded = trace.select(trace.phase == DECODE)
    prompts = len(by_token(trace).step) - len(by_token(decoded).step)
    said = [f"{prompts} tokens of prompts: a reply has decoded tokens only"] if prompts else []
    side = len(np.unique(decoded.step)) < len(by_token(decoded).step)
    return said + ["which tokens ran in one step"] * side + _numbered(by_token(decoded))


def _alike(one: TraceFacts, other: TraceFacts) -> bool:
    return (one.layers, one.experts, one.top_k) == (other.layers, other.experts, other.top_k)


def _shape(facts: TraceFacts) -> str:
    return f"{facts.layers} MoE layers of {facts.experts} experts, {facts.top_k} a token"


def _here(trace: Trace) -> str:
    return f"this trace has {_shape(trace.facts)}"


def _save(path: Path, **arrays: np.ndarray) -> None:
    with replacing(path, "wb") as file:
        np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]  # numpy's stub of **kwds
