"""Writes the table of compiled programs into docs/gpu.md, from what the last run of the tests measured.

usage: python tests/gpu_aot/table.py [--all] [FILE]

FILE: a page with the two marks, `<!-- table: compiled -->` and `<!-- end -->`; the table goes between them.
Without one it is printed. --all: every program on a line of its own, with the largest float array that a kernel writes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import measure
from measure import Measured
from published import PUBLISHED
from step_programs import STEPS

BEGIN, END = "<!-- table: compiled -->", "<!-- end -->"
COLUMNS = (
    "front",
    "dense layer",
    "shared experts",
    "block int4-g64",
    "block bf16",
    "an expert int4-g64",
    "an expert bf16",
    "last token",
)


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f}" if size < 10**7 else f"{size / 1e6:.0f}"


def cell(program: Measured) -> str:
    found = ", ".join(name for name in program.products if name != "f32")
    return f"{program.kernels} / {megabytes(program.temporary)}" + (f" {found}" if found else "")


def short() -> Iterator[str]:
    """A line a step: kernels / temporary MB of each part, and the arithmetic of its products on tensor cores."""
    yield "| model | step | " + " | ".join(COLUMNS) + " |"
    yield "| --- | --- |" + " --- |" * len(COLUMNS)
    for model in PUBLISHED:
        for step in STEPS:
            programs = measure.load(model, step)
            parts = [next((cell(p) for p in programs if p.part == name), "-") for name in COLUMNS]
            yield f"| {model} | {step} | " + " | ".join(parts) + " |"


def full() -> Iterator[str]:
    yield "| model | step | program | kernels | temporary MB | largest float array, MB | products |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for model in PUBLISHED:
        for step in STEPS:
            for p in measure.load(model, step):
                products = ", ".join(f"{count} {name}" for name, count in p.products.items())
                sizes = f"{megabytes(p.temporary)} | {megabytes(p.largest)}"
                yield f"| {model} | {step} | {p.part} | {p.kernels} | {sizes} | {products} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", nargs="?", type=Path, metavar="FILE")
    parser.add_argument("--all", action="store_true", help="every program")
    options = parser.parse_args()
    lines = list(full() if options.all else short())
    if options.page is None:
        print("\n".join(lines))
        return
    before, rest = options.page.read_text().split(BEGIN)
    after = rest.split(END, 1)[1]
    options.page.write_text("\n".join([before + BEGIN, "", *lines, "", END]) + after)


if __name__ == "__main__":
    main()
