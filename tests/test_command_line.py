"""The real command line: what a command does not know is argparse's line and exit code 2."""

from __future__ import annotations

import subprocess
import sys

import pytest


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
def test_an_unknown_command_or_flag_is_one_line(line, says):
    done = subprocess.run([sys.executable, "-m", *line.split()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and says in done.stderr
