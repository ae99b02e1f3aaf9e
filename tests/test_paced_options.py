"""`--device paced:PROFILE[:SLOWDOWN]`: what is refused, before weights are read, and what a run says of itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from types import SimpleNamespace

import pytest
import tiny

from hybrimoe_jax import generate
from hybrimoe_jax.engine.config import EngineConfig
from hybrimoe_jax.engine.fused.select import can_fuse
from hybrimoe_jax.engine.lanes import threads
from hybrimoe_jax.engine.stats import RunStats
from hybrimoe_jax.engine.stats_text import times_text
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.host_kernels.native import pace
from hybrimoe_jax.machine.paced import PacedDevice, parse_device
from hybrimoe_jax.machine.profile import FOLDER, load_profile

PACED = {"device": "paced:a6000-paper:8"}


def test_a_device_is_read_as_people_write_it(tmp_path):
    file = tmp_path / "a:b.json"
    file.write_text((FOLDER / "laptop-8gb.json").read_text())
    assert parse_device("auto") is None
    assert parse_device("paced:a6000-paper") == PacedDevice("a6000-paper", 1.0)
    assert parse_device("paced:a6000-paper:0.5") == PacedDevice("a6000-paper", 0.5)
    assert parse_device(f"paced:{file}") == PacedDevice(str(file), 1.0)
    assert parse_device(f"paced:{file}:20") == PacedDevice(str(file), 20.0)
    assert EngineConfig(**PACED).paced == PacedDevice("a6000-paper", 8.0)
    assert EngineConfig().paced is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "cuda"}, 'say "auto" or "paced:PROFILE'),
        ({"device": "paced:"}, "device 'paced:' is unknown"),
        ({"device": "paced:no-such-machine:8"}, "profile no-such-machine: neither a known one"),
        *(
            ({"device": f"paced:a6000-paper:{times}"}, "a number from 1e-6")
            for times in ("0", "-1", "nan", "inf", "slow", "")
        ),
        ({**PACED, "executor": "dense"}, "wants the overlapped executor"),
        ({**PACED, "executor": "callback"}, "wants the overlapped executor"),
        ({"device": "paced:a6000-paper", "clock": "virtual", "profile": "laptop-8gb"}, "is watched by the wall clock"),
        ({**PACED, "profile": "laptop-8gb"}, "names the profile to plan with"),
        ({**PACED, "cost_shape": "deepseek"}, "model shape 'deepseek' is unknown"),
        ({**PACED, "cost_shape": "bundled", "vram_budget": "1GiB"}, "cost_shape takes no vram_budget"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(options, said, monkeypatch):
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        EngineConfig(**options)
    flags = [part for name, value in options.items() for part in ("--" + name.replace("_", "-"), value)]
    monkeypatch.setattr("hybrimoe_jax.checkpoint.reader.open_checkpoint", lambda *_: pytest.fail("weights are read"))
    with pytest.raises((UserError, SystemExit)):
        generate.main(["--prompt", "x", *flags])


def test_a_profile_that_lacks_something_is_refused(tmp_path):
    raw = json.loads((FOLDER / "laptop-8gb.json").read_text())
    file = tmp_path / "p.json"
    for change, said in (
        ({"figures": {**raw["figures"], "link_latency": None}}, "link_latency"),
        ({"figures": {k: v for k, v in raw["figures"].items() if k != "cpu_first"}}, "'cpu_first' is missing"),
        ({"copies_wait": 1}, "copies_wait must be true or false"),
    ):
        file.write_text(json.dumps({**raw, **change}))
        with pytest.raises(UserError, match=said):
            EngineConfig(device=f"paced:{file}")
    file.write_text(json.dumps({**raw, "copies_wait": True}))
    assert load_profile(file).copies_wait and not load_profile("laptop-8gb").copies_wait


@pytest.mark.skipif(not pace.available(), reason="the package was installed without its FFI handlers")
def test_a_warm_up_of_another_model_is_refused(tmp_path):
    other = tiny.costs(tiny.weights("mixtral")[0], format="int4-g32")
    other.save(tmp_path / "p.json")
    with pytest.raises(UserError, match="measured with experts of"):
        os.environ["NPROC"] = "2"  # as where jax starts with the engine
        try:
            tiny.engine(profile=None, device=f"paced:{tmp_path / 'p.json'}")
        finally:
            os.environ["NPROC"] = "1"


def test_a_paced_device_asks_for_two_threads_and_refuses_fewer(monkeypatch):
    monkeypatch.setenv("NPROC", "1")
    assert threads.jax_started()
    with pytest.raises(UserError, match="needs two threads of XLA's pool"):
        threads.split_threads(None, "overlapped", paced=True)
    monkeypatch.setattr(threads, "jax_started", lambda: False)
    assert threads.split_threads(1, "overlapped", paced=True).device == 2
    assert os.environ["NPROC"] == "2" and threads.split_threads(1, "overlapped").device == 1


def test_a_paced_engine_is_never_fused():
    host = SimpleNamespace(kernel=SimpleNamespace(native_handle=lambda _: (1, 2)), handle=lambda *_: None)
    cpu = SimpleNamespace(platform="cpu")
    assert not can_fuse(EngineConfig(**PACED), cpu, host)


def test_a_run_says_paced_and_never_measured_there():
    stats = RunStats(
        system="hybrimoe", executor="overlapped", cache_ratio=0.25, clock="wall", host_kernel={}, device_kernel="xla",
        cores={}, costs={}, slots=[1], device="paced", profile="a6000-paper", slowdown=8.0,
    )  # fmt: skip
    record = stats.summary()
    assert (record["device"], record["profile"], record["slowdown"]) == ("paced", "a6000-paper", 8.0)
    text = times_text(record)
    assert "paced: a6000-paper, 8 times slower than it" in text and "not measured on that machine" in text
    assert "this machine" not in text


@pytest.mark.slow
@pytest.mark.skipif(not pace.available(), reason="the package was installed without its FFI handlers")
def test_the_command_runs_the_bundled_model_on_a_paced_device(tmp_path):
    flags = ["--device", "paced:a6000-engineered:2", "--cost-shape", "deepseek-v2-lite", "--stats", "json"]
    command = [sys.executable, "-m", "hybrimoe_jax.generate", "--prompt", "My lord,", "--max-tokens", "3", *flags]
    command += ["--timeline", str(tmp_path / "t.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    told = {"device": "paced", "profile": "a6000-engineered", "slowdown": 2.0, "clock": "wall"}
    assert {name: record[name] for name in told} == told
    assert record["overshoot"]["cpu"]["count"] > 0 and record["costs"]["slowdown"] == 2
    timeline = json.loads((tmp_path / "t.json").read_text())
    about = timeline["otherData"]
    assert {name: about[name] for name in told} == told and "2 times slower" in about["costs"]
    assert_side_by_side([event for event in timeline["traceEvents"] if event["ph"] == "X"])
    ran = [event["args"]["experts"] for event in timeline["traceEvents"] if event["name"] == "shared and residents"]
    assert ran and any(ran)


def assert_side_by_side(events):
    """At some moment the CPU and the device compute an expert each while a third one crosses the link."""
    lanes = {lane: [] for lane in ("cpu", "device", "link")}
    for event in events:
        if "expert" in event["args"] or event["args"].get("experts"):
            lanes[event["cat"]].append((event["ts"], event["ts"] + event["dur"]))
    assert any(max(begin for begin, _ in three) < min(end for _, end in three) for three in product(*lanes.values()))
