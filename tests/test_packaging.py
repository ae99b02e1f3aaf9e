"""What is packaged: the declared dependencies are the imported ones, every file is listed, kept objects are used
again."""

from __future__ import annotations

import ast
import functools
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hybrimoe_jax"
NATIVE = PACKAGE / "host_kernels" / "native"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DISTRIBUTIONS = {"_pytest": "pytest", "orbax": "orbax-checkpoint", "ml_dtypes": "ml-dtypes", "xdist": "pytest-xdist"}
"""Distributions whose name is not their module's."""
OPTIONAL = {"gguf", "matplotlib", "torch", "transformers"}
"""Imported where an extra is installed."""
PEERS = {"accelerate", "llama_cpp"}
"""Imported where a person has installed them for a benchmark; no extra names them."""
BROUGHT = {"scipy", "PIL"}
"""Imported by tests alone; jax needs the one, matplotlib the other."""
SOURCE_ENDINGS = {".py", ".cpp", ".h", ".inc", ".so", ".pyc"}


@functools.cache
def imported(folder: Path) -> set[str]:
    """Top-level modules of others that the files import, within functions too."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module)
    return {name.split(".")[0] for name in found} - set(sys.stdlib_module_names) - {"hybrimoe_jax"}


def declared(requirements: list[str]) -> set[str]:
    return {re.match(r"[A-Za-z0-9_.-]+", each)[0].lower().replace("_", "-") for each in requirements}


def test_the_declared_dependencies_are_the_imported_ones():
    needed = {DISTRIBUTIONS.get(name, name) for name in imported(PACKAGE) - OPTIONAL - PEERS}
    assert declared(PROJECT["project"]["dependencies"]) == needed


def test_what_is_optional_is_in_an_extra():
    extras = {name for each in PROJECT["project"]["optional-dependencies"].values() for name in declared(each)}
    assert imported(PACKAGE) >= OPTIONAL and extras >= OPTIONAL


def test_what_tests_and_scripts_import_is_declared():
    folders = ROOT / "tests", ROOT / "scripts", ROOT / "examples"
    own = {name for folder in folders for path in folder.rglob("*.py") for name in (path.stem, path.parent.name)}
    modules = set().union(*map(imported, folders)) - own - BROUGHT
    project = PROJECT["project"]
    extras = [project["optional-dependencies"][name] for name in ("test", "baseline", "plots", "notebooks")]
    assert {DISTRIBUTIONS.get(name, name) for name in modules} <= declared(sum(extras, project["dependencies"]))


def test_every_file_of_the_package_is_packaged():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["hybrimoe_jax"]
    listed = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    files = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in SOURCE_ENDINGS}
    assert files - listed == set()
    assert PACKAGE / "py.typed" in listed


def test_every_native_source_is_built():
    build = (ROOT / "setup.py").read_text(encoding="utf-8")
    names = {path.stem for path in NATIVE.iterdir() if path.suffix in {".cpp", ".h", ".inc"}}
    assert {name for name in names if f'"{name.removeprefix("isa_")}' not in build} == set()


@pytest.mark.parametrize("link", ["models", "host_kernels"])
def test_the_links_at_the_root_say_what_to_import(link):
    if not (ROOT / link).is_dir():
        pytest.skip("a clone without symbolic links")
    done = subprocess.run([sys.executable, "-c", f"import {link}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"ImportError: import this package as hybrimoe_jax.{link}"


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize("torch", ["0", "1"])
def test_the_makefile_s_commands_are_whole(torch):
    command = [
        "make",
        "--dry-run",
        "--always-make",
        "venv",
        "demo",
        "docs",
        f"TORCH={torch}",
        f"PYTHON={sys.executable}",
    ]
    commands = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert commands.count("--editable") == 2 and ("torch==" in commands) == (torch == "1")
    done = subprocess.run(["sh", "-n"], input=commands, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


COMPILER = """#!/bin/sh
# Logs what is compiled and compiles an empty file instead; all else is the real compiler's.
for last; do :; done
out= empty= previous=
for each; do
    [ "$previous" = -o ] && out=$each
    case $each in *.cpp) source=$each;; -c) empty=1;; esac
    previous=$each
done
[ -z "$empty" ] && exec c++ "$@"
echo "$source" >> compiled
exec c++ -fPIC -x c++ -c /dev/null -o "$out"
"""


@pytest.fixture
def sources(tmp_path):
    shutil.copytree(
        NATIVE,
        tmp_path / NATIVE.relative_to(ROOT),
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "compiler").write_text(COMPILER)
    (tmp_path / "compiler").chmod(0o755)
    return tmp_path


def compiled(folder: Path, **variables: str) -> tuple[set[str], str]:
    """Builds -> names of the files that were compiled, and what was said."""
    log = folder / "compiled"
    log.unlink(missing_ok=True)
    env = {**os.environ, "CXX": str(folder / "compiler"), **variables}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", "made"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and list(folder.glob("made/**/libexperts.so")), done.stderr
    return {Path(line).name for line in log.read_text().splitlines()} if log.exists() else set(), done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_only_what_has_changed_is_compiled_again(sources):
    pytest.importorskip("setuptools")
    native = sources / NATIVE.relative_to(ROOT)
    files = {path.name: path.read_text() for path in native.glob("*.cpp")}
    made, said = compiled(sources)
    assert made == files.keys()
    assert f"building the native kernels: {len(files)} of {len(files)} files, about " in said
    for path in native.glob("*.h"):
        path.write_text(path.read_text() + "// a comment\n")
    made, said = compiled(sources)
    assert made == set() and "building the native kernels" not in said
    for name in ("wave.h", "probe.cpp"):
        (native / name).write_text((native / name).read_text() + "extern int added;\n")
    made, said = compiled(sources)
    assert made == {"probe.cpp", *(name for name, text in files.items() if '#include "wave.h"' in text)}
    assert f"building the native kernels: {len(made)} of {len(files)} files, about " in said
    if platform.machine() == "x86_64":  # the others' objects are there, those of left-out sets are nearly empty
        made, said = compiled(sources, HYBRIMOE_NATIVE_ONLY_HERE="1")
        isas = {name for name in files if name.startswith("isa_")} - {"isa_avx2.cpp", "isa_portable.cpp"}
        assert made <= isas and len(made) >= 2 and re.search("about [0-2] s", said)
