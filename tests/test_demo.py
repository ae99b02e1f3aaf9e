"""`python -m hybrimoe_jax.demo`: a text, and a race of three systems in real time."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from hybrimoe_jax import demo
from hybrimoe_jax.decide.systems import get_system
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.host_kernels.native import pace

README = Path(__file__).parents[1] / "README.md"
FLAGS = ["--prompt", "the and", "--max-tokens", "9"]


def table_of(out: str, error: str) -> dict[str, list[str]]:
    """The table's rows by system, once everything around it has been looked at."""
    text, _, said = out.partition("measured on this machine")
    assert text.strip() and "arning" not in error and all(line.startswith("*") for line in error.splitlines() if line)
    lines = said.splitlines()[1:]
    assert max(map(len, [*lines, *error.splitlines()])) <= 80 and lines[-1].endswith(
        "-m hybrimoe_jax.convert HF_FOLDER my-model"
    )
    assert "\x1b" not in out and not any(line.endswith(" ") for line in lines)
    said = " ".join(lines)
    assert "deepseek-v2-lite does in int4-g64" in said and said.count("measured") == said.count("ot measured") + (
        said.count("Neither was measured on that machine")
    )
    rows = {}
    for system, *row in (line.split() for line in lines[lines.index("") + 1 :] if line.endswith(("  yes", "  no"))):
        rows[system] = row
        hits, fetches, prefetches, cpu, device, *speeds, same = row
        wanted = int(re.search(r"(\d+) experts are wanted", said)[1])
        assert int(cpu) + int(device) == wanted >= int(hits) and same == "yes" and min(map(float, speeds)) > 0
        assert (int(fetches) + int(prefetches) > 0) == get_system(system).fetches
    assert list(rows) == list(demo.SYSTEMS) and len({row[-2] for row in rows.values()}) > 1
    return rows


@pytest.mark.slow
@pytest.mark.skipif(not pace.available(), reason="the package was installed without its FFI handlers")
def test_three_systems_race_in_real_time_and_keep_the_text(checkpoint):
    command = [sys.executable, "-m", "hybrimoe_jax.demo", "--model", str(checkpoint), *FLAGS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = table_of(done.stdout, done.stderr)
    assert all(len(row) == 8 for row in rows.values()) and "paced: by the wall clock, times 8" in done.stdout
    raced = done.stdout.partition("on a paced device")[2].split("\nhybrimoe  ")[1].partition("\n\n")[0]
    texts = re.split("\nktransformers |\nllamacpp ", raced)
    assert len({" ".join(text.split()) for text in texts}) == 1 and len(texts) == len(demo.SYSTEMS)


def test_where_nothing_can_be_paced_the_virtual_clock_remains(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(pace, "available", lambda: False)
    assert demo.main(["--model", str(checkpoint), *FLAGS]) == 0
    out, error = capsys.readouterr()
    assert all(len(row) == 7 for row in table_of(out, error).values()) and "paced: by" not in out
    assert "The race is left out: the native kernels that it needs were not built.\n" in out


def test_a_text_stands_beside_its_label_as_it_comes(capsys):
    column = demo.Column("hybrimoe")
    column.push(" To be,\n\nor no")
    assert capsys.readouterr().out == "hybrimoe       To be, or"
    for part in ("t to", f" b{'e' * 100}"):
        column.push(part)
    column.push("\n")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == " not to" and all(len(line) < 80 and line.startswith(" " * 15) for line in lines[1:])


def test_what_a_demo_cannot_be_is_said_before_weights_are_read(checkpoint, tmp_path):
    for flags, named in ((["--max-tokens", "1"], "at least 2"), (["--model", str(tmp_path)], "manifest.json")):
        with pytest.raises(UserError, match=named):
            demo.main(flags)


@pytest.mark.slow
def test_the_readme_shows_what_it_prints():
    command = [sys.executable, "-m", "hybrimoe_jax.demo"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    said = computed(done.stdout)
    shown = computed(re.search(r"<!-- demo -->\n```\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[1])
    assert said[:-1] == shown[:-1] and said[-1].split("-m")[1] == shown[-1].split("-m")[1]


def computed(out: str) -> list[str]:
    """Its lines without what this machine took."""
    lines = [line for line in out.splitlines() if line and " ms each: " not in line]
    return [re.sub(r"[\d.]+(  +[\d.]+   yes)$", r"\1", line) for line in lines]
