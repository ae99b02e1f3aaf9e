"""CONTRIBUTING names what exists, CITATION and the version agree, the pre-commit hooks are the project's own tools."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import hybrimoe_jax

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hybrimoe_jax"
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def named_paths() -> set[str]:
    """Paths in backticks; those with a capital NAME are to be written."""
    found = set(re.findall(r"`([\w./*-]+(?:/|\.(?:py|md|h|cpp|inc)))`", CONTRIBUTING))
    return {path for path in found if "NAME" not in path}


def test_contributing_names_files_that_exist():
    """From the root, the package, or the room that the sentence is about."""
    paths = named_paths()
    bases = [ROOT, PACKAGE, *(path for path in PACKAGE.rglob("*") if path.is_dir())]
    missing = [path for path in paths if not any(any(base.glob(path.rstrip("/"))) for base in bases)]
    assert len(paths) > 30 and not missing


def test_contributing_names_tables_that_exist():
    text = "\n".join(path.read_text(encoding="utf-8") for path in [*PACKAGE.rglob("*.py"), *ROOT.glob("tests/*.py")])
    tables = set(re.findall(r"`([A-Z]{2,}[A-Z_]*)`", CONTRIBUTING))
    assert len(tables) > 10
    assert {name for name in tables if not re.search(rf"^{name}\b.* = ", text, re.MULTILINE)} == set()


def test_contributing_names_targets_that_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"make ([a-z-]+)", CONTRIBUTING)) <= set(targets)


def test_the_version_is_the_same_everywhere():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert hybrimoe_jax.__version__ == PROJECT["version"] == re.search(r"^version: (.+)$", citation, re.MULTILINE)[1]
    assert re.search(r"^license: (.+)$", citation, re.MULTILINE)[1] == PROJECT["license"]
    assert "2504.05897" in citation


def test_pre_commit_runs_nothing_from_elsewhere():
    config = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert re.findall(r"repo: (\S+)", config) == ["local"]
    assert re.findall(r"entry: (\S+)", config) == [".venv/bin/ruff", ".venv/bin/ruff", ".venv/bin/pyright"]


def test_lint_looks_at_every_file_of_the_package():
    """Two rooms have the names of links beside the package, which an exclude of those names left out, too."""
    ruff = Path(sys.executable).with_name("ruff")
    listed = subprocess.run([ruff, "check", "--show-files", "."], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {Path(line) for line in listed.stdout.splitlines()} >= set(PACKAGE.rglob("*.py"))
