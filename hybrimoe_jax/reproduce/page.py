"""The page docs/reproduction.md: its text, `reproduction.md` beside this file, with every figure filled in.

`{{table: NAME}}` is a table of `tables.TABLES`; `{{NAME|ARGUMENT|...}}` is what a function of `sayings.SAYINGS` says.
What the records do not suffice for is said to be so, in its place.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from hybrimoe_jax.reproduce.figures import Figures, Missing, Results
from hybrimoe_jax.reproduce.sayings import SAYINGS
from hybrimoe_jax.reproduce.standing import standing
from hybrimoe_jax.reproduce.tables import TABLES

TEXT = Path(__file__).parent / "reproduction.md"
TABLE = "table: "
NOT_RUN = "(not run)"
PLACE = re.compile(r"\{\{(.+?)\}\}", re.DOTALL)
WIDTH = 118


def page(results: Results, text: str | None = None) -> str:
    """The page from these records."""
    found = Figures(results)
    filled = PLACE.sub(lambda match: said(found, match[1]), TEXT.read_text("utf-8") if text is None else text)
    return "\n\n".join(map(wrapped, filled.strip().split("\n\n"))) + "\n"


def said(found: Figures, place: str) -> str:
    """What stands in one place."""
    try:
        if place.startswith(TABLE):
            return {**TABLES, "standing": standing}[place.removeprefix(TABLE)](found).rstrip()
        name, *arguments = place.split("|")
        return SAYINGS[name](found, *arguments)
    except Missing:
        return NOT_RUN


def places(text: str) -> list[str]:
    """What stands in the text's places, unfilled."""
    return PLACE.findall(text)


def wrapped(block: str) -> str:
    """A paragraph or a list in lines of the page's width; tables, headings and code as they are."""
    if block.startswith(("#", "|", "    ")):
        return block
    items = re.split(r"\n(?=\* )", block)
    return "\n".join(
        textwrap.fill(
            " ".join(item.split()), WIDTH, subsequent_indent="  " if item.startswith("* ") else "",
            break_long_words=False, break_on_hyphens=False,
        )
        for item in items
    )  # fmt: skip
