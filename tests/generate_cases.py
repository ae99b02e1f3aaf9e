"""Runs of `python -m hybrimoe_jax.generate` in this process, and what is asked of their output."""

from __future__ import annotations

import json
import subprocess

from hybrimoe_jax import generate

VIRTUAL = ("--prompt", "x", "--clock", "virtual", "--profile", "laptop-8gb")


def runner(in_process, model, profile):
    """run(*flags): the command on a model, without a start -> the finished process, outputs as bytes."""

    def run(*flags, model=model):
        base = ["--model", str(model), "--host-kernel", "reference", "--profile", str(profile)]
        done = in_process(generate.main, *base, *flags)
        return subprocess.CompletedProcess(flags, done.returncode, done.stdout.encode(), done.stderr.encode())

    return run


def parsed(done) -> tuple[str, dict]:
    """-> (the text, the statistics) of a run with `--stats json`."""
    assert done.returncode == 0, done.stderr.decode()
    text, line = done.stdout.decode().removesuffix("\n").rsplit("\n", 1)
    return text, json.loads(line)


def one_line(done) -> bool:
    """Refused as every bad input is: exit code 2, one line on stderr, nothing on stdout."""
    return done.returncode == 2 and done.stdout == b"" and done.stderr.count(b"\n") == 1
