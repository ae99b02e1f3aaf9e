"""What `auto` measured is kept in the machine's profile: a second start measures nothing, another key measures again."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import tiny
import tiny_checkpoint

from hybrimoe_jax import generate
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.packing import Format, PackedExpert, pack_expert
from hybrimoe_jax.host_kernels import ExpertWeights, choices
from hybrimoe_jax.host_kernels.auto import AutoKernel
from hybrimoe_jax.host_kernels.choices import Measurement, merged, processor, read_measurement
from hybrimoe_jax.host_kernels.native import library as native

pytestmark = pytest.mark.skipif(not native.available(), reason="the package was installed without a C++ compiler")


@pytest.fixture
def races(monkeypatch):
    """The loads that were measured, with invented times: the native kernel wins at load 1, NumPy elsewhere."""
    made: list[int] = []

    def race(self, handles, load):
        made.append(load)
        return {form: 1.0 + (form == ("reference" if load == 1 else "native")) for form in handles}

    monkeypatch.setattr(AutoKernel, "_race", race)
    return made


def plain(width=40, hidden=24) -> ExpertWeights:
    rng = np.random.default_rng(0)
    return ExpertWeights(
        rng.standard_normal((2 * hidden, width), np.float32), rng.standard_normal((width, hidden), np.float32)
    )


def packed(name: str, width=64, hidden=64) -> PackedExpert:
    rng = np.random.default_rng(0)
    shapes = ((hidden, width), (hidden, width), (width, hidden))
    return pack_expert(*(rng.standard_normal(shape, np.float32) for shape in shapes), Format.parse(name))


def through_json(measurement: Measurement) -> Measurement:
    return read_measurement(json.loads(json.dumps(measurement.record())), "here")


@pytest.mark.parametrize("sample", [plain(), packed("int4-g32")], ids=["f32", "int4-g32"])
def test_a_known_measurement_replaces_measuring(sample, races):
    first = AutoKernel(sample, loads=(1, 4))
    assert races == [1, 4] and not first.reused
    again = AutoKernel(sample, loads=(1, 4), known=[through_json(first.measurement)])
    assert races == [1, 4] and again.reused and again.describe()["from_profile"]
    assert again.choices == first.choices and again.pack_seconds == first.pack_seconds
    fewer = AutoKernel(sample, loads=(4,), known=[first.measurement])
    assert races == [1, 4] and fewer.choices["unpacked"] == {4: "reference"}


@pytest.mark.parametrize(
    "change", ["shape", "format", "load", "threads", "processor", "cores", "native build", "onednn", "method"]
)
def test_whatever_decides_the_speed_is_in_the_key(change, races, monkeypatch, tmp_path):
    known = [AutoKernel(packed("int4-g32"), loads=(1, 4)).measurement, AutoKernel(plain(), loads=(1, 4)).measurement]
    races.clear()
    sample, options = plain(), {}
    if change == "shape":
        sample = plain(hidden=25)
    elif change == "format":
        sample = packed("int4-g64")
    elif change == "load":
        options["loads"] = (1, 4, 8)
    elif change == "threads":
        options["threads"] = 2
    elif change == "method":
        monkeypatch.setattr(choices, "METHOD", choices.METHOD + 1)
    elif change == "processor":
        monkeypatch.setattr(choices, "processor", lambda: "another")
    elif change == "cores":
        monkeypatch.setattr(choices.os, "sched_getaffinity", lambda _: range(99))
    elif change == "onednn":
        monkeypatch.setattr(AutoKernel, "_add_onednn", lambda self, *_: None)
        if "onednn" not in known[1].key["libraries"]:
            pytest.skip("oneDNN is not installed (extra onednn)")
    else:
        rebuilt = shutil.copy(native.path(), tmp_path)
        with open(rebuilt, "ab") as file:
            file.write(b"\0")
        monkeypatch.setenv(native.VARIABLE, rebuilt)
    kernel = AutoKernel(sample, known=known, **{"loads": (1, 4), **options})
    assert races == list(options.get("loads", (1, 4))) and not kernel.reused


def test_a_new_measurement_replaces_only_its_own():
    old, other = Measurement({"width": 1}, {1: {"a": 1.0}}), Measurement({"width": 2}, {1: {"a": 1.0}})
    new = Measurement({"width": 1}, {1: {"a": 2.0}})
    assert merged([old, other], new) == [other, new] and merged([old, other], None) == [old, other]


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("key"),
        lambda record: record.update(key=3),
        lambda record: record.update(seconds={}),
        lambda record: record["seconds"]["1"].update(native="fast"),
        lambda record: record["seconds"]["1"].update(native=float("nan")),
        lambda record: record["seconds"]["4"].pop("native"),
        lambda record: record["seconds"].update(one={"native": 1.0, "reference": 1.0}),
        lambda record: record.update(pack_seconds=-1),
        lambda record: [row.update({"onednn-packed": 0.5}) for row in record["seconds"].values()],  # packed in no time
        lambda record: [row.update(magic=0.5) for row in record["seconds"].values()],
        lambda record: record.update(seconds={"1": {"onednn-packed": 1.0}}, pack_seconds=1.0),
    ],
)
def test_a_damaged_record_is_one_clear_error(change):
    record = Measurement({"width": 1}, {load: {"native": 1.0, "reference": 2.0} for load in (1, 4)}).record()
    record = json.loads(json.dumps(record))
    change(record)
    with pytest.raises(UserError, match=r"p\.json: not a usable profile.*measure it again"):
        read_measurement(record, "p.json")


def test_the_processor_is_named(tmp_path):
    """A cloud's virtual machines call several generations by one name."""

    def named(*lines: str) -> str:
        (tmp_path / "cpuinfo").write_text(
            "\n".join(["processor\t: 0", *lines, "", "processor\t: 1", "model name\t: another"])
        )
        return processor(str(tmp_path / "cpuinfo"))

    older = ("cpu family\t: 25", "model\t\t: 1", "model name\t: Some CPU @ 2.00GHz", "stepping\t: 1")
    newer = ("cpu family\t: 26", *older[1:])
    assert named(*older) == "Some CPU @ 2.00GHz cpu family 25 model 1 stepping 1" != named(*newer)
    assert named("model name\t: Some CPU") == "Some CPU"
    assert processor(str(tmp_path / "absent"))  # what Python knows


@pytest.mark.parametrize("sample", ["plain", "int4-g32"])
def test_a_large_expert_is_measured_by_a_part_of_it(sample, monkeypatch):
    monkeypatch.setattr("hybrimoe_jax.host_kernels.auto.SAMPLE_WIDTH", 64)
    monkeypatch.setattr("hybrimoe_jax.host_kernels.auto.SAMPLE_HIDDEN", 32)
    shapes = []
    measure = AutoKernel._measure
    monkeypatch.setattr(
        AutoKernel,
        "_measure",
        lambda self, sample, *rest: shapes.append((sample.width, sample.hidden)) or measure(self, sample, *rest),
    )
    whole = plain(width=128, hidden=96) if sample == "plain" else packed(sample, width=128, hidden=96)
    kernel = AutoKernel(whole, loads=(1,))
    assert shapes == [(64, 32)] and kernel.measurement.key["hidden"] == 96


def test_what_was_measured_while_memory_ran_out_is_not_kept(monkeypatch):
    onednn = pytest.importorskip("hybrimoe_jax.host_kernels.onednn")
    try:
        onednn.OneDnnKernel(1)
    except UserError:
        pytest.skip("oneDNN is not installed (extra onednn)")
    monkeypatch.setattr(onednn.OneDnnKernel, "pack", lambda self, handle: False)
    kernel = AutoKernel(plain(), loads=(1, 4))
    assert kernel.measured and kernel.measurement is None


def test_a_profile_carries_it_from_engine_to_engine(races, tmp_path):
    path, twice = tmp_path / "machine.json", tmp_path / "twice.json"
    first = tiny.engine("qwen2_moe", host_kernel="auto")
    assert first.measured_kernels and races
    first.save_profile(path)
    races.clear()
    again = tiny.engine("qwen2_moe", host_kernel="auto", profile=path)
    assert races == [] and not again.measured_kernels
    ids = tiny.prompts(first.config, (9,))
    assert again.generate(ids, max_new_tokens=4).token_ids == first.generate(ids, max_new_tokens=4).token_ids
    assert again.stats.host_kernel["from_profile"] and not first.stats.host_kernel["from_profile"]
    again.save_profile(twice)
    assert twice.read_text() == path.read_text()
    for engine in (first, again):
        engine.close()


def test_the_command_measures_once_and_adds_what_a_profile_lacks(races, tmp_path, capsys):
    folder, path = tiny_checkpoint.converted(tmp_path / "model"), tmp_path / "machine.json"

    def run() -> dict:
        flags = ["--prompt-ids", "1,2,3", "--max-tokens", "2", "--stats", "json", "--profile", str(path)]
        assert generate.main(["--model", str(folder), *flags]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    run()
    assert races
    raw = json.loads(path.read_text())
    assert len(raw["kernels"]) == 1

    races.clear()
    assert run()["host_kernel"]["from_profile"] and races == []

    raw["kernels"][0]["key"]["processor"] = "another machine's"
    path.write_text(json.dumps(raw))
    assert not run()["host_kernel"]["from_profile"] and races
    written = json.loads(path.read_text())
    assert len(written["kernels"]) == 2, "the other machine's record is kept beside this one's"
    assert written["cpu_expert"] == raw["cpu_expert"]

    races.clear()
    assert run()["host_kernel"]["from_profile"] and races == []


def test_a_profile_that_cannot_be_written_is_only_a_note(races, tmp_path, capsys, monkeypatch):
    engine = tiny.engine("qwen2_moe", host_kernel="auto")
    engine.save_profile(tmp_path / "machine.json")

    def refused(path):
        raise UserError(f"{path}: cannot be written (read-only)")

    monkeypatch.setattr(engine, "save_profile", refused)
    generate.extend_profile(engine, str(tmp_path / "machine.json"))
    assert "note:" in capsys.readouterr().err
    engine.close()
