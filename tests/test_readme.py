"""README and documents tell the truth: commands parse; flags, files, links and statistics exist; examples run."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from hybrimoe_jax.__main__ import COMMANDS, command_main
from hybrimoe_jax.engine.flags import ENGINE_FLAGS
from hybrimoe_jax.engine.load import bundled_model

ROOT = Path(__file__).parents[1]
PATHS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PATHS}
README = TEXTS["README.md"]
FLAG = r"(?<![^\s`(])--[a-z][a-z-]+"
OTHERS = {"--n-gpu-layers", "--slow", "--fuzz-seconds", "--add", "--step", "--layers", "--dry-run"}
"""Flags of other programs, and of scripts/, that the documents mention."""
needs_bundled = pytest.mark.skipif(
    not (bundled_model() / "manifest.json").is_file(), reason="no bundled model in hybrimoe_jax/assets"
)


class Parsed(Exception):
    """The command accepted its arguments."""


def code_lines(text: str) -> list[str]:
    """Lines of fenced and of indented code."""
    fenced = re.findall(r"^```[a-z]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [line for block in fenced for line in block.splitlines()] + re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE)


def command_lines() -> list[tuple[str, list[str]]]:
    """(command, arguments) of every `python -m hybrimoe_jax...` in the documents' code, shell pipes and variables
    cut off."""
    found = []
    for line in (line for text in TEXTS.values() for line in code_lines(text)):
        for name, rest in re.findall(r"python -m hybrimoe_jax\.(\w+)(.*)", line):
            found.append((name, shlex.split(re.split(r"\$\w|[|>;]|\s#", rest)[0])))
    return found


@pytest.mark.parametrize(("name", "arguments"), command_lines(), ids=lambda value: str(value)[:60])
def test_documented_commands_are_accepted(name, arguments, monkeypatch):
    real = argparse.ArgumentParser.parse_args

    def parse(self, *args, **kwargs):
        real(self, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    with pytest.raises(Parsed):
        command_main(name)(arguments)


def test_the_readme_shows_the_commands_that_matter():
    assert {name for name, _ in command_lines()} >= {"generate", "convert", "bench"}
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"make ([a-z-]+)", README):
        if target in ("demo", "test", "test-slow", "venv", "lint", "bench"):
            assert target in targets
    assert "    make demo\n" in README and "    make test\n" in README


def options_of(command: str, monkeypatch) -> set[str]:
    """Every --option of a command, its subcommands' included."""
    found = []

    def catch(self, *args, **kwargs):
        found.append(self)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", catch)
    with pytest.raises(Parsed):
        command_main(command)([])
    options = set()
    while found:
        for action in found.pop()._actions:
            options.update(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                found.extend(action.choices.values())
    return options


def test_documented_flags_exist_and_every_engine_flag_is_documented(monkeypatch):
    known = set().union(*(options_of(command, monkeypatch) for command in COMMANDS))
    named = {flag for text in TEXTS.values() for flag in re.findall(FLAG, text)}
    assert named - known - OTHERS == set()
    listed = set(re.findall(FLAG, TEXTS["docs/generating.md"]))
    assert {"--" + name.replace("_", "-") for name in ENGINE_FLAGS} - listed == set()


def tree_entries() -> list[Path]:
    """Every path named in the tree of the design: names before the first wide gap, nested by indentation."""
    block = re.search(r"## The repository\n+```\n(.*?)```", TEXTS["docs/design.md"], re.DOTALL)[1]
    paths, parents = [], {}
    for line in block.splitlines():
        indent = len(line) - len(line.lstrip())
        names = re.split(r"\s{2,}", line.strip())[0].split()
        base = parents.get(indent - 2, Path()) if indent else Path()
        for name in names:
            paths.append(base / name)
            if name.endswith("/"):
                parents[indent] = base / name
    return paths


def test_the_tree_names_files_that_exist():
    paths = tree_entries()
    assert len(paths) > 30
    assert [str(path) for path in paths if not (ROOT / path).exists() and "bundled" not in path.parts] == []


def test_the_tree_leaves_no_room_out():
    named = {str(path).rstrip("/") for path in tree_entries()}
    rooms = [path.parent.relative_to(ROOT) for path in (ROOT / "hybrimoe_jax").glob("*/__init__.py")]
    assert len(rooms) > 10 and [str(room) for room in rooms if str(room) not in named] == []


def test_relative_links_resolve():
    for path in (*PATHS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"):
        text = re.sub(r"^```.*?^```|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        named = dict(re.findall(r"^\[([\w-]+)\]: (\S+)$", text, re.MULTILINE))
        assert set(re.findall(r"\]\[([\w-]+)\]", text)) == named.keys(), f"{path.name}: links by name"
        for link in (*re.findall(r"\]\(([^)\s]+)\)", text), *named.values()):
            target, _, heading = link.partition("#")
            if "://" not in link:
                to = path.parent / target if target else path
                assert to.exists(), f"{path.name} links to {target}"
                assert not heading or heading in anchors(to), f"{path.name} links to #{heading} of {to.name}"


def anchors(path: Path) -> set[str]:
    """A document's headings as links name them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_systems_and_parts_are_those_that_exist():
    from hybrimoe_jax.decide import POLICIES, PREDICTORS, SCHEDULERS, SYSTEMS

    table = TEXTS["docs/policies.md"]
    systems, parts = table.split("Parts on their own")
    assert set(re.findall(r"^\| `([\w-]+)`", systems, re.MULTILINE)) == set(SYSTEMS)
    assert set(re.findall(r"^\| `([\w:-]+)`", parts, re.MULTILINE)) == {*PREDICTORS, "recorded:TRACE"}
    for flag, names in (("cache", POLICIES), ("scheduler", SCHEDULERS)):
        assert set(re.search(rf"`--{flag} ([\w|-]+)`", table)[1].split("|")) == set(names)


def test_families_are_those_that_exist():
    from hybrimoe_jax.models.registry import FAMILIES

    rows = re.findall(r"^\| [\w-]+ \| `(\w+)` \|", TEXTS["docs/formats.md"], re.MULTILINE)
    assert set(rows) - {"model_type"} == set(FAMILIES)


@needs_bundled
def test_documented_statistics_and_tokens_are_those_that_generate_prints(capsys):
    exactness = TEXTS["docs/exactness.md"]
    shown = re.search(r'^"token_ids": \[([\d, ]+)\]$', exactness, re.MULTILINE)
    table = TEXTS["docs/statistics.md"].split("## Reading the statistics")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    documented = {key for cell in cells for key in re.findall(r"`(\w+)`", cell)}
    line = next(line for line in exactness.splitlines() if "--stats json" in line and '"To be, or not"' in line)
    arguments = shlex.split(re.split(r"\$\w|[|;]", line)[0].split("hybrimoe_jax.generate")[1])
    assert command_main("generate")([*arguments, "--start-cache", "off"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert documented == set(printed)
    assert printed["token_ids"] == [int(token) for token in shown[1].split(",")]


@pytest.mark.slow
@needs_bundled
def test_the_python_examples_run(tmp_path):
    """Every Python block of every page, in order; those of a page share their names."""
    kind = "python(?: plots)?" if find_spec("matplotlib") else "python"
    pages = {
        name: re.findall(rf"^```{kind}\n(.*?)^```", text, re.DOTALL | re.MULTILINE) for name, text in TEXTS.items()
    }
    code = [[name, "\n".join(blocks)] for name, blocks in pages.items() if blocks]
    assert {"README.md", "docs/python.md", "docs/policies.md"} <= {name for name, _ in code}
    program = "import json, sys\nfor name, code in json.load(sys.stdin): exec(compile(code, name, 'exec'), {})"
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(code).replace('\\"my-model\\"', json.dumps(repr(str(bundled_model())))[1:-1]),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={**os.environ, "PYTHONWARNINGS": "error", "XDG_CACHE_HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


def test_nothing_is_left_to_fill_in():
    for name, text in TEXTS.items():
        marks = r"<!-- (table: [\w, -]+|end|/?demo) -->"
        assert not re.search(r"TODO|TBD|FIXME|XXX|<!--|placeholder", re.sub(marks, "", text)), name


def test_the_readme_stays_short():
    assert len(README.encode()) <= 13_000
