"""What `make docs` builds from: every page has its place, and the reference names what exists. Needs no Sphinx."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import hybrimoe_jax
import hybrimoe_jax.decide

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {str(path.relative_to(DOCS).with_suffix("")): path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md")}
INDEX = PAGES["index"]
REFERENCE = [text for name, text in PAGES.items() if name.startswith("api/")]


def reference_names() -> list[str]:
    """Whole names of the entries, each with the module that `currentmodule` says."""
    found = []
    for text in REFERENCE:
        module = ""
        for directive, name in re.findall(r"^\.\. (currentmodule|auto\w+):: (\S+)", text, re.MULTILINE):
            if directive == "currentmodule":
                module = name
            else:
                found.append(name if name.startswith("hybrimoe_jax.") else f"{module}.{name}")
    return found


def test_every_page_is_in_the_contents():
    listed = set()
    for block in re.findall(r"```\{toctree\}\n(.*?)```", INDEX, re.DOTALL):
        for entry in (line for line in block.splitlines() if line and not line.startswith(":")):
            pages = {str(path.relative_to(DOCS).with_suffix("")) for path in DOCS.glob(f"{entry}.md")}
            assert pages, f"index.md lists {entry}"
            listed |= pages
    assert PAGES.keys() - listed == {"index"}


def test_pages_that_include_another_name_a_file():
    for text in PAGES.values():
        for target in re.findall(r"```\{include\} (\S+)", text):
            assert (DOCS / target).is_file()
    end = re.search(r':end-before: "(.*)"', INDEX)[1]
    assert f"\n{end}\n" in (DOCS.parent / "README.md").read_text(encoding="utf-8")


def test_the_reference_names_what_exists():
    names = reference_names()
    assert len(names) > 80 and len(names) == len(set(names))
    for name in names:
        module, _, member = name.rpartition(".")
        assert hasattr(importlib.import_module(module), member), name


def test_the_reference_has_every_public_name():
    described = {name.rpartition(".")[2] for name in reference_names()}
    public = {*hybrimoe_jax.__all__, *hybrimoe_jax.decide.__all__} - {"REFUSED"}
    assert public - described == set()
