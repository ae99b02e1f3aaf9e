"""Machine profiles: every figure has a source, costs follow the formulas, and a wrong file is one clear error."""

import json
from pathlib import Path

import pytest

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.machine.costs import CostModel
from hybrimoe_jax.machine.profile import FOLDER, PROFILES, load_costs, load_profile
from hybrimoe_jax.machine.shapes import SHAPES, find_shape, get_shape, shape_of

SHAPE = get_shape("deepseek-v2-lite")


def test_the_issue_s_machines_are_there():
    assert set(PROFILES) == {"a6000-paper", "a6000-engineered", "rtx4090-pcie4", "h100-pcie5", "laptop-8gb"}


@pytest.mark.parametrize("name", PROFILES)
def test_every_figure_says_where_it_comes_from_and_costs_are_sane(name):
    profile = load_profile(name)
    assert all(kind and len(source) >= 4 for kind, source in profile.sources.values())
    for shape in SHAPES.values():
        costs = profile.costs(shape, "int4")
        assert 0 < costs.cpu(1) <= costs.cpu(8) < costs.cpu(1000) and costs.cpu(1, True) >= costs.cpu(1)
        assert 0 < costs.device(1) <= costs.device(1000)
        assert costs.transfer(True) >= costs.transfer() > 0
        assert costs.layer(1, 4096) > costs.layer(1) > 0 and costs.layer(512) >= costs.layer(1)
        assert costs.step(512) >= costs.step(1) > 0
        assert (costs.shared(512) > costs.shared(1)) <= bool(shape.shared)
        wider = profile.costs(shape, "bf16")
        assert wider.transfer() > costs.transfer() and wider.cpu(1) > costs.cpu(1)


def test_the_paper_s_profile_gives_back_the_released_fits():
    costs = load_profile("a6000-paper").costs(SHAPE, "int4")
    assert costs.expert_bytes == 4_325_376
    for load in (1, 10, 100, 500):
        assert costs.cpu(load, True) * 1e3 == pytest.approx(1.780 + 0.0292 * load + 5.1e-6 * load**2, rel=1e-6)
        assert costs.device(load) * 1e3 == pytest.approx(0.452, rel=1e-6)
    assert costs.shared(1) * 1e3 == pytest.approx(0.19, rel=1e-6)
    assert costs.transfer() * 1e3 == pytest.approx(0.418, rel=1e-6)


@pytest.mark.parametrize(
    ("model", "tokens", "active", "milliseconds"),
    [("mixtral-8x7b", 1, 2, 0.2587), ("mixtral-8x7b", 16, 8, 0.958), ("qwen3-30b-a3b", 1, 8, 0.0446),
     ("qwen3-30b-a3b", 16, 128, 0.4128)],
)  # fmt: skip
def test_the_h100_takes_what_was_measured_on_one(model, tokens, active, milliseconds):
    costs = load_profile("h100-pcie5").costs(get_shape(model), "bf16")
    load = -(-tokens * get_shape(model).top_k // active)
    assert (costs.shared(tokens) + active * costs.device(load)) * 1e3 == pytest.approx(milliseconds, rel=0.06)


def test_shapes_have_the_models_sizes():
    """Parameters of the experts and of everything else, in billions, as the models' cards give them."""
    for name, total in {
        "mixtral-8x7b": 46.7, "qwen2-57b-a14b": 57.4, "qwen3-30b-a3b": 30.5, "deepseek-v2-lite": 15.7,
        "gpt-oss-20b": 20.9, "olmoe-1b-7b": 6.9,
    }.items():  # fmt: skip
        s = SHAPES[name]
        weights = s.layers * (s.experts * s.expert + s.shared + s.attention) + s.leading + 2 * s.head
        assert weights / 1e9 == pytest.approx(total, rel=0.01)
    assert find_shape(26, 64, 6) == SHAPE and find_shape(1, 2, 3) is None
    assert find_shape(48, 128, 6).top_k == 6


def test_a_configuration_s_shape_is_the_table_s():
    config = Path(__file__).parents[1] / "hybrimoe_jax/assets/bundled/config.json"
    raw = json.loads(config.read_text())
    shape = shape_of(raw, "bundled")
    assert (shape.layers, shape.experts, shape.top_k) == (
        raw["num_hidden_layers"],
        raw["num_experts"],
        raw["num_experts_per_tok"],
    )
    assert shape.shared == 3 * raw["hidden_size"] * raw["shared_expert_intermediate_size"]


def test_what_if_a_figure_changes():
    profile = load_profile("a6000-engineered")
    faster = profile.changed(link_bandwidth=2.0, link_bandwidth_cpu_busy=2.0)
    assert faster.costs(SHAPE, "int4").transfer() < profile.costs(SHAPE, "int4").transfer()
    assert "x2" in faster.name and faster.name != profile.name


def test_a_saved_warm_up_serves_its_own_model_only(tmp_path):
    costs = CostModel(*[1e-4] * 9, 1e-5, 1e9, 1e9, SHAPE.expert_bytes("int4"), source="a test")
    costs.save(tmp_path / "mine.json")
    assert load_costs(tmp_path / "mine.json", SHAPE, "int4") == costs
    with pytest.raises(UserError, match="measured with experts of"):
        load_costs(tmp_path / "mine.json", SHAPE, "bf16")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda p: p.pop("kind"), "expected a JSON object of kind"),
        (lambda p: p.update(version=9), "version 9"),
        (lambda p: p["figures"].pop("cpu_first"), "'cpu_first' is missing"),
        (lambda p: p["figures"].update(turbo={"value": 1, "source": "x"}), "'turbo' is unknown"),
        (lambda p: p["figures"]["cpu_first"].update(value=-1), "cpu_first.value"),
        (lambda p: p["figures"]["cpu_first"].update(value=10**400), "cpu_first.value"),
        (lambda p: p["figures"]["cpu_bandwidth"].update(value=0), "a number a second from 1e-06 to"),
        (lambda p: p["figures"]["cpu_flops"].update(value=1e308), r"cpu_flops\.value must be a number a second"),
        (lambda p: p["figures"]["cpu_first"].update(value=1e-310), r"cpu_first\.value must be 0 or seconds from 1e-30"),
        (lambda p: p["figures"]["cpu_first"].update(value="fast"), "cpu_first.value"),
        (lambda p: p["figures"].update(cpu_first=3), "cpu_first.value"),
        (lambda p: p["figures"]["cpu_first"].update(source=" "), "no source"),
        (lambda p: p["figures"]["link_bandwidth_cpu_busy"].update(value=1e15), "must not be above"),
        (lambda p: p.update(combine={"cpu": "both"}), "combine.cpu"),
    ],
)
def test_a_wrong_profile_is_one_clear_error(tmp_path, edit, message):
    raw = json.loads((FOLDER / "laptop-8gb.json").read_text())
    edit(raw)
    (tmp_path / "p.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=message):
        load_profile(tmp_path / "p.json")


def test_an_unknown_name_lists_the_known_ones(tmp_path):
    with pytest.raises(UserError, match="laptop-8gb"):
        load_costs("a7000", SHAPE, "int4")
    for text in ("{", "[" * 100_000 + "]" * 100_000):
        (tmp_path / "broken.json").write_text(text)
        with pytest.raises(UserError, match="not valid JSON"):
            load_costs(tmp_path / "broken.json", SHAPE, "int4")
    with pytest.raises(UserError, match="known: "):
        get_shape("gpt-5")
