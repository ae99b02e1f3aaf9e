"""Shared by all tests: known conditions however they were started, which of them run, and which worker runs them.

One core for each of XLA and the host experts, as on the smallest machine. Compiled programs are kept (`program_cache`).
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import gc
import itertools
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import hypothesis
import program_cache
import pytest
import threadpoolctl

from hybrimoe_jax.engine import mappings

MOST_WORKERS = 8
LOCKS = Path(tempfile.gettempdir(), f"hybrimoe-tests-{os.getuid()}")
"""One folder for all runs of this user, so that a test that wants to be alone is."""

LOOK_EVERY = 20
"""Tests of a file between two looks at how many programs there are: a look may take 30 ms."""
_count = itertools.count()

FOREIGN = re.compile("LC_|LANG|COLUMNS|LINES|FORCE_COLOR|PYTHON(IO|WARN|UTF8|COLORS|DONTWRITE)")
"""Variables that change what a command prints, or have it compile the package again, which takes seconds each time."""


def know_the_start() -> None:
    """The same conditions for every start. The commands that tests start inherit them.

    A shell ignores Ctrl-C for what it starts in the background, `nohup` ignores a hang-up. A caller may block signals,
    keep new files to itself, or speak another language.
    """
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, usual)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.umask(0o022)
    for name in filter(FOREIGN.match, list(os.environ)):
        del os.environ[name]
    sys.dont_write_bytecode = False
    os.environ.update(LC_ALL="C.UTF-8", PYTHONUTF8="1", NO_COLOR="1")
    for name in ("NPROC", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    threadpoolctl.threadpool_limits(1)  # where a plugin has loaded NumPy: idle threads of its BLAS spin
    os.environ["HYBRIMOE_START_CACHE"] = "off"


know_the_start()
PROGRAMS = program_cache.start()
# The same examples in every run, however busy the machine, by default a share of them; `--nightly` looks for others.
COMMON = hypothesis.settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.register_profile("default", COMMON, max_examples=25)
hypothesis.settings.register_profile("slow", COMMON, max_examples=100)
hypothesis.settings.register_profile("nightly", COMMON, max_examples=100, derandomize=False)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")
    parser.addoption("--nightly", action="store_true", help="run all tests, those marked nightly as well")
    parser.addoption("--fuzz-seconds", type=float, help="of the fuzz campaign (60, with --nightly 1200)")


def pytest_configure(config):
    chosen = [name for name in ("nightly", "slow") if config.getoption(name)]
    hypothesis.settings.load_profile([*chosen, "default"][0])


def pytest_terminal_summary(terminalreporter):
    """What the fuzz campaign has tried."""
    for report in (*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")):
        for name, value in report.user_properties:
            if name == "fuzz" and report.when == "call":
                terminalreporter.section("the fuzz campaign")
                terminalreporter.write_line(value)


def pytest_unconfigure(config):
    if PROGRAMS is not None:
        PROGRAMS.close()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """For `-n auto`: a worker per core that this process may use."""
    return min(MOST_WORKERS, len(os.sched_getaffinity(0)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """One worker runs all tests of a file, which share fixtures; of the exactness matrix, all cells of a model."""
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            cell = re.match(r".*(test_exactness.py::test_overlapped_|test_exactness_matrix.py::)[^/]*", nodeid)
            return cell[0] if cell else nodeid.partition("::")[0]

    config.option.loadscopereorder = False
    return Together(config, log)


def pytest_collection_modifyitems(config, items):
    everything, slow = config.getoption("--nightly"), config.getoption("--slow")
    left_out = set() if everything else {"nightly"} if slow else {"nightly", "slow"}
    # The matrix is the longest, and the last that one misses. A test that wants to be alone would wait for a long one.
    # Notebooks come first: where time is limited, all of them run.
    alone = {item.path for item in items if item.get_closest_marker("alone")}
    places = {"test_notebooks": -1, "test_exactness_matrix": 1}
    items.sort(key=lambda item: (places.get(item.path.stem, 0), item.path in alone))
    deselected = [item for item in items if any(mark.name in left_out for mark in item.iter_markers())]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if not any(mark.name in left_out for mark in item.iter_markers())]


def pytest_collection_finish():
    """What the modules have made stays: a collection, and converting makes several, need not look through it."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    """A test marked `alone` compares times: no other worker, of any run, runs a test beside it.

    After a file its compiled programs are there for all workers. A long file may have too many of them.
    """
    with contextlib.ExitStack() as locks:
        LOCKS.mkdir(exist_ok=True)
        door = locks.enter_context(open(LOCKS / "door", "w"))
        room = locks.enter_context(open(LOCKS / "room", "w"))
        alone = item.get_closest_marker("alone") is not None
        fcntl.flock(door, fcntl.LOCK_EX)  # held while waiting alone, so that nobody slips in
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        result = yield
    last = nextitem is None or nextitem.path != item.path
    if PROGRAMS is not None and last:
        PROGRAMS.exchange()
    if last or not next(_count) % LOOK_EVERY:
        mappings.spare()
    return result


@pytest.fixture
def in_process(capsys):
    """in_process(main, *arguments): a command without a start of its own -> the process that it would have been."""

    def run(main, *arguments) -> subprocess.CompletedProcess:
        from hybrimoe_jax import cli

        words = [str(each) for each in arguments]
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.run(lambda: main(words))
        return subprocess.CompletedProcess(words, int(left.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The model of `tiny_checkpoint`, converted once for all tests of a process. They only read it."""
    import tiny_checkpoint

    return tiny_checkpoint.converted(tmp_path_factory.mktemp("model"), eos_token_id=tiny_checkpoint.VOCAB - 1)


@pytest.fixture(scope="session")
def plain_model(tmp_path_factory):
    """plain_model(format): the model of `checkpoint_folders`, converted once likewise."""
    import checkpoint_folders as folders

    from hybrimoe_jax.checkpoint.convert import convert

    root = tmp_path_factory.mktemp("plain")
    source = folders.write_hf(root / "hf", folders.tensors())
    return functools.cache(lambda format=None: convert(source, root / (format or "own"), format))
