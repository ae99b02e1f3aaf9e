"""The training loop: it learns, and a run that was killed goes on as if it had not been."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.models.moe import Routing
from hybrimoe_jax.models.registry import parse_config
from hybrimoe_jax.train import loop, tokens
from hybrimoe_jax.train.corpus import Text

VERSES = """Shall I compare thee to a summer's day?
Thou art more lovely and more temperate:
Rough winds do shake the darling buds of May,
And summer's lease hath all too short a date:
"""
CONFIG = parse_config(
    {
        "model_type": "qwen2_moe",
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "norm_topk_prob": True,
        "max_position_embeddings": 64,
    }
)
SETTINGS = loop.Settings(
    steps=24, batch_tokens=128, learning_rate=2e-2, warmup=4, stages=((0.0, 16), (0.5, 32)), seed=5
)
ONE_LAYER = dataclasses.replace(CONFIG, num_hidden_layers=1)


@pytest.fixture(scope="module")
def stream() -> np.ndarray:
    text = Text("sonnet", "modern", VERSES * 6)
    return tokens.encode(tokens.train_tokenizer([text], 300), text)


@pytest.fixture(scope="module", autouse=True)
def one_compilation():
    """Runs of equal settings share their step: compiling it takes longer than all else here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_step", functools.cache(loop.make_step))
        yield


def train(folder, stream, settings=SETTINGS, **options):
    losses = {}
    options.setdefault("save_every", 10)
    state = loop.train(
        ONE_LAYER, settings, stream, folder, report=lambda s, v: losses.update({s: v["loss"]}), **options
    )
    return state, losses


@pytest.fixture(scope="module")
def whole(tmp_path_factory, stream):
    return train(tmp_path_factory.mktemp("whole"), stream)


@pytest.mark.slow
def test_training_reduces_the_loss(whole):
    _, losses = whole
    assert losses[1] == pytest.approx(np.log(CONFIG.vocab_size), abs=0.2), "before training every id is as likely"
    assert np.mean([losses[s] for s in range(20, 25)]) < losses[1] - 1.5


def test_killed_run_resumes_to_the_same_parameters(tmp_path, stream, whole):
    class Killed(Exception):
        pass

    def kill(state):
        raise Killed

    with pytest.raises(Killed):
        train(tmp_path, stream, saved=kill)
    state, losses = train(tmp_path, stream, resume=True)
    assert min(losses) == 11, "the saved steps are not done again"
    for resumed, uninterrupted in zip(jax.tree.leaves(state.params), jax.tree.leaves(whole[0].params)):
        np.testing.assert_array_equal(resumed, uninterrupted)


def test_another_runs_state_is_refused_by_name(tmp_path, stream):
    finished = dataclasses.replace(SETTINGS, steps=0)
    state, _ = train(tmp_path, stream, finished)
    loop.save_state(tmp_path / "state.npz", state, {**dataclasses.asdict(ONE_LAYER), "seed": 4})
    with pytest.raises(UserError, match=r"seed 4 there, 5 now"):
        train(tmp_path, stream, finished, resume=True)
    (tmp_path / "state.npz").write_bytes((tmp_path / "state.npz").read_bytes()[:1000])
    with pytest.raises(UserError, match=r"state\.npz: not a training state"):
        train(tmp_path, stream, finished, resume=True)


def test_text_shorter_than_a_window_is_refused(tmp_path, stream):
    with pytest.raises(UserError, match="more text"):
        train(tmp_path, stream[:20])


def test_schedule_rises_stays_and_falls_to_zero():
    settings = loop.Settings(steps=100, warmup=10, decay=0.3)
    factors = [float(settings.schedule(step)) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1.0
    assert set(factors[9:70]) == {1.0}
    assert factors[71:] == sorted(factors[71:], reverse=True) and 0 < factors[99] < 0.05


def test_windows_grow_at_their_share_of_the_run():
    settings = loop.Settings(steps=100, stages=((0.0, 8), (0.4, 16), (0.88, 64)))
    assert [settings.context(step) for step in (0, 39, 40, 87, 88, 99)] == [8, 8, 16, 16, 64, 64]


def test_balance_loss_is_one_when_even_and_highest_when_collapsed():
    even = Routing(jnp.arange(8).reshape(4, 2), jnp.ones((4, 2)), jnp.full((4, 8), 1 / 8))
    collapsed = Routing(
        jnp.zeros((4, 2), int).at[:, 1].set(1), jnp.ones((4, 2)), jnp.eye(8)[:2].mean(0)[None].repeat(4, 0)
    )
    assert float(loop.balance_loss(even)) == pytest.approx(1.0)
    assert float(loop.balance_loss(collapsed)) == pytest.approx(8 / 2)


def test_matrices_of_experts_are_orthogonalised_one_by_one():
    """One Muon step from zero moments moves each expert's matrix by a near-orthogonal update of its own."""
    optimizer = loop.make_optimizer(dataclasses.replace(SETTINGS, weight_decay=0.0, warmup=0))
    grads = {
        "experts": {
            "0": {
                "down": jax.random.normal(jax.random.key(0), (3, 32, 16)) * jnp.array([1.0, 1e-3, 1e2])[:, None, None]
            }
        },
        "dense": {"model.layers.0.mlp.gate.weight": jnp.array([[3.0, -1e-4]])},
    }
    updates, _ = optimizer.update(grads, optimizer.init(grads), jax.tree.map(jnp.zeros_like, grads))
    for expert in np.asarray(updates["experts"]["0"]["down"]):
        singular = np.linalg.svd(expert, compute_uv=False)
        assert singular.min() > 0.5 * singular.max()
    router = np.asarray(updates["dense"]["model.layers.0.mlp.gate.weight"])
    np.testing.assert_allclose(router[0, 0], -router[0, 1], rtol=1e-2, err_msg="routers take Adam's step, of one size")
    assert router[0, 0] < 0
