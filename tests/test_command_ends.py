"""How every command ends where its output cannot be written, where it is interrupted, or where a benchmark's own
process refuses."""

from __future__ import annotations

import errno
import os
import re
import select
import signal
import subprocess
import sys
import textwrap

import jax
import pytest

from hybrimoe_jax import cli, generate
from hybrimoe_jax.bench.engine import Contender
from hybrimoe_jax.errors import DeviceError, UserError


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


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_help_that_cannot_be_written_is_one_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "hybrimoe_jax.trace", "--help"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, f"error: cannot write the output: {os.strerror(errno.ENOSPC)}\n")


def test_a_platform_that_jax_has_not_is_one_line():
    body = "from hybrimoe_jax.models.target import default_device\ndefault_device()"
    done = ended(body, env={**os.environ, "JAX_PLATFORMS": "nonsense"})
    assert done.returncode == 2
    assert re.fullmatch(
        "error: jax starts no device here .JAX_PLATFORMS is 'nonsense', .*JAX_PLATFORMS=cpu.*\n", done.stderr
    )


OUT_OF_MEMORY = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4711 bytes.\nBFC: ..."


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (jax.errors.JaxRuntimeError(OUT_OF_MEMORY), "the device's memory ran out .*allocate 4711 bytes"),
        (MemoryError("Unable to allocate 4.00 TiB"), "this machine's memory ran out .MemoryError: Unable to allocate"),
        (DeviceError("the device may hang"), "the device may hang"),
    ],
)
def test_a_device_or_a_memory_that_fails_is_one_line(raised, said, capsys):
    assert cli._run(raising(raised)) == 1
    assert re.fullmatch(f"error: {said}.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("raised", [RuntimeError("slots \x1b"), AssertionError(), OSError("odd"), KeyError("layer")])
def test_a_fault_of_the_program_keeps_its_traceback(raised, capsys):
    assert cli._run(raising(raised)) == 1
    *lines, last = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback") and lines[-2].startswith(type(raised).__name__)
    assert "\x1b" not in " ".join(lines)
    assert last.startswith("error: that is a fault of this program")


def raising(error):
    def main():
        raise error

    return main


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


@pytest.mark.parametrize("module", ["hybrimoe_jax.generate", "hybrimoe_jax.bench.contenders"])
def test_an_interrupt_while_modules_are_imported_is_one_word(module):
    """Sent by the first module that is imported after the package's first line; a benchmark's own process says none."""
    program = textwrap.dedent(
        f"""
        import os, runpy, signal, sys
        class Finder:
            def find_spec(self, name, path=None, target=None):
                if name not in ("hybrimoe_jax", "hybrimoe_jax.interrupts"):
                    os.kill(os.getpid(), signal.SIGINT)
        sys.orig_argv[1:], sys.argv[:] = ["-m", {module!r}], ["-m"]
        for name in ("importlib", "typing", "signal", "types", "os"):
            __import__(name)
        sys.meta_path.insert(0, Finder())
        runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
        """
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130
    assert done.stderr == ("interrupted\n" if module.endswith("generate") else "")


def test_an_interrupt_in_a_library_or_a_finaliser_is_not_lost():
    """Where an import would swallow it, and where the interpreter would only print it."""
    for where in ("import swallowing", "Finaliser()"):
        program = textwrap.dedent(
            f"""
            import os, signal, sys, time
            sys.orig_argv[1:], sys.argv[:] = ["-m", "hybrimoe_jax.generate"], ["-m"]
            from hybrimoe_jax import cli
            class Finaliser:
                def __del__(self):
                    os.kill(os.getpid(), signal.SIGINT)
            class Swallowing:
                def find_spec(self, name, path=None, target=None):
                    if name == "swallowing":
                        try:
                            os.kill(os.getpid(), signal.SIGINT)
                        except BaseException:
                            pass
            sys.meta_path.insert(0, Swallowing())
            def main():
                try:
                    {where}
                except ImportError:
                    time.sleep(20)
                print("went on")
            cli.run(main)
            """
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n"), where


def interrupted(body: str, **options) -> subprocess.CompletedProcess:
    """A `generate` whose `main` has this body."""
    program = (
        "import os, signal, sys, time\n" + 'sys.orig_argv[1:], sys.argv[:] = ["-m", "hybrimoe_jax.generate"], ["-m"]'
    )
    program += "\nfrom hybrimoe_jax import cli\ndef press(): signal.raise_signal(signal.SIGINT)\ndef main():\n"
    program += textwrap.indent(textwrap.dedent(body), "    ") + "\ncli.run(main)\n"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, **options)


def test_a_second_interrupt_does_not_break_off_what_the_first_one_puts_in_order():
    done = interrupted(
        """
        try:
            press()
        finally:
            for _ in range(3):
                press()
            print("in order", flush=True)
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "in order\n", "interrupted\n")


def test_a_late_second_interrupt_ends_what_does_not_come_to_an_end():
    done = interrupted(
        """
        try:
            press()
        finally:
            time.sleep(1.1)
            press()
            print("went on", flush=True)
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_an_interrupt_within_an_import_ends_the_blocks_around_it(tmp_path):
    (tmp_path / "slow.py").write_text("import __main__\n__main__.press()\nprint('imported', flush=True)\n")
    done = interrupted(
        """
        try:
            import slow
            time.sleep(20)
        finally:
            print("in order", flush=True)
        """,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "imported\nin order\n", "interrupted\n")


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
def test_worker_processes_end_with_whoever_started_them(by):
    program = """
        import time
        from hybrimoe_jax.simulate.workers import workers
        with workers(2) as pool:
            list(pool.map(abs, range(4)))
            print("there", flush=True)
            time.sleep(600)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as started:
        assert started.stdout is not None and started.stdout.readline() == b"there\n"
        started.send_signal(by)
        assert started.wait(20) == -by
        ready, _, _ = select.select([started.stdout], [], [], 20)  # its workers have the same output
        assert ready and started.stdout.read() == b""


@pytest.mark.parametrize(
    "setting", ["JAX_ENABLE_X64=maybe", "JAX_DEFAULT_MATMUL_PRECISION=bogus", "JAX_DEFAULT_DEVICE=cpu:0"]
)
def test_a_setting_that_jax_refuses_is_one_line(setting):
    name, _, value = setting.partition("=")
    done = ended("import jax", env={**os.environ, name: value})
    assert done.returncode == 2
    assert re.fullmatch(f"error: jax takes no such setting .*{value}.* environment variable\n", done.stderr)


@pytest.mark.parametrize("command", ["convert x y", "generate --model x", "trace info x", "simulate --trace x"])
def test_a_current_folder_that_is_gone_is_one_line(tmp_path, command):
    line = f'cd "$0" && rmdir "$0" && {sys.executable} -m hybrimoe_jax.{command}'
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, map(os.path.abspath, sys.path)))}
    (tmp_path / "gone").mkdir()
    done = subprocess.run(
        ["sh", "-c", line, str(tmp_path / "gone")], capture_output=True, text=True, timeout=60, env=env
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch("error: .*the current folder is gone; change into another one\n", done.stderr)


def test_an_empty_path_is_refused_and_no_other_model_runs():
    with pytest.raises(UserError, match="--model: an empty text is no path"):
        generate.main(["--model", "", "--prompt", "My lord,"])


def test_models_are_imported_where_no_temporary_file_can_be_made():
    done = ended(
        """
        import tempfile
        def refuse(*_): raise FileNotFoundError("No usable temporary directory found")
        tempfile._get_default_tempdir = refuse
        import hybrimoe_jax.models.layers
        assert tempfile.tempdir is None
        """
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_what_a_benchmark_process_refuses_is_the_benchmarks_error(tmp_path, capfd):
    with pytest.raises(UserError, match="nowhere"):
        Contender("engine", model=str(tmp_path / "nowhere"), systems=["hybrimoe"], threads=1, cache_ratio=0.25)
    assert "Traceback" not in capfd.readouterr().err
