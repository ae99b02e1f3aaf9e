"""A Hugging Face model folder as this project sees it: dense tensors under their own names, routed experts by layer.

What a checkpoint must contain is read off the abstract model, so a model file is the only
place that names weights; whatever is missing, extra or of another shape is collected and reported together.

Shapes: E experts, D model width, F expert width. A routed expert is gate [F, D], up [F, D], down [D, F].
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hybrimoe_jax.checkpoint.item_files import items_of
from hybrimoe_jax.checkpoint.quantised.folder import expand, method_of, settings_of
from hybrimoe_jax.checkpoint.safetensors import FileTensor, read_header
from hybrimoe_jax.checkpoint.weights import (
    ArrayTensor,
    Experts,
    ListedExperts,
    Shard,
    StackedExperts,
    Tensor,
    Weights,
    by_new_name,
    row_block,
)
from hybrimoe_jax.errors import UserError, is_name, reading, shown_name
from hybrimoe_jax.files import present, read_json
from hybrimoe_jax.models.config import ModelConfig
from hybrimoe_jax.models.parameters import split
from hybrimoe_jax.models.registry import build_model, family_of, parse_config

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
TEXT_FILES = (
    "expert_frequencies.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
HARMLESS = (re.compile(r"rotary_emb\.inv_freq$"),)  # buffers that older checkpoints saved; recomputed from the config
NAMED = 20  # how many names of a kind an error message lists


def shard_name(layer: int | None) -> str:
    return "outer" if layer is None else f"layer_{layer:05d}"


def layer_of(name: str) -> int | None:
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return int(match[1]) if match else None


def dense_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor outside the routed experts, in the model's order."""
    with reading("config.json: its sizes make no model; it"):
        return {name: tuple(leaf.shape) for name, leaf in split(build_model(config))[1].items()}


def expert_names(config: ModelConfig, layer: int, expert: int) -> tuple[str, str, str]:
    """The checkpoint's names of an expert's gate, up and down matrices."""
    return family_of(config.model_type).expert_names(layer, expert)


def open_hf(folder: str | Path) -> Weights:
    """Opens a folder saved by `save_pretrained` or downloaded from a hub; reads headers only.

    Quantised tensors of the methods in `checkpoint.quantised` appear as the float32 tensors that they stand for.

    Raises UserError for a wrong folder, pickled weights, a truncated file, an unsupported model, and for tensors that
    are missing, extra or of a shape other than the configuration's (all of them named in one message).
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file; give the folder that holds config.json" if folder.is_file() else "no such folder"
        raise UserError(f"{folder}: {what}")
    if not (folder / "config.json").is_file():
        if (folder / "manifest.json").is_file():
            raise UserError(
                f"{folder}: config.json is missing from this converted checkpoint; convert the original again"
            )
        raise UserError(f"{folder}: no config.json; give a folder saved by transformers' save_pretrained")
    if (folder / "manifest.json").is_file() and items_of(folder).exists():
        raise UserError(f"{folder}: already a converted checkpoint; give the Hugging Face folder it came from")
    if present(folder / ADAPTER):
        raise UserError(
            f"{folder / ADAPTER}: an adapter (PEFT) lies beside the weights and would be left out; merge it into them, "
            "or remove its files if they are merged already"
        )
    raw = read_json(folder / "config.json")
    if not isinstance(raw, dict):
        raise UserError(f"{folder / 'config.json'}: not a JSON object")
    settings = raw.pop("quantization_config", None)
    if settings:
        method_of(settings)
    config = parse_config(raw)
    tensors, paths = read_tensors(folder)
    check_counts(config, tensors, folder)
    if settings := settings_of(folder, settings, tensors):
        refuse_absent_layers(config, tensors, folder)
        known = dense_shapes(config)
        with reading(f"{folder / 'config.json'}: quantization_config, or a tensor that it is about,"):
            tensors = expand(settings, tensors, known)
    shards = match_names(config, tensors, folder)
    return Weights(config, raw, shards, folder, {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in paths})


def read_tensors(folder: Path) -> tuple[dict[str, FileTensor], list[Path]]:
    """Every tensor of the folder's single file, or of the shards that its index names; and the files read.

    A single file goes before an index, which may be left over from weights that were saved here earlier; so it does in
    transformers.
    """
    if present(folder / SINGLE):
        return dict(read_header(folder / SINGLE)), [folder / SINGLE]
    if present(folder / INDEX):
        return read_shards(folder)
    pickles = [p.name for p in sorted(folder.iterdir()) if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if pickles:
        raise UserError(
            f"{folder}: weights are pickles ({listed(pickles)}), which can run code when read; "
            "load them with transformers and save_pretrained to get safetensors"
        )
    others = [p.name for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".gguf")]
    hint = f" (found {listed(others)})" if others else ""
    raise UserError(f"{folder}: neither {SINGLE} nor {INDEX} is there{hint}")


def read_shards(folder: Path) -> tuple[dict[str, FileTensor], list[Path]]:
    """Every tensor that the folder's index names, and the files read."""
    index = read_json(folder / INDEX)
    where = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(where, dict) or not where or not all(isinstance(f, str) for f in where.values()):
        raise UserError(f"{folder / INDEX}: no weight_map; download or save it again")
    names = sorted(set(where.values()))
    outside = [n for n in names if not is_name(n) or Path(n).name != n or not n.endswith(".safetensors")]
    if outside:
        raise UserError(f"{folder / INDEX}: names {listed(outside)}; shards must be .safetensors files beside it")
    absent = [n for n in names if not (folder / n).is_file()]
    if absent:
        raise UserError(f"{folder}: {len(absent)} of {len(names)} shards are missing: {listed(absent)}; download them")
    paths = [folder / n for n in names]
    stored = {p.name: read_header(p) for p in paths}
    lost = [name for name, file in where.items() if name not in stored[file]]
    if lost:
        raise UserError(f"{folder / INDEX}: places {listed(lost)} in shards that do not hold them; download it again")
    for name, file in where.items():
        if twice := [other for other in names if other != file and name in stored[other]]:
            raise UserError(f"{folder}: {shown_name(name)} is in {file} and in {twice[0]}; download them again")
    return {name: stored[file][name] for name, file in where.items()}, paths


def match_names(config: ModelConfig, tensors: Mapping[str, Tensor], where: object) -> tuple[Shard, ...]:
    """Sorts tensors into shards; raises one UserError listing every missing, extra and misshapen name."""
    check_counts(config, tensors, where)
    family = family_of(config.model_type)
    tensors = by_new_name(((family.canonical(name), name, tensor) for name, tensor in tensors.items()), where)
    left = dict(tensors)
    refuse_absent_layers(config, left, where)
    refuse_extra_layers(config, left, where)
    missing: list[str] = []
    misshapen: list[str] = []

    def take(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        found = {name: left.pop(name) for name in shapes if name in left}
        missing.extend(name for name in shapes if name not in found)
        for name, tensor in found.items():
            if tuple(tensor.shape) != shapes[name]:
                misshapen.append(f"{name} is {list(tensor.shape)}, not {list(shapes[name])}")
        return found

    wanted: dict[int | None, dict[str, tuple[int, ...]]] = {None: {}}
    wanted |= {i: {} for i in range(config.num_hidden_layers)}
    for name, shape in dense_shapes(config).items():
        wanted[layer_of(name)][name] = shape
    shards = []
    for layer, names in wanted.items():
        dense = take(names)
        experts = take_experts(config, layer, left, take) if layer in config.moe_layers else None
        shards.append(Shard(shard_name(layer), layer, dense, experts))
    extra = [name for name in left if not any(p.search(name) for p in HARMLESS)]
    if config.tie_word_embeddings and "lm_head.weight" in extra:
        if not same(tensors["lm_head.weight"], tensors.get("model.embed_tokens.weight")):
            raise UserError(f"{where}: tie_word_embeddings is true but lm_head.weight differs from the token table")
        extra.remove("lm_head.weight")
    problems = [
        f"{len(names)} {kind}: {listed(names)}"
        for kind, names in (("missing", missing), ("of another shape", misshapen), ("unexpected", extra))
        if names
    ]
    if problems:
        raise UserError(f"{where}: the weights do not fit config.json: {'; '.join(problems)}")
    for shard in shards:
        for tensor in shard.dense.values():
            _ = tensor.dtype  # refuses what is not a float, by name
        _ = shard.experts and shard.experts.dtypes
    return tuple(shards)


def check_counts(config: ModelConfig, tensors: Mapping[str, object], where: object) -> None:
    """UserError where config.json has more layers, or experts one by one, than the weights have tensors."""
    family, layers, there = family_of(config.model_type), config.num_hidden_layers, len(tensors)
    if layers > there:
        raise UserError(f"{where}: num_hidden_layers is {layers} in config.json, and the weights are {there} tensors")
    names = {family.canonical(name) for name in tensors}
    one_by_one = sum(family.fused_names(layer)[0] not in names for layer in config.moe_layers)
    if one_by_one * config.num_experts > there:
        raise UserError(
            f"{where}: config.json has {config.num_experts} experts in each of {len(config.moe_layers)} layers, and "
            f"the weights are {there} tensors"
        )


def take_experts(
    config: ModelConfig,
    layer: int,
    left: Mapping[str, Tensor],
    take: Callable[[Mapping[str, tuple[int, ...]]], dict[str, Tensor]],
) -> Experts | None:
    """A layer's routed experts: fused tensors where the checkpoint has them, else one by one.

    `take` removes tensors of given names and shapes from `left`, gives those that are there and notes the others.
    """
    width, hidden, count = config.hidden_size, config.moe_width, config.num_experts
    gate_up, down = family_of(config.model_type).fused_names(layer)
    if gate_up in left:
        stacks = take({gate_up: (count, 2 * hidden, width), down: (count, width, hidden)})
        return StackedExperts(stacks[gate_up], stacks[down]) if len(stacks) == 2 else None
    matrices = []
    for expert in range(count):
        names = expert_names(config, layer, expert)
        found = take(dict(zip(names, ((hidden, width), (hidden, width), (width, hidden)))))
        if len(found) == 3:
            gate, up, down = found.values()
            matrices.append((gate, up, down))
    return ListedExperts(tuple(matrices))


def refuse_absent_layers(config: ModelConfig, names: Iterable[str], where: object) -> None:
    """Refuses weights of fewer layers than config.json says, before anything is made for each layer."""
    there = {layer for name in names if (layer := layer_of(name)) is not None}
    absent = [layer for layer in range(config.num_hidden_layers) if layer not in there]
    if len(absent) > NAMED:
        raise UserError(
            f"{where}: config.json says num_hidden_layers {config.num_hidden_layers}, the weights have no tensor of "
            f"{len(absent)} of them (layer {absent[0]} first); download all shards, or the right config.json"
        )


def refuse_extra_layers(config: ModelConfig, names: Iterable[str], where: object) -> None:
    beyond = sorted({n for n in map(layer_of, names) if n is not None and n >= config.num_hidden_layers})
    if beyond or any(".mtp." in f".{name}" for name in names):
        what = f"layer {beyond[0]} beyond num_hidden_layers {config.num_hidden_layers}" if beyond else "mtp tensors"
        raise UserError(
            f"{where}: {what}: multi-token-prediction layers are not supported; remove them and convert again"
        )


def same(a: Tensor, b: Tensor | None) -> bool:
    """Whether two tensors are equal, compared in row blocks."""
    if b is None or tuple(a.shape) != tuple(b.shape):
        return False
    step = row_block(a.shape, a.dtype)
    return all(
        np.array_equal(a.read(i, min(i + step, a.shape[0])), b.read(i, min(i + step, a.shape[0])))
        for i in range(0, a.shape[0], step)
    )


def listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(map(shown_name, names[:NAMED])) + more


def from_arrays(
    raw_config: Mapping[str, Any],
    dense: Mapping[str, np.ndarray],
    experts: Iterable[tuple[np.ndarray, np.ndarray]],
) -> Weights:
    """A model in memory as `Weights`.

    Args:
      raw_config: the `config.json` mapping.
      dense: every tensor outside the routed experts under its checkpoint name.
      experts: per MoE layer, in order, gate_up [E, 2F, D] (gate rows first) and down [E, D, F].

    Raises UserError listing missing, extra and misshapen tensors.
    """
    config = parse_config(raw_config)
    tensors: dict[str, Tensor] = {name: ArrayTensor(np.asarray(array)) for name, array in dense.items()}
    for layer, stacks in zip(config.moe_layers, experts, strict=True):
        names = family_of(config.model_type).fused_names(layer)
        tensors |= {name: ArrayTensor(np.asarray(array)) for name, array in zip(names, stacks, strict=True)}
    return Weights(config, dict(raw_config), match_names(config, tensors, "the model in memory"))
