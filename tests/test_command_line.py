"""The command line: what a command does not know is argparse's line and exit code 2."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from hybrimoe_jax.__main__ import command_main
from hybrimoe_jax.errors import UserError


@pytest.mark.parametrize(
    "line, says",
    [
        ("hybrimoe_jax nonsense", "invalid choice: 'nonsense'"),
        ("hybrimoe_jax", "required: COMMAND"),
        ("hybrimoe_jax generate --prompt x --traces x", "unrecognized arguments: --traces x"),
        ("hybrimoe_jax generate --traces x", "error: "),
        ("hybrimoe_jax convert a b --cache-ratio 1", "unrecognized arguments: --cache-ratio 1"),
        ("hybrimoe_jax.bench nonsense", "invalid choice: 'nonsense'"),
        ("hybrimoe_jax.bench engine --text x", "unrecognized arguments: --text x"),
    ],
)
def test_an_unknown_command_or_flag_is_one_line(line, says, in_process):
    module, *arguments = line.split()
    if "nonsense" in arguments:
        done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, timeout=120)
    else:
        done = in_process(importlib.import_module(f"{module}.__main__").main, *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and says in done.stderr


@pytest.mark.parametrize(
    "line, says",
    [
        ("convert nowhere /proc/x", "/proc/x: its folder /proc: cannot be written"),
        ("convert nowhere x --dense-format bf16", "leave it out, or say a quantised one: int8-g64, "),
        ("convert nowhere x --format=--", "format '--' is not known"),
        ("convert nowhere x --format int3", "say f32, bf16, or a quantised one: int8-g64, "),
        ("train --run /proc/run", "--run /proc/run: cannot be written"),
        ("train --run /proc/version/run", "/proc/version is no folder"),
        ("train --evaluate nowhere", "--evaluate nowhere: no such folder"),
        ("bench engine --workdir /proc/x", "--workdir /proc/x: cannot be written"),
        ("bench engine --models nowhere", "'nowhere': neither bundled, mid nor a folder"),
        ("bench llamacpp --cache-ratio 2", "--cache-ratio 2.0 is outside 0..1"),
        ("simulate --trace nowhere --out /proc/x.jsonl", "--out /proc/x.jsonl: cannot be written"),
        ("simulate --trace nowhere --timeline /tmp", "--timeline /tmp: it is a folder"),
        ("simulate --trace nowhere --plots /proc/x", "--plots /proc/x: cannot be written"),
        ("simulate --trace synthetic:mixtral-8x7b --systems nope", "cpu-only, oracle, belady)"),
        ("simulate --trace synthetic:mixtral-8x7b --format int3", "int4-g256; or a quantised one: int8-g64, "),
        ("trace import nowhere /proc/x.npz", "the destination /proc/x.npz: cannot be written"),
        ("reproduce --results /proc/x", "--results /proc/x: cannot be written"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_read(line, says):
    command, *arguments = line.split()
    with pytest.raises(UserError) as refused:
        command_main(command)(arguments)
    assert says in str(refused.value)
