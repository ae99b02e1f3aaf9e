"""Small random Hugging Face models of every family, and the walk from their saved folders into this project's arrays.

Weights are drawn so that everything matters: unit-gain projections (attention is not uniform), spread routers (top-k is
not a near tie), biases and norms off their initial values. Seeds are fixed; models and folders are made once a session.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from hf_cases import ALL_CASES, COMMON, FAMILY, VOCAB
from safetensors.numpy import load_file

from hybrimoe_jax.models import parameters
from hybrimoe_jax.models.config import ModelConfig
from hybrimoe_jax.models.families.deepseek_v2 import DeepseekV2Config
from hybrimoe_jax.models.moe import DenseExperts
from hybrimoe_jax.models.registry import build_model, family_of, parse_config

LENGTHS = (37, 21, 5)
"""Prompt lengths of the ragged batch: three, two and one prefill chunks."""
CHUNK = 16
NEW_TOKENS = 64
CAPACITY = 112


def hf_config(name: str, **more):
    """The transformers configuration of a case."""
    import transformers

    case = ALL_CASES[name]
    classes = dict(
        mixtral=transformers.MixtralConfig,
        qwen2_moe=transformers.Qwen2MoeConfig,
        qwen3_moe=transformers.Qwen3MoeConfig,
        olmoe=transformers.OlmoeConfig,
        deepseek_v2=transformers.DeepseekV2Config,
    )
    overrides = json.loads(json.dumps(case.overrides))  # transformers writes into the dictionaries it is given
    return classes[case.family](**(COMMON | FAMILY[case.family] | overrides | more))


def random_hf_model(config, seed: int):
    """A float32 eager transformers model whose every weight is drawn from `seed`."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                weight.copy_(0.2 * noise)
            elif name.endswith("embed_tokens.weight"):
                weight.copy_(noise if not config.tie_word_embeddings else noise * config.hidden_size**-0.5)
            elif name.endswith(".gate.weight"):  # the router
                weight.copy_(2.0 * noise * weight.shape[-1] ** -0.5)
            else:
                weight.copy_(noise * weight.shape[-1] ** -0.5)
    return model


@functools.cache
def hf_model(name: str):
    return random_hf_model(hf_config(name), ALL_CASES[name].seed)


@functools.cache
def scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="hybrimoe-hf-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def hf_folder(name: str) -> Path:
    """The case's model as `save_pretrained` writes it."""
    folder = scratch() / name
    hf_model(name).save_pretrained(folder)
    return folder


class Loaded(NamedTuple):
    """A folder in this project's form: dense parameters by name and, per decoder layer, None or stacked experts."""

    config: ModelConfig
    graphdef: nnx.GraphDef
    params: dict[str, jax.Array]
    experts: list[tuple[jax.Array, jax.Array] | None]


def load_folder(folder: Path) -> Loaded:
    """Reads a single-file safetensors folder; every tensor must find its place."""
    config = parse_config(json.loads((folder / "config.json").read_text()))
    family = family_of(config.model_type)
    tensors = {family.canonical(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    experts = []
    for layer in range(config.num_hidden_layers):
        if not config.is_moe(layer):
            experts.append(None)
            continue
        stacks = ([], [])
        for expert in range(config.num_experts):
            gate, up, down = (tensors.pop(name) for name in family.expert_names(layer, expert))
            stacks[0].append(np.concatenate([gate, up]))
            stacks[1].append(down)
        experts.append(tuple(jnp.asarray(np.stack(stack)) for stack in stacks))
    graphdef, abstract = parameters.split(build_model(config))
    assert {n: a.shape for n, a in abstract.items()} == {n: t.shape for n, t in tensors.items()}
    return Loaded(config, graphdef, {name: jnp.asarray(t) for name, t in tensors.items()}, experts)


@functools.cache
def loaded(name: str) -> Loaded:
    return load_folder(hf_folder(name))


def prompts(seed: int, vocab: int = VOCAB, lengths=LENGTHS) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(2, vocab, size=length).tolist() for length in lengths]


@functools.cache
def step_function(name: str):
    """One jitted (params, experts, cache, ids [B, T], positions [B, T]) -> (logits [B, T, V], cache) for a case."""
    graphdef = loaded(name).graphdef

    def step(params, experts, cache, ids, positions):
        return parameters.merge(graphdef, params)(ids, cache, positions, DenseExperts(experts))

    return jax.jit(step)


def run_ours(name: str, rows: list[list[int]], new_tokens: int = NEW_TOKENS, chunk: int = CHUNK):
    """Chunked ragged prefill, then greedy decoding.

    Returns (per row the prompt's logits [length, V] as float32 arrays, per row its new tokens).
    """
    model, step = loaded(name), step_function(name)
    batch, lengths = len(rows), np.array([len(row) for row in rows])
    cache = parameters.merge(model.graphdef, model.params).init_cache(batch, CAPACITY)
    padded = -(-lengths.max() // chunk) * chunk
    ids = np.zeros((batch, padded), np.int32)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = tokens
    places = np.arange(padded, dtype=np.int32)[None]
    positions = np.where(places < lengths[:, None], places, CAPACITY).astype(np.int32)
    parts = []
    for start in range(0, padded, chunk):
        part = slice(start, start + chunk)
        logits, cache = step(model.params, model.experts, cache, ids[:, part], positions[:, part])
        parts.append(np.asarray(logits))
    logits = np.concatenate(parts, axis=1)
    prefill = [logits[row, :length] for row, length in enumerate(lengths)]
    tokens = [[int(row[-1].argmax())] for row in prefill]
    for offset in range(new_tokens - 1):
        last = np.array([[row[-1]] for row in tokens], np.int32)
        logits, cache = step(model.params, model.experts, cache, last, (lengths + offset)[:, None].astype(np.int32))
        for row, new in zip(tokens, np.asarray(logits)[:, 0].argmax(-1)):
            row.append(int(new))
    return prefill, tokens


class Reference(NamedTuple):
    """What transformers says about one row alone: logits and router logits at every position, new tokens."""

    logits: np.ndarray
    tokens: list[int]
    router: list[np.ndarray]


@functools.cache
def reference(name: str, row: tuple[int, ...], new_tokens: int = NEW_TOKENS) -> Reference:
    """Greedy generation with transformers' cache, then one pass over the whole text for both kinds of logits."""
    import torch

    model = hf_model(name)
    with torch.no_grad():
        text = model.generate(
            torch.tensor([row]), max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, use_cache=True
        )
        out = model(text[:, :-1], output_router_logits=True)
    router = [layer.numpy() for layer in out.router_logits]
    return Reference(out.logits[0].numpy(), text[0, len(row) :].tolist(), router)


def top_margin(values: np.ndarray, k: int = 1) -> np.ndarray:
    """How far the k-th largest value of the last axis lies above the next, as a share of the largest."""
    ordered = -np.sort(-values, axis=-1)
    return (ordered[..., k - 1] - ordered[..., k]) / np.abs(ordered).max(axis=-1)


def router_margin(config: ModelConfig, logits: np.ndarray) -> np.ndarray:
    """Margin of every routing decision [N] of router logits [N, E], groups included; a share of the largest logit."""
    scale = np.abs(logits).max(axis=-1)
    margin = np.full(len(logits), np.inf)
    if isinstance(config, DeepseekV2Config) and config.topk_method == "group_limited_greedy":
        groups, kept_groups = config.n_group or 1, config.topk_group or 1
        grouped = logits.reshape(len(logits), groups, -1)
        best = grouped.max(axis=-1)
        ordered = -np.sort(-best, axis=-1)
        if kept_groups < groups:
            margin = (ordered[:, kept_groups - 1] - ordered[:, kept_groups]) / scale
        kept = best >= ordered[:, kept_groups - 1, None]
        logits = np.where(kept[..., None], grouped, -np.inf).reshape(logits.shape)
    ordered = -np.sort(-logits, axis=-1)
    top_k = config.num_experts_per_tok
    return np.minimum(margin, (ordered[:, top_k - 1] - ordered[:, top_k]) / scale)
