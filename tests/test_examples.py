"""Every script in `examples/` runs, and shows what it promises."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from hybrimoe_jax.engine.load import bundled_model

FOLDER = Path(__file__).parents[1] / "examples"

pytestmark = pytest.mark.skipif(
    not (bundled_model() / "manifest.json").is_file(), reason="no bundled model in hybrimoe_jax/assets"
)


def printed(name: str, tokens: int, monkeypatch, capsys) -> list[str]:
    monkeypatch.setattr(sys, "argv", [name, str(tokens)])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def test_generate_and_watch(monkeypatch, capsys):
    lines = printed("generate_and_watch", 6, monkeypatch, capsys)
    assert lines[0].startswith("To be, or not to be") and len("\n".join(lines).partition("MoE layer")[0]) > 25
    rows = [list(map(int, line.split())) for line in lines if re.fullmatch(r"[\d ]+", line)]
    assert len(rows) == 6
    assert all(hits + misses == by_cpu + by_device for _, hits, misses, by_cpu, by_device, _ in rows)
    assert re.match(r"hit rate \d+\.\d%; \d+ of \d+ prefetches were useful", lines[-1])


def test_own_policy_live_and_replayed(monkeypatch, capsys):
    rows = [line.split() for line in printed("own_policy", 12, monkeypatch, capsys)[1:]]
    live, replayed = [row[1:] for row in rows[0::2]], rows[1::2]
    assert [row[0] for row in rows[0::2]] == ["mrs", "lru", "__main__:Fading"]
    assert [row[1:] for row in live] == [row[1:] for row in replayed]
    assert live[2] != live[0] != live[1]


def test_compare_systems(monkeypatch, capsys):
    lines = printed("compare_systems", 6, monkeypatch, capsys)
    times = {line.split()[0]: float(line.split()[-1]) for line in lines[2:-1]}
    assert times["hybrimoe"] < times["ktransformers"] < times["cpu-only"]
    assert lines[-1] == "all systems gave the same tokens"


def test_trace_and_replay(monkeypatch, capsys):
    lines = printed("trace_and_replay", 24, monkeypatch, capsys)
    rates = {line[:14].strip(): float(line.split()[-2].rstrip("%")) for line in lines[1:]}
    assert len(rates) == 6 and max(rates, key=lambda name: rates[name]) == "(the most)"


def test_simulate_big_model(monkeypatch, capsys):
    lines = printed("simulate_big_model", 8, monkeypatch, capsys)
    assert "qwen2-57b-a14b" in lines[0] and "simulated times" in lines[0]
    assert sum(line.startswith(("hybrimoe ", "ktransformers ", "adapmoe ", "llamacpp ")) for line in lines) == 8


def test_every_example_is_tested():
    tested = re.findall(r'printed\("(\w+)"', Path(__file__).read_text(encoding="utf-8"))
    assert sorted(tested) == sorted(path.stem for path in FOLDER.glob("*.py"))
