"""What one process has compiled and measured, the next does not compile and measure again."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time

import pytest
import tiny

from hybrimoe_jax import generate
from hybrimoe_jax.engine import assembly, program_cache, start_cache, warmup
from hybrimoe_jax.engine.config import EngineConfig
from hybrimoe_jax.engine.fused.forward import FusedForward
from hybrimoe_jax.engine.measurements import MAX_AGE_S, DecodeChoice, KeptMeasurements, Measurements
from hybrimoe_jax.errors import UserError

PROGRAMS = """
from hybrimoe_jax.engine.start_cache import keep_programs, usable
keep_programs(usable("default"))
import jax
counts = []
jax.monitoring.register_event_listener(lambda name, **_: counts.append(name.rpartition("/")[2]))
jax.jit(lambda x: x * 3 + 1)(2.0)
print(counts.count("cache_hits"), counts.count("cache_misses"))
"""


@pytest.fixture
def second_process(tmp_path, monkeypatch):
    """Runs a program of one jitted function with the cache in `tmp_path` -> (programs found, programs compiled)."""
    for name in list(os.environ):
        if name.startswith("JAX_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    monkeypatch.delenv(start_cache.VARIABLE)

    def run() -> tuple[int, int]:
        command = [sys.executable, "-W", "error::UserWarning", "-c", PROGRAMS]
        hits, misses = subprocess.check_output(command, text=True).split()
        return int(hits), int(misses)

    return run


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "darwin", reason="the cache folder is another one")
def test_programs_are_found_by_the_next_process(second_process, tmp_path):
    found, compiled = second_process()
    assert found == 0 < compiled and second_process() == (compiled, 0)
    store = tmp_path / "hybrimoe-jax" / "programs"
    entry, *others = store.glob("*/*-cache.*")
    entry.write_bytes(entry.read_bytes()[:-7])
    assert second_process() == (len(others), 1), "a broken entry is compiled again, and nothing is said"
    assert not list(store.glob("run-*")), "the processes' own folders go with them"


def test_the_oldest_go_and_what_killed_processes_left(tmp_path):
    store, node = tmp_path / "store", platform.node()
    folders = [tmp_path / f"run-{node}-{pid}-x" for pid in (os.getpid(), 2**22 + 9)] + [tmp_path / "run-other-1-x"]
    for folder in (store, *folders):
        folder.mkdir()
    for age in range(4):
        path = store / f"program{age}-cache.0"
        path.write_bytes(bytes(10))
        os.utime(path, (0, time.time() - age))
    for folder in folders:
        os.utime(folder, (0, 0))
    program_cache.make_room(tmp_path, 25)
    assert {path.name[7] for path in store.iterdir()} == {"0", "1"}
    assert [folder.exists() for folder in folders] == [True, False, False]


def test_the_users_own_cache_of_programs_wins(tmp_path):
    assert os.environ["JAX_COMPILATION_CACHE_DIR"]
    assert start_cache.keep_programs(str(tmp_path)) is None and not list(tmp_path.iterdir())


def test_where_it_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert start_cache.start_folder("default") is None, "the tests' variable says off"
    assert start_cache.start_folder("off") is None and start_cache.start_folder("/x") == start_cache.Path("/x")
    monkeypatch.setenv(start_cache.VARIABLE, "")
    assert start_cache.start_folder("default") == start_cache.cache_folder()


def test_the_command_keeps_unless_told_not_to():
    def choice(*flags: str) -> str:
        return generate.engine_config(generate.parser().parse_args(["--prompt", "x", *flags])).start_cache

    assert choice() == "default" and choice("--start-cache", "off") == "off" == EngineConfig().start_cache


def test_a_folder_that_takes_no_files_is_warned_of_once(tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="nothing can be kept there") as seen:
        assert start_cache.usable(str(tmp_path / "file" / "folder")) == "off"
    assert len(seen) == 1


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Makes an engine -> it, and how often measurements were asked for so far; only the first are taken."""
    measure, calls = warmup.measure, []

    def measure_once(*args, **kwargs):
        calls.append(calls[0] if calls else measure(*args, **kwargs))
        return calls[0]

    monkeypatch.setattr(warmup, "measure", measure_once)

    def make(**options):
        options = {"host_kernel": "auto", "profile": None, "start_cache": str(tmp_path), "cache_ratio": 0.5, **options}
        return tiny.engine(**options), len(calls)

    return make


def test_measurements_are_kept_until_a_fact_changes(load, tmp_path, monkeypatch):
    first, count = load()
    assert count == 1
    (kept,) = tmp_path.glob("measurements/*")
    os.utime(kept, (0, time.time() - MAX_AGE_S // 2))
    second, count = load(verify=True)
    assert count == 1 and second.costs == first.costs, "kept"
    assert time.time() - kept.stat().st_mtime > 999, "what is used stays as old as it is"
    assert isinstance(second._forward, FusedForward) == isinstance(first._forward, FusedForward)
    assert second.planner.all_on_cpu == first.planner.all_on_cpu
    prompt = tiny.prompts(first.config, (9,))
    assert first.generate(prompt, max_new_tokens=9).token_ids == second.generate(prompt, max_new_tokens=9).token_ids
    assert load(measure_again=True)[1] == 2
    assert load(cache_ratio=0.25)[1] == 3, "other slots"
    assert load(start_cache="off")[1] == 4
    for path in tmp_path.glob("measurements/*"):
        path.write_text("{")
    assert load()[1] == 5 and load()[1] == 5, "a damaged file is replaced"
    monkeypatch.setattr(assembly, "machine_facts", lambda files: ["another processor"])
    assert load()[1] == 6


def test_old_and_impossible_measurements_are_none(tmp_path):
    kept = KeptMeasurements(tmp_path, ["facts"])
    kept.write(Measurements(decode=DecodeChoice(True, 2, 8, 1e-3, 2e-3)))
    assert kept.read().decode == DecodeChoice(True, 2, 8, 1e-3, 2e-3)
    (path,) = tmp_path.glob("measurements/*")
    path.write_text(path.read_text().replace('"max_steps": 8', '"max_steps": 8000'))
    assert kept.read() == Measurements()
    kept.write(Measurements(decode=DecodeChoice(False, 1, 1, 2e-3, 1e-3)))
    os.utime(path, (0, time.time() - MAX_AGE_S - 9))
    assert kept.read() == Measurements()
    with pytest.raises(UserError):
        DecodeChoice(True, 0, 1, 1e-3, 2e-3)
    KeptMeasurements(path, ["facts"]).write(Measurements())  # no folder: nothing is kept, and nothing is raised
