"""What `python -m hybrimoe_jax.generate` refuses: exit code 2, one line on stderr, nothing on stdout."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import tiny_checkpoint
from generate_cases import VIRTUAL, one_line, runner

from hybrimoe_jax import generate
from hybrimoe_jax.checkpoint.reader import Checkpoint

STATE = Path(__file__).parent / "data" / "formats" / "cache-state-1.npz"


@pytest.fixture
def here(checkpoint, tmp_path, in_process):
    """Runs the command on the checkpoint, in this process."""
    return runner(in_process, checkpoint, tmp_path / "machine.json")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--prompt", "x", "--system", "nope"), "'nope' is unknown"),
        (("--prompt", "x", "--cache", "nope"), "'nope' is unknown"),
        (("--prompt", "x", "--executor", "nope"), "'nope'"),
        (("--prompt", "x", "--cache-ratio", "1.5"), "1.5"),
        (("--prompt", "x", "--cache-ratio", "0.5", "--vram-budget", "1GiB"), "not both"),
        (("--prompt", "x", "--vram-budget", "lots"), "'lots'"),
        (("--prompt", "x", "--vram-budget", "9" * 400), "less than 8 EiB"),
        (("--prompt", "x", "--vram-budget", "10KiB"), "at least"),
        (("--prompt", "x", "--vram-budget", "auto"), "on a GPU"),
        (("--prompt", "x", "--max-tokens", "5000"), "max_context"),
        (("--prompt", "x", "--max-context", "100000"), "max_position_embeddings"),
        (("--prompt", "x", "--stop", ""), "stop string"),
        (("--prompt", "x", "--trace", "/nowhere/trace.npz"), "/nowhere"),
        (("--prompt", "x", "--profile", "/proc/x.json"), "--profile /proc/x.json: cannot be written"),
        (("--prompt", "x", "--profile", "/tmp"), "--profile /tmp: it is a folder"),
        (("--prompt", "x", "--timeline", "/tmp"), "--timeline /tmp: it is a folder"),
        ((*VIRTUAL, "--cost-shape", "nope"), "'nope' is unknown (known: mixtral-8x7b, "),
        ((*VIRTUAL, "--cost-shape", "olmoe-1b-7b:int5"), "'int5' is unknown"),
        ((*VIRTUAL, "--cost-shape", "olmoe-1b-7b:"), "'' is unknown"),
        ((*VIRTUAL, "--cost-shape", "olmoe-1b-7b", "--vram-budget", "1GiB"), "give cache_ratio"),
        (("--prompt", "x", "--cost-shape", "olmoe-1b-7b"), "cost_shape needs the virtual clock"),
        (
            ("--prompt", "x", "--predictor", "nope"),
            "previous, recorded:TRACE; or a class of yours as package.module:Class)",
        ),
        (("--prompt", "x", "--predictor", "recorded:/nowhere/t.npz"), "no such file"),
        (("--prompt", "x", "--profile", __file__), "not a profile"),
        (("--prompt", "x", "--temperature", "-1"), "temperature -1"),
        (("--prompt", "x", "--top-p", "0"), "top_p 0"),
        (("--prompt", "x", "--seed", "-1"), "seed -1"),
        (("--prompt", "x", "--max-tokens", "0"), "--max-tokens 0"),
        (("--prompt", "x", "--device-kernel", "cuda"), "computes quantised experts"),
        (("--prompt", "x", "--executor", "dense", "--vram-budget", "1GiB"), "no vram_budget"),
        (("--prompt", ""), "empty"),
        (("--prompt-ids", "1,x"), "'1,x'"),
        (("--prompt-ids", ","), "empty"),
        (("--prompt-ids", "1,264"), "264"),
        (("--prompt", "x", "--prompt-ids", "1"), "--prompt"),
        ((), "--prompt"),
        (("--prompt", "x", "--nonsense"), "--nonsense"),
        (("--prompt", "x", "--executor", "dense", "--trace", "trace.npz"), "dense"),
        (("--prompt", "x", "--executor", "dense", "--save-cache-state", "s.npz"), "it keeps no cache state"),
        (("--prompt", "x", "--save-cache-state", "/tmp"), "--save-cache-state /tmp: it is a folder"),
        (("--prompt", "x", "--load-cache-state", "/nowhere/s.npz"), "cache state /nowhere/s.npz: cannot be read"),
        (("--prompt", "x", "--load-cache-state", str(STATE)), "it is of toy, 3 MoE layers of 8 experts, 2 a token"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else None,
)
def test_bad_input_is_one_line_and_said_before_weights_are_read(flags, named, here, monkeypatch):
    monkeypatch.delattr(Checkpoint, "experts")
    monkeypatch.delattr(Checkpoint, "dense")
    done = here(*flags)
    assert one_line(done) and named in done.stderr.decode()


def test_a_budget_that_the_compiled_workspace_exceeds_is_one_line(here):
    """Dense weights and cache would fit: 1.65 MiB."""
    done = here("--prompt", "x", "--vram-budget", "2MiB")
    assert one_line(done) and b"workspace" in done.stderr and b"prefill_chunk" in done.stderr


def test_an_empty_standard_input_is_one_line(here, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    done = here("--prompt", "-")
    assert one_line(done) and b"empty" in done.stderr


def test_without_a_prompt_the_bundled_model_has_one_and_others_are_refused(here, capsys):
    assert generate.read_prompt(generate.parser().parse_args([])) == "My lord,"
    assert capsys.readouterr().err.splitlines() == ['no --prompt: the bundled model goes on from "My lord,"']
    refused = here("--max-tokens", 2)
    assert one_line(refused) and b"--prompt TEXT" in refused.stderr


def test_a_wrong_folder_is_one_line(here, tmp_path):
    missing = here("--prompt", "x", model=tmp_path / "missing")
    assert one_line(missing) and b"no such folder" in missing.stderr
    unconverted = here("--prompt", "x", model=tiny_checkpoint.write_hf(tmp_path / "hf"))
    assert one_line(unconverted) and b"hybrimoe_jax.convert" in unconverted.stderr
