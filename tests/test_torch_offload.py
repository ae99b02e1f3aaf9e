"""The PyTorch engine: its answers and its counts are those of our own."""

from __future__ import annotations

import dataclasses
import sys

import hf_cases
import numpy as np
import pytest
import tiny

pytest.importorskip("torch", reason="the PyTorch baseline needs torch")

from torch_models import TinyCheckpoint, offload

from hybrimoe_jax.baselines import torch_offload
from hybrimoe_jax.baselines.torch_offload import MODES, TorchOffload
from hybrimoe_jax.decide import POLICIES
from hybrimoe_jax.engine.config import EngineConfig
from hybrimoe_jax.engine.load import load
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.layout import Format
from hybrimoe_jax.formats.packing import dequantise, pack, quantise

LENGTHS = (5, 37, 20)


@pytest.fixture(scope="module")
def bundled():
    """The bundled model's dense answer: prompt, tokens, logits."""
    engine = load(None, EngineConfig(executor="dense"))
    assert engine.tokenizer is not None
    ids = engine.tokenizer.encode("To be, or not to be, that is the question:")
    tokens = engine.generate([ids], max_new_tokens=12).token_ids
    return ids, tokens, engine.logits(ids)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_the_bundled_model_gives_the_dense_tokens(mode, bundled):
    ids, tokens, logits = bundled
    with TorchOffload(mode=mode, threads=1) as torch_engine:
        assert torch_engine.generate([ids], max_new_tokens=12).token_ids == tokens
        assert np.abs(torch_engine.logits(ids) - logits).max() < 2e-5 * np.abs(logits).max()


def test_an_id_that_no_token_has_is_warned_of_and_dropped():
    checkpoint = TinyCheckpoint.of("qwen2_moe")
    checkpoint.generation_config["eos_token_id"] = [5, 10**400]
    with pytest.warns(UserWarning, match="outside the vocabulary"):
        engine = TorchOffload(checkpoint, threads=1, profile=tiny.costs(checkpoint.config))
    with engine:
        assert engine.eos == (5,)


@pytest.mark.parametrize("mode", MODES)
def test_counts_are_those_of_our_engine(mode):
    """On the clock of a profile's machine every decision is ours, whatever it depends on."""
    options = {"clock": "virtual", "cache_ratio": 0.5}
    ours = tiny.engine("qwen2_moe", system=MODES[mode], **options)
    prompts = tiny.prompts(ours.config, LENGTHS)
    want = ours.generate(prompts, max_new_tokens=6)
    ours.close()
    with offload("qwen2_moe", mode=mode, debug=True, **options) as theirs:
        got = theirs.generate(prompts, max_new_tokens=6)
    assert got.token_ids == want.token_ids
    for mine, other in zip(want.stats.steps, got.stats.steps, strict=True):
        assert (mine.phase, mine.tokens) == (other.phase, other.tokens)
        for layer, there in zip(mine.layers, other.layers, strict=True):
            first, second = dataclasses.asdict(layer), dataclasses.asdict(there)
            assert first | {"seconds": 0, "lanes": 0} == second | {"seconds": 0, "lanes": 0}
            assert there.seconds == pytest.approx(layer.seconds)
    assert got.stats.prefetch.issued == want.stats.prefetch.issued


def test_a_paced_device_lasts_as_long_as_its_profile_and_decides_the_same(tmp_path):
    config = tiny.weights("qwen2_moe")[0]
    profile, prompts = tmp_path / "machine.json", tiny.prompts(config, LENGTHS)
    tiny.costs(config).save(profile)
    runs = []
    for where in ({"clock": "virtual"}, {"device": f"paced:{profile}:5"}):
        with offload("qwen2_moe", mode="on-demand", cache_ratio=0.5, **where) as engine:
            runs.append(engine.generate(prompts, max_new_tokens=3))
    virtual, paced = runs
    assert paced.token_ids == virtual.token_ids
    for name in ("hits", "misses", "bytes_h2d"):
        assert paced.stats.total(name) == virtual.stats.total(name)
    assert paced.stats.device == "paced" and paced.stats.overshoot["device"]["count"] > 0
    for short, long in zip(virtual.stats.steps, paced.stats.steps, strict=True):
        assert long.seconds > 5 * short.seconds


@pytest.mark.parametrize("format", ["int4-g64", "int4z-g32", "int8-g64"])
def test_torch_kernels_mean_what_the_formats_mean(format):
    """Within bfloat16's rounding, by its int4 kernel and by unpacking first."""
    import torch

    from hybrimoe_jax.baselines.torch_linear import Int4Matrix, int4_product, int4_widened, unpacks_int4

    rng = np.random.default_rng(0)
    matrix = pack(Format.parse(format), *quantise(rng.standard_normal((128, 256), np.float32), Format.parse(format)))
    x = torch.from_numpy(rng.standard_normal((32, 256), np.float32)).to(torch.bfloat16)
    want, held = x.float() @ torch.from_numpy(dequantise(matrix)).T, Int4Matrix([matrix])
    for product in (int4_product, int4_widened) if unpacks_int4() else (int4_product,):
        got = product(x, held.codes, held.scales, held.group, held.twice).float()
        assert (got - want).abs().max() < 1e-2 * want.abs().max()


@pytest.mark.parametrize("form", ["loop", "grouped", "batched"])
def test_every_form_of_computing_experts_gives_the_same(form):
    prompts = tiny.prompts(tiny.weights("qwen2_moe")[0], LENGTHS)
    with offload("qwen2_moe", mode="static", cache_ratio=0.5) as engine:
        want = engine.logits(prompts[1])
        engine.experts.forms = dict.fromkeys(engine.experts.forms, form)
        assert np.abs(engine.logits(prompts[1]) - want).max() < 2e-5 * np.abs(want).max()


def test_engines_of_one_open_checkpoint_share_its_experts():
    checkpoint = TinyCheckpoint.of("qwen2_moe")
    one, other = (
        TorchOffload(checkpoint, mode="static", threads=1, profile=tiny.costs(checkpoint.config)) for _ in range(2)
    )
    third = TorchOffload(
        TinyCheckpoint.of("qwen2_moe"), mode="static", threads=1, profile=tiny.costs(checkpoint.config)
    )
    banks = [engine._parts.forward.host_banks for engine in (one, other, third)]
    assert banks[0] is banks[1] is not banks[2]
    for engine in (one, other, third):
        engine.close()


def test_a_cache_policy_of_ones_own_plugs_in():
    class Mine(POLICIES["lru"]):
        pass

    options = {"mode": "hybrid", "cache_ratio": 0.5, "clock": "virtual"}
    found = []
    for cache in ("lru", Mine):
        with offload("qwen2_moe", cache=cache, **options) as engine:
            found.append(engine.generate(tiny.prompts(engine.config, LENGTHS), max_new_tokens=4))
            assert cache == "lru" or all(isinstance(policy, Mine) for policy in engine.planner.policies)
    assert found[0].token_ids == found[1].token_ids
    assert found[0].stats.total("hits") == found[1].stats.total("hits")


def test_sampling_draws_as_ours():
    options = {"clock": "virtual", "cache_ratio": 0.5}
    drawn = {"max_new_tokens": 8, "temperature": 0.9, "top_k": 20, "top_p": 0.9, "seed": 7}
    ours = tiny.engine("qwen2_moe", **options)
    prompts = tiny.prompts(ours.config, LENGTHS)
    with offload("qwen2_moe", **options) as engine:
        assert engine.generate(prompts, **drawn).token_ids == ours.generate(prompts, **drawn).token_ids
    ours.close()


def test_interleaved_streams_count_what_is_theirs():
    options = {"mode": "lru", "cache_ratio": 0.25, "clock": "virtual"}
    prompts = tiny.prompts(tiny.weights("qwen2_moe")[0], LENGTHS)[:2]
    with offload("qwen2_moe", **options) as engine:
        stats = tiny.in_turns([engine.steps(prompt, max_new_tokens=6) for prompt in prompts])
        issued = [one.prefetch.issued for one in stats]
        assert sum(issued) == engine.planner.counters.prefetch_issued and all(issued)
        assert [one.new_tokens for one in stats] == [6, 6]


def test_an_interrupted_step_leaves_an_engine_that_answers(monkeypatch):
    prompt = tiny.prompts(tiny.weights("qwen2_moe")[0], (12,))
    with offload("qwen2_moe", mode="lru", cache_ratio=0.25, debug=True) as engine:
        want = engine.generate(prompt, max_new_tokens=4).token_ids
        forward, steps = type(engine._parts.forward), []

        def third_is_interrupted(self, step, caches, run=forward.forward):
            steps.append(step)
            if len(steps) == 3:
                raise KeyboardInterrupt
            return run(self, step, caches)

        for method, broken, kept in [
            ("record", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt), 0),
            ("forward", third_is_interrupted, 2),
        ]:
            with monkeypatch.context() as patch:
                patch.setattr(forward, method, broken)
                with pytest.raises(KeyboardInterrupt):
                    engine.generate(prompt, max_new_tokens=4)
            assert engine.partial.token_ids == [want[0][:kept]]
        assert engine.generate(prompt, max_new_tokens=4).token_ids == want and engine.partial is None


def test_a_batch_that_a_budget_did_not_reserve_is_refused():
    """As of our engine: the bytes that both may take are equal."""
    with TorchOffload(vram_budget="17MiB", max_context=256) as engine:
        with pytest.raises(UserError, match="raise max_batch"):
            engine.generate(["My lord,"] * 3, max_new_tokens=2)
        assert len(engine.generate("My lord,", max_new_tokens=2).token_ids[0]) == 2


def test_steps_take_no_stop_strings():
    """Nobody would look for them."""
    with TorchOffload(cache_ratio=0.25) as engine, pytest.raises(UserError, match="steps take no stop strings"):
        engine.steps("My lord,", stop="x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda"}, "no GPU"),
        ({"device": "tpu"}, "device 'tpu' is unknown"),
        ({"mode": "nothing"}, "system 'nothing' is unknown"),
        ({"mode": "freetoken"}, "streams no whole layers"),
        ({"executor": "dense"}, "no option 'executor'"),
        ({"precision": "int4"}, "precision 'int4' is unknown"),
        ({"vram_budget": "1KiB"}, "too small"),
    ],
)
def test_bad_options_are_refused_in_a_line(options, message):
    with pytest.raises(UserError, match=message):
        offload("qwen2_moe", **options)


def test_without_torch_the_message_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r'pip install "hybrimoe-jax\[baseline\]"'):
        TorchOffload()


def test_on_a_cpu_it_says_so_once(capsys):
    torch_offload._said.clear()
    for _ in range(2):
        with offload("qwen2_moe", mode="static") as engine:
            assert "this measures PyTorch on the CPU" in engine.notes[0]
    assert capsys.readouterr().err.count("this measures PyTorch on the CPU") == 1


@pytest.mark.parametrize("context", [12, 300])
def test_costs_are_measured_within_the_context(context):
    with offload("qwen2_moe", mode="hybrid", max_context=context, profile=None) as engine:
        assert len(engine.generate([[3, 5, 7]], max_new_tokens=4).token_ids[0]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", hf_cases.CASES)
def test_every_family_gives_the_logits_of_transformers(name):
    pytest.importorskip("transformers", reason="the families are compared with Hugging Face transformers")
    import hf
    import torch

    read = hf.load_folder(hf.hf_folder(name))
    experts = [tuple(map(np.asarray, layer)) for layer in read.experts if layer is not None]
    checkpoint = TinyCheckpoint(read.config, {n: np.asarray(a) for n, a in read.params.items()}, experts)
    prompts = hf.prompts(1)
    options = {"cache_ratio": 0.5, "debug": True, "profile": tiny.costs(read.config), "threads": 1, "prefill_chunk": 16}
    with TorchOffload(checkpoint, mode="lru", **options) as engine, torch.inference_mode():
        new = engine.generate(prompts, max_new_tokens=8).token_ids
        for prompt, tokens in zip(prompts, new, strict=True):
            ids = prompt + tokens
            want = hf.hf_model(name)(torch.tensor([ids])).logits[0].numpy()
            got = engine.logits(ids)
            assert np.abs(got - want).max() < 2e-5 * np.abs(want).max()
            assert tokens == want[len(prompt) - 1 : -1].argmax(1).tolist()


@pytest.mark.parametrize(
    ("left_out", "options"),
    [(["kernels"], {"format": "int4-g32", "precision": "bfloat16"}), (["forms"], {}), (["kernels", "forms"], {})],
)
def test_what_is_left_out_is_not_used_and_the_answer_stays(left_out, options, monkeypatch):
    wide = {**tiny.CONFIGS["qwen2_moe"], "hidden_size": 64, "moe_intermediate_size": 64}  # as torch's kernel wants them
    monkeypatch.setitem(tiny.CONFIGS, "wide", wide)
    with offload("wide", **options) as whole, offload("wide", **options, without=left_out) as without:
        if options:
            assert whole.experts.kind.int4 is not None and without.experts.kind.int4 is None
        else:
            assert whole.experts.measured and not without.experts.measured
            assert set(without.experts.forms.values()) == {"loop"}
        (prompt,) = tiny.prompts(whole.config, (12,))
        ours, theirs = (engine.logits(prompt) for engine in (whole, without))
        assert np.abs(ours - theirs).max() < 0.1 * np.abs(ours).max(), "of another rounding"
    with pytest.raises(UserError, match="without"):
        offload("qwen2_moe", without=["nothing"])
