"""Rules of a user's own on the command line, from a file in the current folder; wrong ones end in one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from own_rules import Fading, Half, Popular
from test_bench_cache import small_trace

from hybrimoe_jax.__main__ import command_main
from hybrimoe_jax.bench import schedule
from hybrimoe_jax.errors import RuleError

HERE = Path(__file__).parent
SCRIPT = Path(sys.executable).parent / "hybrimoe-jax"
NAMES = {
    "cache": "own_rules:Fading:decay=0.5",
    "scheduler": "own_rules:Half:share=0.25",
    "predictor": "own_rules:Popular",
}
OWN = [word for part, name in NAMES.items() for word in (f"--{part}", name)]
TRACE = ["--trace", "synthetic:mixtral-8x7b", "--cache-ratios", "0.25", "--steps", "2"]


@pytest.mark.parametrize("command", [["-m", "hybrimoe_jax.simulate"], [str(SCRIPT), "simulate"]], ids=["-m", "script"])
def test_simulate_in_two_processes_from_the_current_folder(tmp_path, command):
    """`python -m` looks for a module in the current folder; so do the console script and the workers."""
    shutil.copy(HERE / "own_rules.py", tmp_path / "own_rules_here.py")
    own = [word.replace("own_rules", "own_rules_here") for word in OWN]
    flags = [*TRACE, "--systems", "hybrimoe,on-demand", "--starts", "warm", "--jobs", "2", "--out", "r.jsonl"]
    done = subprocess.run([sys.executable, *command, *flags, *own], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [record["system"] for record in records] == ["hybrimoe", "on-demand"]
    assert {record["choices"]["cache"] for record in records} == {"own_rules_here:Fading:decay=0.5"}
    assert {record["choices"]["scheduler"] for record in records} == {"own_rules_here:Half:share=0.25"}


WRONG = [("cache", "HeatNotANumber"), ("scheduler", "LeavesOut"), ("predictor", "Foresees999")]


@pytest.mark.parametrize("part, rule", WRONG)
def test_a_wrong_rule_ends_a_command_in_one_line(part, rule):
    with pytest.raises(RuleError, match=rf"{part} wrong_rules:{rule}, layer .*"):
        command_main("simulate")([*TRACE, "--systems", "adapmoe", f"--{part}", f"wrong_rules:{rule}"])


@pytest.mark.slow
def test_generate_runs_with_all_three_and_says_the_same(capsys):
    said = []
    for own in (OWN, ["--system", "cpu-only"]):
        flags = ["--prompt", "My lord,", "--max-tokens", "4", "--stats", "json", "--start-cache", "off"]
        command_main("generate")([*flags, *own])
        said.append(json.loads(capsys.readouterr().out.splitlines()[-1])["token_ids"])
    assert said[0] == said[1]


def test_bench_cache_takes_a_policy_with_parameters(tmp_path, capsys):
    trace = str(small_trace(tmp_path / "t.npz"))
    names = ["own_rules:Fading:decay=0.5", "own_rules:Fading:decay=0.9", "wrong_rules:EvictsAbsent"]
    command_main("bench")(["cache", "--trace", trace, "--ratios", "0.5", "--policies", *names[:2]])
    row = json.loads(capsys.readouterr().out.splitlines()[-1])["traces"][trace]["0.5"]
    assert list(row) == names[:2] and all(found["hits"] > 0 for found in row.values())
    with pytest.raises(RuleError, match=r"EvictsAbsent, layer \d: victim gave expert \d, which is not resident"):
        command_main("bench")(["cache", "--trace", trace, "--ratios", "0.5", "--policies", names[2]])


def test_bench_schedule_takes_rules_of_one_s_own(capsys):
    record = schedule.run(2, 0, lambda items, total, label: items, ["own_rules:Half", Half(share=0.25)])
    assert "own_rules:Half:share=0.25 " in capsys.readouterr().out
    for gaps in record["gap"].values():
        assert {"own_rules:Half", "own_rules:Half:share=0.25", "optimal"} <= set(gaps)
    assert all("own_rules:Half" in times for times in record["cpu_us"].values())


def test_the_rules_of_the_pages_are_these():
    """`docs/policies.md` shows the three in 20 lines each; its blocks are run by another test."""
    text = (HERE.parent / "docs" / "policies.md").read_text(encoding="utf-8")
    for name in (Fading, Half, Popular):
        block = text.split(f"class {name.__name__}(")[1].split("```")[0]
        assert len(block.splitlines()) <= 20
