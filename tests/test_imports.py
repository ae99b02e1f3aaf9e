"""Importing the package, or its decisions, starts no jax; the public names are there all the same."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from test_rooms import MODULES, WITHOUT_JAX, room

import hybrimoe_jax

HEAVY = {"jax", "jaxlib", "flax", "torch"}
QUIET = (
    "hybrimoe_jax",
    "hybrimoe_jax.engine.config",
    "hybrimoe_jax.engine.stats",
    "hybrimoe_jax.trace.file",
    "hybrimoe_jax.trace.importers",
    "hybrimoe_jax.trace.info",
    "hybrimoe_jax.trace.timeline",
    "hybrimoe_jax.simulate.replay",
    "hybrimoe_jax.engine.lanes.threads",
    "hybrimoe_jax.engine.sampling",
    "hybrimoe_jax.engine.generation",
    "hybrimoe_jax.engine.routing",
    "hybrimoe_jax.engine.budget",
    "hybrimoe_jax.host_kernels",
    "hybrimoe_jax.host_kernels.reference",
    "hybrimoe_jax.host_kernels.onednn",
    "hybrimoe_jax.host_kernels.native.kernel",
    "hybrimoe_jax.engine.load",
    "hybrimoe_jax.engine.streaming",
    "hybrimoe_jax.generate",
    "hybrimoe_jax.calibrate",
    "hybrimoe_jax.demo",
    *(module for module in MODULES if room(module) in WITHOUT_JAX),
)
CONFIGURING = """
from hybrimoe_jax import EngineConfig, UserError
from hybrimoe_jax.decide.systems import SYSTEMS
EngineConfig(cache_ratio=0.5)
try:
    EngineConfig(executor="nonsense")
except UserError:
    pass
for system in SYSTEMS.values():
    system.slots_per_layer(0.25, 6, 32)
"""
LOADING = """
import json, sys
held, loaded = set(), {}
for statement in json.load(sys.stdin):
    exec(statement, {})
    now = {name.partition(".")[0] for name in sys.modules}
    loaded[statement], held = sorted(now - held), now
print(json.dumps(loaded))
"""


@pytest.fixture(scope="module")
def loaded():
    """By statement, the top-level modules that it loads and none before it has, all in one fresh interpreter."""
    statements = [*(f"import {module}" for module in QUIET), CONFIGURING]
    done = subprocess.run(
        [sys.executable, "-c", LOADING], input=json.dumps(statements), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("module", QUIET)
def test_importing_it_imports_no_jax(module, loaded):
    assert not HEAVY & set(loaded[f"import {module}"])


def test_configuring_and_deciding_need_no_jax(loaded):
    assert not HEAVY & set(loaded[CONFIGURING])


def test_every_public_name_resolves_and_is_listed():
    listed = dir(hybrimoe_jax)
    for name in hybrimoe_jax.__all__:
        assert getattr(hybrimoe_jax, name) is getattr(hybrimoe_jax, name) is not None
        assert name in listed
    assert {"load", "stream_generate", "EngineConfig", "UserError"} <= set(hybrimoe_jax.__all__)


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        hybrimoe_jax.nonsense  # noqa: B018
    with pytest.raises(ImportError):
        from hybrimoe_jax import nonsense  # noqa: F401


def test_star_import_brings_the_public_names():
    names: dict = {}
    exec("from hybrimoe_jax import *", names)
    assert set(hybrimoe_jax.__all__) <= set(names)
