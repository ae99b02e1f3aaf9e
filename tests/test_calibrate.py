"""Calibrating: what is measured comes back, what it means is said, and where a file may be used."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import golden
import numpy as np
import pytest
import tiny

from hybrimoe_jax import calibrate as command
from hybrimoe_jax.engine.calibration import WHOLE
from hybrimoe_jax.engine.warmup import AT_LOAD, measure, sample
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.host_kernels.native import pace
from hybrimoe_jax.machine import break_even
from hybrimoe_jax.machine.calibration import Calibration
from hybrimoe_jax.machine.costs import CostModel
from hybrimoe_jax.machine.fit import Samples, fit, predicted
from hybrimoe_jax.machine.origin import Machine, Origin
from hybrimoe_jax.machine.profile import load_costs, load_profile
from hybrimoe_jax.machine.shapes import SHAPES, get_shape, shape_of

SHAPE = get_shape("deepseek-v2-lite")
TRUTH = CostModel(
    cpu_expert=1.1e-3, cpu_token=3e-5, cpu_first=8e-4, device_expert=4e-5, device_token=1e-6, shared_base=1e-4,
    shared_token=1e-6, layer_base=2e-4, layer_token=1e-6, transfer_latency=2e-5, bandwidth=1e10,
    bandwidth_cpu_busy=6e9, expert_bytes=SHAPE.expert_bytes("int4"), look=1e-4, device_block=3e-4, layer_context=2e-9,
)  # fmt: skip


class FakeLanes:
    """Lanes that take exactly as long as the given costs say, on a clock of their own."""

    moves_parts = True

    def __init__(self, costs, noise: float = 0.0):
        self.costs, self.expert_bytes, self.shares_cores = costs, costs.expert_bytes, costs.shares_cores
        self.part_bytes = self.expert_bytes // 3
        self.time, self.noise = 0.0, np.random.default_rng(0).normal(1, noise, 10**5).clip(0.1)
        self.fetch_host, self.look, self.handover = (lambda *_: costs.fetch_host), (lambda: costs.look), (lambda _: 0.0)
        self.opens, self.most_experts = (lambda tokens: True), (lambda tokens: None)
        self.dispatch = lambda tokens, experts: 0.0
        self.beside_cpu = self.beside_link = contextlib.nullcontext
        self.runs = 0

    def now(self) -> float:
        return self.time

    def prepare(self) -> None:
        pass

    def lasting(self, seconds: float):
        def run() -> None:
            self.runs += 1
            self.time += seconds * self.noise[self.runs % len(self.noise)]

        return run

    def cpu(self, load: int, experts: int, wide: bool = False):
        costs = self.costs
        if wide:
            return self.lasting(costs.alone_first + experts * costs.alone(load))
        return self.lasting(costs.cpu(load, True) + (experts - 1) * costs.cpu(load))

    def device(self, tokens: int, experts: int):
        costs = self.costs
        block = 0.0 if experts else getattr(costs, "device_block", 0.0)
        return self.lasting(costs.shared(tokens) - block + experts * costs.device(tokens))

    def layer_front(self, tokens: int, context: int):
        return self.lasting(self.costs.layer(tokens, context))

    def transfer(self, size: int):
        return self.lasting(self.link(size, False))

    def prefetch(self, size: int):
        return self.lasting(self.link(size, True))

    def link(self, size: int, busy: bool) -> float:
        if isinstance(self.costs, CostModel):
            latency = self.costs.transfer_latency
            return latency + size / (self.costs.bandwidth_cpu_busy if busy else self.costs.bandwidth)
        return self.costs.transfer(busy) * (size / self.expert_bytes)


def same(found: CostModel, truth, within: float) -> None:
    for load in (1, 2, 8, 50, 120):
        assert found.cpu(load) == pytest.approx(truth.cpu(load), rel=within)
        assert found.cpu(load, True) == pytest.approx(truth.cpu(load, True), rel=within)
        assert found.device(load) == pytest.approx(truth.device(load), rel=within)
        assert found.shared(load) == pytest.approx(truth.shared(load), rel=within)
        assert found.layer(load, 300) == pytest.approx(truth.layer(load, 300), rel=within)
    assert found.layer(1, 2000) == pytest.approx(truth.layer(1, 2000), rel=within)
    for busy in (False, True):
        assert found.transfer(busy) == pytest.approx(truth.transfer(busy), rel=within)


def taken(lanes: FakeLanes) -> Samples:
    samples = Samples(lanes.expert_bytes)
    for _ in sample(lanes, samples, WHOLE, 0.0, 3, False):
        pass
    return samples


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_what_lanes_cost_comes_back(noise):
    found = fit(taken(FakeLanes(TRUTH, noise)))
    same(found, TRUTH, 0.01 if not noise else 0.1)
    assert found.look == 3 * TRUTH.look and not found.shares_cores


def test_the_warm_up_at_load_finds_the_same_with_fewer_points():
    lanes = FakeLanes(TRUTH)
    found = measure(lanes, 0.0, 3)
    for load in (1, 30):
        assert found.cpu(load, True) == pytest.approx(TRUTH.cpu(load, True), rel=0.01)
        assert found.device(load) == pytest.approx(TRUTH.device(load), rel=0.01)
    assert found.device_block == pytest.approx(TRUTH.device_block, rel=0.01)
    assert lanes.runs < 8 * sum(map(len, (AT_LOAD.cpu, AT_LOAD.device, AT_LOAD.layer))) + 30


@pytest.mark.parametrize("profile", ["a6000-paper", "rtx4090-pcie4", "laptop-8gb"])
def test_machines_that_are_not_linear_come_back_too(profile):
    """Theirs read weights in the shadow of computing, or the other way round."""
    truth = load_profile(profile).costs(SHAPE, "int4-g64")
    same(fit(taken(FakeLanes(truth))), truth, 0.1)


def calibration(costs=TRUTH, points=(), **about) -> Calibration:
    machine = Machine(**{"processor": "A processor", "cores": 8, "device": "A GPU", **about})
    return Calibration(costs, Origin(machine, SHAPE, "int4"), tuple(points))


def test_break_even():
    costs = dataclasses.replace(TRUTH, device_floor=0.0, device_token=0.0)
    load = break_even.fetch_from_load(costs)
    assert load is not None and costs.transfer(True) + costs.device(load) < costs.cpu(load)
    assert load == 1 or costs.transfer(True) + costs.device(load - 1) >= costs.cpu(load - 1)
    assert break_even.fetch_from_load(costs.scaled(transfer=1e6)) is None
    assert break_even.layers_to_hide(costs, costs.transfer(True) / 2.5) == 3


def test_a_noisy_machine_is_said_to_be_one():
    samples = taken(FakeLanes(TRUTH))
    quiet = calibration(fit(samples), samples.points)
    assert quiet.warnings() == [] and quiet.misfit < 0.01
    again = dataclasses.replace(samples.points[0], kind="again", seconds=3 * samples.points[0].seconds)
    noisy = dataclasses.replace(quiet, points=(*quiet.points, again))
    assert noisy.drift == pytest.approx(2) and "noisy" in noisy.warnings()[0]


def test_the_file_is_a_profile_of_its_model_and_machine(tmp_path):
    samples, path = taken(FakeLanes(TRUTH)), tmp_path / "p.json"
    found = calibration(fit(samples), samples.points)
    found.save(path)
    here = found.origin.machine
    assert load_costs(path, SHAPE, "int4", here) == load_costs(path, SHAPE, "int4") == found.costs
    assert Origin.read(path) == found.origin
    first = json.loads(path.read_text())["points"][0]
    assert first["kind"] == "cpu" and first["load"] == first["experts"] == 1 and abs(first["residual"]) < 0.01
    deeper = dataclasses.replace(SHAPE, name="deeper", layers=80)
    assert load_costs(path, deeper, "int4") == found.costs, "layers of the same kind"
    for here, said in (
        (Machine("A processor", 4, "A GPU"), "measured on another machine.*8 cores.*--clock virtual"),
        (Machine("A processor", 8, "cpu"), "another machine"),
    ):
        with pytest.raises(UserError, match=said):
            load_costs(path, SHAPE, "int4", here)
    with pytest.raises(UserError, match=r"another model.*deepseek-v2-lite: top_k 6"):
        load_costs(path, dataclasses.replace(SHAPE, name="wider", top_k=7), "int4")
    with pytest.raises(UserError, match=r"experts of \d+ bytes, those of"):
        load_costs(path, SHAPE, "int4-g128")


def test_a_damaged_record_of_its_origin_is_one_clear_error(tmp_path):
    path = tmp_path / "p.json"
    calibration().save(path)
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, "origin": {"machine": 3}}))
    with pytest.raises(UserError, match=r"p\.json: its record of where it was measured is damaged"):
        load_costs(path, SHAPE, "int4")


def test_an_engine_refuses_to_plan_with_another_machines_file_and_computes_its_times(tmp_path):
    path = tmp_path / "p.json"
    engine = tiny.engine(profile=None)
    engine.save_profile(path)
    engine.close()
    tiny.engine(profile=path).close()
    raw = json.loads(path.read_text())
    raw["origin"]["machine"]["processor"] = "A faster one"
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError, match="measured on another machine \\(A faster one"):
        tiny.engine(profile=path)
    tiny.engine(profile=path, clock="virtual").close()


def test_the_bundled_model_is_the_shape_that_is_named_so():
    """So a file that was calibrated with it serves the simulator too."""
    from hybrimoe_jax.checkpoint.reader import open_checkpoint
    from hybrimoe_jax.engine.load import bundled_model

    config = open_checkpoint(bundled_model()).config
    Origin(Machine("", 1, "cpu"), shape_of(config, "mine"), "f32").check_model("p", SHAPES["bundled"], "f32")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--out", "no/such/folder/p.json"], "--out"),
        (["--cost-shape", "deepseek-v2-lite"], "virtual clock or a paced device"),
        (["--device", "paced:nothing"], "profile nothing"),
        (["--cache-ratio", "2"], "outside 0..1"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_measured(flags, said):
    with pytest.raises(UserError, match=said):
        command.main(flags)


def test_the_command(tmp_path, monkeypatch, capsys):
    """On a tiny model and few points: the table, one JSON line, the file, the picture."""
    from hybrimoe_jax.engine import calibration as room
    from hybrimoe_jax.engine import load

    pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")
    monkeypatch.setattr(load, "load", lambda path, options: tiny.engine(profile=None, cache_ratio=0.5))
    few = dataclasses.replace(AT_LOAD, shares=(0.5,), repeats=(2, 2))
    measure_all = room.calibrate
    monkeypatch.setattr(room, "calibrate", lambda engine, show: measure_all(engine, show, few))
    monkeypatch.setattr(room, "STEPS", 4)
    out, plot = tmp_path / "p.json", tmp_path / "p.png"
    assert command.main(["--out", str(out), "--plot", str(plot)]) == 0
    printed = capsys.readouterr().out
    record = json.loads(printed.splitlines()[-1])
    golden.check(record)
    assert [line for line in printed.splitlines()[:-1] if len(line) > 80] == [] and "CPU expert" in printed
    assert {each["system"] for each in record["expected"]} >= {"hybrimoe", "cpu-only", "ktransformers"}
    assert record["lookahead"] >= 1 and record["machine"]["device"] == "cpu" and len(record["points"]) > 20
    assert CostModel.load(out) == CostModel(**record["costs"]) and plot.stat().st_size > 10_000
    kinds = {"cpu", "alone", "device", "layer", "transfer", "transfer_cpu_busy", "threads", "cpu_link_busy", "again"}
    assert kinds <= {point["kind"] for point in record["points"]}
    tiny.engine(profile=out).close()


def test_the_fastest_host_memory_is_named_and_what_is_refused_left_out(monkeypatch):
    import jax
    from fake_device import FakeClient

    from hybrimoe_jax.engine import memory_kinds

    device, client, ticks = jax.devices()[0], FakeClient(), iter(range(10**6))
    monkeypatch.setattr(memory_kinds, "client_of", lambda device: client)
    found = memory_kinds.seconds_by_memory(device, 4096, lambda: float(next(ticks)))
    assert {"plain", "mapped"} <= found.keys() and len(client.mapped) == 4 and not client.ranges
    client.refuse = 6
    assert "mapped" not in memory_kinds.seconds_by_memory(device, 4096, lambda: float(next(ticks)))
    assert not client.ranges, "given back"
    assert (
        memory_kinds.fastest({"plain": 2.0, "mapped": 1.0}) == "mapped" and memory_kinds.fastest({"plain": 1.0}) is None
    )


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.skipif(not pace.available(), reason="the package was installed without its FFI handlers")
def test_a_paced_device_gives_its_profile_back(tmp_path):
    """By the wall, through the engine's own programs and lanes; and such a file is read as a paced device's profile."""
    size = tiny.costs(tiny.weights("qwen2_moe")[0]).expert_bytes
    truth = dataclasses.replace(
        TRUTH, cpu_expert=3e-3, cpu_token=2.5e-4, cpu_first=4e-3, device_expert=1.5e-2, device_token=0.0,
        shared_base=6e-2, shared_token=0.0, device_block=0.0, layer_base=5e-2, layer_token=0.0, layer_context=1e-5,
        transfer_latency=0.0, bandwidth=size / 1.5e-2, bandwidth_cpu_busy=size / 2.5e-2, expert_bytes=size,
    )  # fmt: skip
    truth.save(tmp_path / "p.json")
    script = Path(__file__).with_name("paced_calibration.py")
    environment = {name: value for name, value in os.environ.items() if name != "NPROC"}
    command = [sys.executable, str(script), str(tmp_path / "p.json"), "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert {name: off for name, off in record["off"].items() if abs(off) > 0.1} == {}
    assert record["device"] == f"paced:{tmp_path / 'p.json'}:2" and record["device"] in record["source"]


def test_points_are_as_the_cost_model_reads_them():
    for point in taken(FakeLanes(TRUTH)).points:
        assert predicted(TRUTH, point.kind, point.at) == pytest.approx(point.seconds, rel=1e-9)
