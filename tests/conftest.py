"""Shared by all tests: the `--slow` switch, one core for each of XLA and the host experts, as on the smallest machine, one cache of compiled
programs, and how tests are shared out among workers (pytest-xdist).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("NPROC", "1")
MOST_WORKERS = 8

# Most of what a test with an engine takes is XLA compiling (25 of 38 s of CPU in test_dense_format), often what another process of the same
# run has compiled before. A run's first process makes the folder; workers and the commands that tests start inherit it. It does not
# outlive the run, so that no test ever meets a program that another version or machine made.
SHARED = "HYBRIMOE_TESTS_FOLDER"
if SHARED not in os.environ:
    _folder = tempfile.TemporaryDirectory(prefix="hybrimoe-tests-")
    os.environ[SHARED] = _folder.name
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _folder.name + "/programs")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """For `-n auto`: a worker per core that this process may use."""
    return min(MOST_WORKERS, len(os.sched_getaffinity(0)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """One worker runs all tests of a file, which share fixtures and compiled programs; of the exactness matrix, all cells of a model."""
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            cell = re.match(r".*test_exactness.py::test_overlapped_[^/]*", nodeid)
            return cell[0] if cell else nodeid.partition("::")[0]

    return Together(config, log)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    slow = [item for item in items if "slow" in item.keywords]
    if slow:
        items[:] = [item for item in items if "slow" not in item.keywords]
        config.hook.pytest_deselected(items=slow)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    """A test marked `alone` runs while no other worker runs any: it compares times."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    with contextlib.ExitStack() as locks:
        door = locks.enter_context(open(Path(os.environ[SHARED], "door"), "w"))
        room = locks.enter_context(open(Path(os.environ[SHARED], "room"), "w"))
        alone = item.get_closest_marker("alone") is not None
        fcntl.flock(door, fcntl.LOCK_EX)  # held while waiting alone, so that nobody slips in
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        return (yield)
