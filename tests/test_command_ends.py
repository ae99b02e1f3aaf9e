"""How every command ends where its output cannot be written, where it is interrupted, or where a benchmark's own
process refuses."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from hybrimoe_jax.bench.engine import Contender
from hybrimoe_jax.errors import UserError


def ended(body: str, **options) -> subprocess.CompletedProcess:
    """A command whose `main` has this body."""
    program = "import os, sys\nfrom hybrimoe_jax import cli\ndef main():\n" + textwrap.indent(
        textwrap.dedent(body), "    "
    )
    return subprocess.run(
        [sys.executable, "-c", program + "\ncli.run(main)\n"], stderr=subprocess.PIPE, text=True, timeout=60, **options
    )


def test_a_closed_output_is_refused_before_anything_is_done():
    done = subprocess.run(
        f"{sys.executable} -m hybrimoe_jax.trace --help >&-", shell=True, stderr=subprocess.PIPE, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (2, "error: standard output is closed\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("body", ["print('x')", "print('x', flush=True)"], ids=["at the end", "at once"])
def test_a_full_output_is_one_line(body):
    with open("/dev/full", "w") as full:
        done = ended(body, stdout=full)
    assert done.returncode == 2
    assert done.stderr == f"error: cannot write the output: {os.strerror(errno.ENOSPC)}\n"


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        ("KeyboardInterrupt", 128 + signal.SIGINT, "interrupted\n"),
        ("DeviceError('the device may hang')", 1, "error: the device may hang\n"),
    ],
)
def test_a_command_that_is_broken_off_does_not_wait_for_its_threads(raised, code, line):
    """Those of a library that still computes: the interpreter's own end would join this one, and can take from
    under others what they read."""
    done = ended(
        f"""
        import threading, time
        from hybrimoe_jax.errors import DeviceError
        threading.Thread(target=time.sleep, args=(600,)).start()
        print("so far")
        raise {raised}
        """,
        stdout=subprocess.PIPE,
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, "so far\n", line)


def test_what_a_benchmark_process_refuses_is_the_benchmarks_error(tmp_path, capfd):
    with pytest.raises(UserError, match="nowhere"):
        Contender("engine", model=str(tmp_path / "nowhere"), systems=["hybrimoe"], threads=1, cache_ratio=0.25)
    assert "Traceback" not in capfd.readouterr().err
