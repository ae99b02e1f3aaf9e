"""The training loop: objective, optimiser, schedule, and a state on disk from which a killed run goes on.

The objective is the mean next-token loss plus the load-balancing loss of Switch Transformers (arXiv 2101.03961,
eq. 4), as Qwen2-MoE uses it, per layer: E * sum_e f_e P_e, where f_e is the share of the (token, expert) pairs
that went to expert e and P_e the mean router probability of e; it is 1 when both are uniform. Its coefficient
is small, so that experts stay different.

Matrices are trained with Muon (arXiv 2502.16982: momentum orthogonalised by Newton-Schulz, updates scaled to AdamW's
size), every expert as a matrix of its own; the token table, head, routers, norms and biases with AdamW. The learning
rate is constant between a short warm-up and a linear decay over the last part (warm-up, stable, decay; arXiv
2405.18392): a run in its stable part may be resumed with a different number of steps. Windows grow during the run,
since short ones are cheaper and learn the words just as well.
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.files import replacing
from hybrimoe_jax.models import parameters
from hybrimoe_jax.models.config import ModelConfig
from hybrimoe_jax.models.moe import Routing
from hybrimoe_jax.models.registry import build_model
from hybrimoe_jax.models.target import default_device
from hybrimoe_jax.npz import read_npz
from hybrimoe_jax.train import tokens
from hybrimoe_jax.train.experts import GroupedExperts

Params = dict[str, dict[str, Any]]
ADAM_NAMES = ("embed_tokens", "lm_head", "norm", "bias", ".gate.", "shared_expert_gate")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides a run besides the model's shape and the text.

    `stages` are (share of the run at which it starts, window).
    """

    steps: int = 700
    batch_tokens: int = 4096
    learning_rate: float = 4e-3
    weight_decay: float = 0.1
    warmup: int = 50
    decay: float = 0.35
    balance: float = 0.01
    stages: tuple[tuple[float, int], ...] = ((0.0, 128), (0.4, 256), (0.88, 1024))
    seed: int = 0

    def context(self, step: int) -> int:
        """Window length, in tokens, of a step."""
        return [length for start, length in self.stages if step >= int(start * self.steps)][-1]

    def schedule(self, step: jax.typing.ArrayLike) -> jax.Array:
        """The learning rate's factor, 0..1."""
        rise = (step + 1) / max(self.warmup, 1)
        fall = (self.steps - step) / max(self.decay * self.steps, 1)
        return jnp.clip(jnp.minimum(rise, fall), 0.0, 1.0)


@dataclasses.dataclass
class State:
    """Everything a run needs to go on: the number of finished steps, parameters and optimiser state."""

    step: int
    params: Params
    moments: Any


def init_params(config: ModelConfig, seed: int) -> Params:
    """{"dense": {checkpoint name: array}, "experts": {layer: {"gate_up" [E, 2F, D], "down" [E, D, F]}}}, float32.

    Matrices start at 1/sqrt(fan-in), those that write to the residual stream at that over sqrt(2 x layers); the head
    starts near zero so that the first loss is ln(vocabulary).
    """
    rngs = nnx.Rngs(seed)
    _, dense = parameters.split(build_model(config, rngs))
    width, hidden, count = config.hidden_size, config.moe_width, config.num_experts
    residual = (2 * config.num_hidden_layers) ** -0.5

    def draw(shape, std):
        return std * jax.random.normal(rngs.params(), shape, jnp.float32)

    for name, leaf in dense.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            dense[name] = draw(leaf.shape, 0.02 if "lm_head" in name or config.tie_word_embeddings else 0.3)
        elif leaf.ndim == 2:
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            dense[name] = draw(leaf.shape, leaf.shape[1] ** -0.5 * (residual if writes else 1.0))
    experts = {
        str(layer): {
            "gate_up": draw((count, 2 * hidden, width), width**-0.5),
            "down": draw((count, width, hidden), hidden**-0.5 * residual),
        }
        for layer in config.moe_layers
    }
    return {"dense": dense, "experts": experts}


def expert_weights(params: Params) -> dict[int, tuple[jax.Array, jax.Array]]:
    """By decoder layer (gate_up, down): what an experts object is made of."""
    return {int(layer): (entry["gate_up"], entry["down"]) for layer, entry in params["experts"].items()}


def make_forward(config: ModelConfig, block: int = 64, **options) -> Callable:
    """-> forward(params, ids [B, T], positions [B, T]) -> (logits [B, T, V], {layer: Routing}).

    `options` are `GroupedExperts`'.
    """
    graphdef, _ = parameters.split(build_model(config))

    def forward(params, ids, positions):
        model = parameters.merge(graphdef, params["dense"])
        experts = GroupedExperts(expert_weights(params), block, **options)
        logits, _ = model(ids, model.init_cache(*ids.shape), positions, experts)
        return logits, experts.routings

    return forward


def balance_loss(routing: Routing) -> jax.Array:
    """E * sum_e f_e P_e of one layer: 1 for uniform routing, E / k at the worst."""
    count = routing.scores.shape[1]
    share = jnp.bincount(routing.ids.reshape(-1), length=count) / routing.ids.size
    return count * jnp.sum(share * jnp.mean(routing.scores, axis=0))


def make_optimizer(settings: Settings) -> optax.GradientTransformation:
    """Muon for matrices, AdamW for the rest (ADAM_NAMES and vectors), one schedule."""

    def dimensions(params):
        def of(path, leaf):
            name = ".".join(str(key.key) for key in path)
            if leaf.ndim < 2 or any(part in name for part in ADAM_NAMES):
                return None
            return optax.contrib.MuonDimensionNumbers(reduction_axis=leaf.ndim - 1, output_axis=leaf.ndim - 2)

        return jax.tree_util.tree_map_with_path(of, params)

    return optax.contrib.muon(
        lambda step: settings.learning_rate * settings.schedule(step),
        weight_decay=settings.weight_decay,
        muon_weight_dimension_numbers=dimensions,
        consistent_rms=0.2,
        adam_b2=0.98,
    )


def make_step(config: ModelConfig, settings: Settings) -> tuple[optax.GradientTransformation, Callable]:
    """-> optimiser, and a step that donates its first two arguments.

    step(params, moments, windows [B, T + 1]) -> (params, moments, {"loss", "balance"}).
    """
    forward = make_forward(config)
    optimizer = make_optimizer(settings)

    def objective(params, rows):
        ids, targets = rows[:, :-1], rows[:, 1:]
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        logits, routings = forward(params, ids, positions)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()
        balance = sum(balance_loss(r) for r in routings.values())
        return loss + settings.balance * balance, {"loss": loss, "balance": balance / len(routings)}

    def step(params, moments, rows):
        grads, report = jax.grad(objective, has_aux=True)(params, rows)
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, report

    return optimizer, jax.jit(step, donate_argnums=(0, 1))


def save_state(path: Path, state: State, identity: Mapping[str, Any]) -> None:
    """Writes the state, whole or not at all; `identity` (JSON values) is what a resumed run must share."""
    leaves = jax.tree.leaves((state.params, state.moments))
    meta = json.dumps({"step": state.step, "identity": identity})
    with replacing(path, "wb") as file:
        np.savez(file, meta=np.frombuffer(meta.encode(), np.uint8), **{str(i): leaf for i, leaf in enumerate(leaves)})


def load_state(path: Path, like: State, identity: Mapping[str, Any]) -> State:
    """The saved state in the structure of `like`; UserError where it is of another run or damaged."""
    try:
        arrays = read_npz(path)
        meta = json.loads(arrays["meta"].tobytes())
        leaves = [jnp.asarray(arrays[str(i)]) for i in range(len(arrays) - 1)]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a training state ({error}); start without --resume") from error
    saved = meta["identity"]
    differing = [k for k in identity if identity[k] != saved.get(k)]
    if differing:
        what = ", ".join(f"{k} {saved.get(k)} there, {identity[k]} now" for k in differing)
        raise UserError(f"{path}: the saved run differs ({what}); give its settings or start without --resume")
    treedef = jax.tree.structure((like.params, like.moments))
    params, moments = jax.tree.unflatten(treedef, leaves)
    return State(meta["step"], params, moments)


def train(
    config: ModelConfig,
    settings: Settings,
    stream: np.ndarray,
    folder: Path,
    *,
    resume: bool = False,
    save_every: int = 100,
    report: Callable[[int, dict[str, float]], None] = lambda step, values: None,
    saved: Callable[[State], None] = lambda state: None,
) -> State:
    """Trains on the id stream [n] up to `settings.steps` and returns the last state.

    `folder/state.npz` holds the state of every `save_every` steps and of the last one. `report` gets each step's loss
    (nats per token) and balance; `saved` each saved state. With `resume`, the state there is continued: UserError where
    there is none. Its run must have been of the same model, text and settings, but for the number of steps.
    """
    longest = max(length for _, length in settings.stages)
    if len(stream) <= longest + 1:
        raise UserError(
            f"the training text has {len(stream)} tokens, less than one window of {longest + 1}; give more text"
        )
    default_device()
    run = {**dataclasses.asdict(config), **dataclasses.asdict(settings), "tokens": len(stream)}
    del run["steps"]
    identity = json.loads(json.dumps(run))
    optimizer, step_fn = make_step(config, settings)
    params = init_params(config, settings.seed)
    state = State(0, params, optimizer.init(params))
    path = folder / "state.npz"
    folder.mkdir(parents=True, exist_ok=True)
    if resume:
        if not path.is_file():
            raise UserError(f"{folder} holds no run to resume (no {path.name}); start without resume")
        state = load_state(path, state, identity)
    while state.step < settings.steps:
        context = settings.context(state.step)
        rows = tokens.batch(stream, max(1, settings.batch_tokens // context), context, settings.seed, state.step)
        params, moments, values = step_fn(state.params, state.moments, rows)
        state = State(state.step + 1, params, moments)
        report(state.step, {name: float(value) for name, value in values.items()})
        if state.step % save_every == 0 or state.step == settings.steps:
            save_state(path, state, identity)
            saved(state)
    return state
