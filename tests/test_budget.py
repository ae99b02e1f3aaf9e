"""`vram_budget`: what lives on the device stays within it, most of it is used, and one that is too small says what
it would take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import budget_cases
import pytest
import tiny
from grids import few

from hybrimoe_jax.engine import budget
from hybrimoe_jax.engine.config import EngineConfig, parse_bytes
from hybrimoe_jax.errors import UserError

EXPERT = 3 * tiny.COMMON["hidden_size"] * tiny.CONFIGS[budget_cases.FAMILY]["moe_intermediate_size"] * 4


SLOW = (
    "no slots",
    "no slots, device only",
    "every expert",
    "one slot a layer and something over",
    "next-layer prefetch",
    "whole layers",
    "measured at load",
)
every_case = pytest.mark.parametrize(
    "case", few([case for case in budget_cases.CASES if case not in SLOW], budget_cases.CASES)
)


@pytest.fixture(scope="module")
def results(request) -> dict[str, dict]:
    """One process for the cases that are asked for."""
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    cases = list(dict.fromkeys(item.callspec.params["case"] for item in items if "case" in item.callspec.params))
    folder = str(Path(__file__).parent)
    path = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, budget_cases.__file__, *cases],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path},
    )
    records = {record["case"]: record for record in map(json.loads, done.stdout.splitlines())}
    assert list(records) == cases, done.stderr[-2000:]
    return records


@every_case
def test_what_lives_on_the_device_stays_within_the_budget(case, results):
    record = results[case]
    assert record["samples"] > 500, "the run was hardly looked at"
    assert 0.5 * record["budget"] < record["peak"] <= record["stated"] <= record["budget"]


@every_case
def test_the_slots_use_what_the_budget_leaves(case, results):
    """All but less than one expert a layer (a whole layer for the system that places whole layers, one expert
    where slots are shared)."""
    record = results[case]
    unit = {"whole layers": budget_cases.EXPERTS // 3, "streamed prompts": 1}.get(case, 3)
    assert sum(record["slots"]) == int(record["room"]) // unit * unit
    assert record["budget"] - record["stated"] < unit * EXPERT


@every_case
def test_a_closed_engine_gives_the_device_back(case, results):
    assert results[case]["left"] < EXPERT


def test_the_budget_changes_no_answer(results):
    answers = [record["token_ids"][0] for record in results.values()]
    assert all(answer == answers[0] for answer in answers)


@pytest.mark.parametrize("missing", [1, 100_000])
def test_too_small_a_budget_is_refused_with_what_it_would_take(missing):
    fixed = budget_cases.fixed_bytes({})
    with pytest.raises(UserError) as refused:
        tiny.engine(budget_cases.FAMILY, vram_budget=fixed - missing, **budget_cases.COMMON)
    message = str(refused.value)
    assert budget.readable(fixed) in message and "\n" not in message
    assert all(part in message for part in ("dense", "kv", "staging", "workspace", "max_context"))


def test_a_shorter_context_or_chunk_makes_room():
    fixed = budget_cases.fixed_bytes({})
    options = {**budget_cases.COMMON, "vram_budget": fixed - 1}
    for smaller in ({"max_context": 100}, {"prefill_chunk": 8}):
        tiny.engine(budget_cases.FAMILY, **{**options, **smaller}).close()


def test_a_batch_that_was_not_reserved_is_refused():
    engine = tiny.engine(
        budget_cases.FAMILY, vram_budget=budget_cases.fixed_bytes({}) + 5 * EXPERT, **budget_cases.COMMON
    )
    prompts = tiny.prompts(engine.config, (5, 5))
    with pytest.raises(UserError, match="raise max_batch"):
        engine.generate(prompts, max_new_tokens=4)
    assert len(engine.generate(prompts[:1], max_new_tokens=4).token_ids[0]) == 4
    engine.close()


def test_the_dense_executor_takes_no_budget():
    with pytest.raises(UserError, match="dense"):
        tiny.engine(budget_cases.FAMILY, executor="dense", vram_budget="1GiB")


@pytest.mark.parametrize(
    ("text", "size"), [(4096, 4096), ("4096", 4096), ("1.5GiB", 3 * 2**29), ("800MB", 800 * 10**6), (" 2 kib ", 2048)]
)
def test_sizes_are_read_with_their_units(text, size):
    assert parse_bytes(text, "vram_budget") == size
    assert EngineConfig(vram_budget=text).budget_bytes == size


@pytest.mark.parametrize(
    "text",
    ["", "4 gigs", "-1GiB", "0", "1e400", "nan", "GiB", 0, -5, "9" * 400, float("inf"), 10**400],
    ids=lambda text: str(text)[:8],
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UserError, match="vram_budget"):
        EngineConfig(vram_budget=text)
