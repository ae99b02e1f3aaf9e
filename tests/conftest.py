"""Shared by all tests: the `--slow` switch, and one core for each of XLA and the host experts, as on the smallest machine."""

from __future__ import annotations

import os

os.environ.setdefault("NPROC", "1")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    slow = [item for item in items if "slow" in item.keywords]
    if slow:
        items[:] = [item for item in items if "slow" not in item.keywords]
        config.hook.pytest_deselected(items=slow)
