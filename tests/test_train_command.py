"""`python -m hybrimoe_jax.train` from texts to an evaluated model folder, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import golden
import pytest
from test_train_loop import VERSES

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.train import __main__ as train

SMALL = [
    *(
        "--vocab",
        "300",
        "--hidden",
        "16",
        "--layers",
        "1",
        "--heads",
        "2",
        "--kv-heads",
        "1",
        "--experts",
        "4",
        "--top-k",
        "2",
    ),
    *("--expert-width", "8", "--shared-width", "8", "--batch-tokens", "64", "--context", "32", "--eval-context", "16"),
]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "sonnet.txt").write_text(VERSES * 4)
    (folder / "other.txt").write_text("So long as men can breathe, or eyes can see,\nSo long lives this.\n")
    return folder


@pytest.fixture(scope="module")
def finished(texts, tmp_path_factory) -> tuple[Path, list[str]]:
    """A finished run's folder and the flags that it was made with."""
    run = tmp_path_factory.mktemp("run") / "run"
    flags = ["--text", str(texts), "--held-out", "other", "--run", str(run), *SMALL]
    assert train.main([*flags, "--steps", "2", "--save-every", "1"]) == 0
    return run, flags


@pytest.mark.slow
def test_run_leaves_a_log_and_a_model_that_evaluates_to_the_same(finished, capsys):
    run, flags = finished
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2]
    evaluations = [entry for entry in log if entry.get("event") == "evaluation"]
    assert [entry["step"] for entry in evaluations] == [1, 2]
    assert train.main([*flags, "--evaluate", str(run / "model")]) == 0
    lines = capsys.readouterr().out.splitlines()
    values = json.loads(lines[-1])
    assert values["loss_nats_per_byte"] == evaluations[-1]["loss_nats_per_byte"], (
        "the model on disk is the evaluated one"
    )
    assert set(values["works"]) == {"other"}
    record = json.loads((run / "training.json").read_text())
    assert record["works"] == ["sonnet"] and record["held_out"] == ["other"]
    assert [e["context"] for e in record["evaluations"]] == [16, 32], "also at the longest window"
    counts = json.loads((run / "model" / "expert_frequencies.json").read_text())["counts"]
    assert len(counts) == 1 and len(counts[0]) == 4 and sum(counts[0]) > 0, "activations on training text"
    assert any("held-out loss" in line for line in lines)


def test_finished_run_is_not_overwritten_and_resuming_it_only_evaluates(finished, capsys):
    run, flags = finished
    before = (run / "state.npz").read_bytes()
    with pytest.raises(UserError, match="--resume"):
        train.main([*flags, "--steps", "2"])
    assert train.main([*flags, "--steps", "2", "--resume"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["tokens"] > 0
    golden.check(said)
    assert (run / "state.npz").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--heads", "3"], "--hidden 16, --heads 3"),
        (["--top-k", "9"], "--top-k 9"),
        (["--vocab", "100"], "--vocab 100"),
        (["--held-out", "hamlet"], "hamlet"),
        (["--steps", "0"], "--steps 0"),
        (["--context", "100000"], "more text"),
        (["--evaluate", "no-such-model"], "no-such-model"),
        (["--eval-context", "64"], "--eval-context 64"),
        (["--learning-rate", "nan"], "--learning-rate nan"),
        (["--seed", "-1"], "--seed -1"),
        (["--resume"], r"--resume: .*run holds no run"),
        (["--resume", "--evaluate"], "nothing to --resume"),
    ],
)
def test_flags_that_do_not_fit_are_named(texts, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        train.main(["--text", str(texts), "--held-out", "other", "--run", str(tmp_path / "run"), *SMALL, *flags])


def test_bad_folder_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, "-m", "hybrimoe_jax.train", "--text", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "nowhere" in done.stderr and done.stderr.startswith("error: ")
