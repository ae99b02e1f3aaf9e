"""The cost model: its formulas, its fit from a warm-up and its file."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.sizes import expert_bytes
from hybrimoe_jax.machine.costs import CostModel
from hybrimoe_jax.machine.fit import Samples, fit, predicted

MODEL = CostModel(
    cpu_expert=2e-3,
    cpu_token=3e-5,
    cpu_first=5e-4,
    device_expert=4e-4,
    device_token=1e-7,
    shared_base=2e-4,
    shared_token=1e-6,
    layer_base=1e-3,
    layer_token=2e-6,
    transfer_latency=1e-5,
    bandwidth=1e10,
    bandwidth_cpu_busy=5e9,
    expert_bytes=4_000_000,
    source="a test",
)


def samples_of(model: CostModel, loads=(1, 2, 8, 64, 256), noise=lambda: 1.0) -> Samples:
    samples = Samples(model.expert_bytes)
    places = [("cpu", (load, experts)) for load in loads for experts in (1, 4)]
    places += [("device", (load, experts)) for load in loads for experts in (0, 1, 4)]
    places += [("layer", (load, context)) for load in loads for context in (256, 1024)]
    sizes = (model.expert_bytes // 4, model.expert_bytes)
    places += [(kind, (size,)) for kind in ("transfer", "transfer_cpu_busy") for size in sizes]
    for kind, at in places:
        samples.add(kind, at, predicted(model, kind, at) * noise())
    return samples


def without(samples: Samples, kind: str) -> Samples:
    return dataclasses.replace(samples, points=[point for point in samples.points if point.kind != kind])


def test_an_expert_is_three_matrices():
    assert expert_bytes(2048, 1408, "bf16") == 3 * 2048 * 1408 * 2
    assert expert_bytes(192, 64, "f32") == 147_456
    with pytest.raises(UserError, match=r"int3.*known: f32, bf16"):
        expert_bytes(8, 8, "int3")


def test_costs_by_load_and_regime():
    assert MODEL.cpu(10) == pytest.approx(2.3e-3)
    assert MODEL.cpu(10, first=True) - MODEL.cpu(10) == pytest.approx(5e-4)
    assert MODEL.transfer() == pytest.approx(1e-5 + 4e-4)
    assert MODEL.transfer(cpu_busy=True) == pytest.approx(1e-5 + 8e-4)
    assert MODEL.layer(100) == pytest.approx(1.2e-3)


@given(st.data())
def test_fit_recovers_the_model_behind_the_samples(data):
    seconds = st.floats(1e-6, 1e-2)
    names = "cpu_expert cpu_token cpu_first device_expert device_token device_block shared_base shared_token "
    names += "layer_base layer_token layer_context"
    values = {name: data.draw(seconds, name) for name in names.split()}
    fast = data.draw(st.floats(1e9, 1e11))
    busy = fast * data.draw(st.floats(0.2, 1.0))
    truth = CostModel(
        **values, transfer_latency=1e-5, bandwidth=fast, bandwidth_cpu_busy=busy, expert_bytes=10**7, source="t"
    )
    found = fit(samples_of(truth), source="t")
    for load in (1, 30, 300):
        assert found.cpu(load) == pytest.approx(truth.cpu(load), rel=1e-6)
        assert found.cpu(load, True) == pytest.approx(truth.cpu(load, True), rel=1e-6)
        assert found.device(load) == pytest.approx(truth.device(load), rel=1e-6)
        assert found.shared(load) == pytest.approx(truth.shared(load), rel=1e-6)
        assert found.layer(load, 500) == pytest.approx(truth.layer(load, 500), rel=1e-6)
    assert found.device_block == pytest.approx(truth.device_block, rel=1e-3)
    for cpu_busy in (False, True):
        assert found.transfer(cpu_busy) == pytest.approx(truth.transfer(cpu_busy), rel=1e-6)


@given(st.lists(st.tuples(st.integers(1, 500), st.integers(1, 8), st.floats(1e-6, 1.0)), min_size=1, max_size=12))
def test_fit_of_any_noise_is_a_valid_model(points):
    samples = Samples(10**6)
    for load, experts, seconds in points:
        for kind in ("cpu", "alone", "device", "layer"):
            samples.add(kind, (load, experts), seconds)
        for kind in ("transfer", "transfer_cpu_busy"):
            samples.add(kind, (load * 1000,), seconds)
    model = fit(samples)
    assert model.transfer(True) >= model.transfer() > 0 and model.cpu(1) >= 0  # and no UserError from the constructor


def test_fit_ignores_a_stray_interruption():
    samples = samples_of(MODEL)
    for seconds in (MODEL.cpu(1, True), MODEL.cpu(1, True), 40 * MODEL.cpu(1)):
        samples.add("cpu", (1, 1), seconds)
    assert fit(samples).cpu(1) == pytest.approx(MODEL.cpu(1), rel=1e-6)


def test_a_falling_measurement_gives_a_constant_not_a_negative_slope():
    samples = without(samples_of(MODEL), "device")
    for load, seconds in ((1, 4.5e-4), (100, 4.4e-4), (200, 4.3e-4)):
        samples.add("device", (load, 1), seconds)
        samples.add("device", (load, 2), 2 * seconds)
    model = fit(samples)
    assert model.device_token == 0 and model.device(1) == pytest.approx(4.4e-4, rel=0.03)


def test_without_busy_transfers_both_regimes_are_the_same():
    model = fit(without(samples_of(MODEL), "transfer_cpu_busy"))
    assert model.transfer(True) == model.transfer()


@pytest.mark.parametrize("name", ["cpu", "device", "transfer"])
def test_fit_names_what_was_not_measured(name):
    with pytest.raises(UserError, match=f"no {name} time"):
        fit(without(samples_of(MODEL), name))


def test_what_calling_the_device_takes_belongs_to_the_block():
    """Where it were charged to every expert, those that are resident would go to the CPU."""
    model = fit(samples_of(dataclasses.replace(MODEL, device_block=8e-4)))
    assert model.device(1) == pytest.approx(MODEL.device(1), rel=1e-6)
    assert model.shared(1) == pytest.approx(MODEL.shared(1) + 8e-4, rel=1e-6)


def test_a_small_load_takes_as_long_as_reading_the_weights():
    truth = dataclasses.replace(MODEL, cpu_expert=1e-4, cpu_token=1e-4, cpu_floor=9e-4)
    model = fit(samples_of(truth, (1, 4, 16, 64)))
    for load in (1, 2, 4, 8, 12, 40):
        assert model.cpu(load) == pytest.approx(truth.cpu(load), rel=1e-6)


def test_fit_refuses_impossible_times():
    samples = samples_of(MODEL)
    samples.add("device", (4, 1), 0.0)
    with pytest.raises(UserError, match=r"device measured 0\.0 s at \(4, 1\)"):
        fit(samples)


def test_scaled_slows_one_lane_only():
    slow = MODEL.scaled(cpu=2.0)
    assert slow.cpu(7, first=True) == pytest.approx(2 * MODEL.cpu(7, first=True))
    assert (slow.device(7), slow.transfer()) == (MODEL.device(7), MODEL.transfer())
    assert MODEL.scaled(transfer=3.0).transfer(True) == pytest.approx(3 * MODEL.transfer(True))
    assert "cpu x2" in slow.source


def test_save_and_load_round_trip(tmp_path):
    path = tmp_path / "profile.json"
    MODEL.save(path)
    assert CostModel.load(path) == MODEL
    assert [p.name for p in tmp_path.iterdir()] == ["profile.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(version=99), "version 99"),
        (lambda raw: raw.pop("cpu_token"), "missing cpu_token"),
        (lambda raw: raw.update(cpu_tokens=1), "unknown cpu_tokens"),
        (lambda raw: raw.update(cpu_token=-1), "cpu_token must be 0 or seconds from 1e-30 to"),
        (lambda raw: raw.update(cpu_token="fast"), "cpu_token must be 0 or seconds from 1e-30 to"),
        (lambda raw: raw.update(cpu_token=float("nan")), "cpu_token must be 0 or seconds from 1e-30 to"),
        (lambda raw: raw.update(cpu_token=10**400), "cpu_token must be 0 or seconds from 1e-30 to"),
        *(
            (lambda raw, value=value: raw.update(layer_place=value), "layer_place must be 0 or seconds from 1e-30 to")
            for value in (1e-310, 1e308, 1e9, True, None, [1.0])
        ),
        *(
            (lambda raw, value=value: raw.update(bandwidth=value), "bandwidth must be a number a second from 1e-06 to")
            for value in (0, 1e-310, 1e308, 1e30, float("inf"), "1e9")
        ),
        *(
            (lambda raw, value=value: raw.update(expert_bytes=value), "expert_bytes must be a whole number above 0")
            for value in (0, -1, 4e6, 1e308, 10**40, True)
        ),
        (
            lambda raw: raw.update(bandwidth_cpu_busy=2 * raw["bandwidth"]),
            "bandwidth_cpu_busy must not be above bandwidth",
        ),
        (lambda raw: raw.update(kind="recipe"), "not a profile"),
    ],
)
def test_a_malformed_profile_is_one_clear_error(tmp_path, change, message):
    path = tmp_path / "p.json"
    MODEL.save(path)
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError, match=message) as caught:
        CostModel.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00\x01", pytest.param("[" * 100_000 + "]" * 100_000, id="nested")])
def test_a_file_that_is_no_profile(tmp_path, text):
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(UserError, match="not a profile"):
        CostModel.load(path)


def test_files_that_cannot_be_opened(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        CostModel.load(tmp_path / "absent.json")
    with pytest.raises(UserError, match="cannot be written"):
        MODEL.save(tmp_path / "no" / "such" / "folder.json")
