"""Executes notebooks/*.py into the notebooks beside them, with their outputs: `python scripts/notebooks.py [NAME ...]`.

A notebook is written as a `.py` in jupytext's percent format, so that it can be read, linted and compared. The `.ipynb`
is made from it and holds what its cells gave, and the mark of the source that gave it: `problems` finds a notebook that
is not of the present source, and one that shows an error, the machine or its user. `--check` executes nothing.

Tags of a cell: "measured": its outputs hold times of a clock, which differ from run to run; "data": they need the
public traces. `short` is code that runs after the cell where the variable HYBRIMOE_SHORT is set: smaller numbers for
the tests.
"""

from __future__ import annotations

import argparse
import getpass
import hashlib
import importlib
import json
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parents[1] / "notebooks"
SECONDS = 900
"""For a cell."""
LARGEST = 600_000
"""Bytes of a notebook."""


class Cell(NamedTuple):
    """One cell of a `.py`: "markdown" or "code", its text, what stands behind `# %%`."""

    kind: str
    source: str
    metadata: dict[str, Any]

    @property
    def tags(self) -> list[str]:
        return self.metadata.get("tags", [])


def names() -> list[str]:
    """Of all notebooks, in order."""
    return sorted(path.stem for path in FOLDER.glob("*.py"))


def cells(name: str) -> list[Cell]:
    """The cells of a notebook's `.py`."""
    found = []
    parts = re.split(r"^# %%(.*)\n", (FOLDER / f"{name}.py").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for head, text in zip(parts[1::2], parts[2::2], strict=True):
        given = re.findall(r'(\w+)=(\[[^\]]*\]|"(?:[^"\\]|\\.)*")', head)
        metadata = {key: json.loads(value) for key, value in given}
        kind = "markdown" if "[markdown]" in head else "code"
        source = text.strip("\n")
        if kind == "markdown":
            source = re.sub(r"^# ?", "", source, flags=re.MULTILINE)
        found.append(Cell(kind, source, metadata))
    return found


def mark(name: str) -> str:
    """Of the code that a notebook's cells run."""
    code = [cell.source for cell in cells(name) if cell.kind == "code"]
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()[:16]


def notebook(name: str) -> dict[str, Any]:
    """As nbformat 4.5 has it, without outputs."""
    made = []
    for number, cell in enumerate(cells(name), 1):
        one = {"cell_type": cell.kind, "id": f"cell-{number}", "metadata": cell.metadata}
        more = {"execution_count": None, "outputs": []} if cell.kind == "code" else {}
        made.append({**one, "source": cell.source.splitlines(keepends=True), **more})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}, "source": mark(name)}
    return {"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def execute(name: str) -> dict[str, Any]:
    """The notebook with what its cells give, in a kernel of its own; the exception of the first cell that fails."""
    nbformat, nbclient = map(importlib.import_module, ("nbformat", "nbclient"))  # not everywhere, so not for pyright
    # Not shown: tqdm's warning of a widget that nobody sees, and a slow cell's progress, which leaves an empty output.
    quiet = {"PYTHONWARNINGS": "ignore:IProgress not found", "HYBRIMOE_PROGRESS": "off"}
    node = nbformat.reads(json.dumps(notebook(name)), as_version=4)
    nbclient.NotebookClient(node, timeout=SECONDS, resources={"metadata": {"path": str(FOLDER)}}).execute(
        env=os.environ | quiet
    )
    done = json.loads(nbformat.writes(node))
    for cell in done["cells"]:
        cell["metadata"].pop("execution", None)
        if "outputs" in cell:
            cell["outputs"] = list(plain(cell["outputs"]))
    return done


def reworded(name: str) -> dict[str, Any] | None:
    """The notebook with the outputs that are kept, where only its text has changed; else None."""
    made = notebook(name)
    if not (FOLDER / f"{name}.ipynb").is_file() or stored(name)["metadata"].get("source") != mark(name):
        return None
    kept = [cell for cell in stored(name)["cells"] if cell["cell_type"] == "code"]
    for cell, before in zip((cell for cell in made["cells"] if cell["cell_type"] == "code"), kept, strict=True):
        cell |= {part: before[part] for part in ("execution_count", "outputs")}
    return made


def plain(outputs: list[dict]) -> Iterator[dict]:
    """Without what a plot returns and what only describes a picture; what is printed in one piece."""
    printed: dict = {}
    for output in outputs:
        data = output.get("data", {})
        if "image/png" in data:
            data.pop("text/plain", None)
        if "".join(data.get("text/plain", "")).startswith("<Axes"):
            continue
        if output["output_type"] == "stream" and output["name"] == printed.get("name"):
            printed["text"] += output["text"]
            continue
        printed = output if output["output_type"] == "stream" else {}
        yield output


def stored(name: str) -> dict[str, Any]:
    """The notebook as it is kept."""
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))


def write(name: str, made: dict[str, Any]) -> None:
    text = json.dumps(made, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    (FOLDER / f"{name}.ipynb").write_text(text, encoding="utf-8")


def problems(name: str) -> list[str]:
    """What is wrong with the notebook as it is kept, a line each; none where all is well."""
    if not (FOLDER / f"{name}.ipynb").is_file():
        return ["there is no .ipynb beside the .py"]
    kept, said = stored(name), []
    pairs = [("".join(cell["source"]), cell["cell_type"]) for cell in kept["cells"]]
    if pairs != [(cell.source, cell.kind) for cell in cells(name)]:
        said.append("its cells are not those of the .py")
    elif kept["metadata"].get("source") != mark(name):
        said.append("its outputs are not those of the present source")
    code = [cell for cell in kept["cells"] if cell["cell_type"] == "code"]
    if [cell["execution_count"] for cell in code] != list(range(1, 1 + len(code))):
        said.append("its cells were not executed in order")
    if any(out["output_type"] == "error" or warns(out) for cell in code for out in cell["outputs"]):
        said.append("a cell shows an error or a warning")
    shown = json.dumps([without_pictures(cell["outputs"]) for cell in code])
    for found in re.findall(r"(?:/home|/root|/Users|/tmp|/work)/[\w./-]*", shown):
        said.append(f"it shows a path of the machine: {found}")
    for private in {socket.gethostname(), getpass.getuser()} - {"root", "user", "localhost"}:
        if re.search(rf"\b{re.escape(private)}\b", shown):
            said.append(f"it shows a name of the machine or its user: {private}")
    if (size := (FOLDER / f"{name}.ipynb").stat().st_size) > LARGEST:
        said.append(f"it has {size} bytes, more than {LARGEST}")
    return said


def warns(output: dict) -> bool:
    """Whether it is more than a note on standard error."""
    said = "".join(output.get("text", "")) if output.get("name") == "stderr" else ""
    return re.search("warning|error|traceback", said, re.IGNORECASE) is not None


def without_pictures(outputs: list[dict]) -> list[dict]:
    return [{k: {**v, "image/png": ""} if k == "data" else v for k, v in output.items()} for output in outputs]


def main(argv: list[str] | None = None) -> int:
    top = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    top.add_argument("names", nargs="*", metavar="NAME", help="a notebook, without .py (default: those not up to date)")
    top.add_argument("--all", action="store_true", help="all notebooks")
    top.add_argument("--check", action="store_true", help="say what is not up to date")
    args = top.parse_args(argv)
    chosen = args.names or (names() if args.all or args.check else [name for name in names() if problems(name)])
    os.environ.setdefault("HYBRIMOE_DATA", str(FOLDER.parents[1] / "shared" / "data"))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")])
    failed = 0
    for name in chosen:
        begun = time.perf_counter()
        if not args.check:
            write(name, (None if args.names or args.all else reworded(name)) or execute(name))
        said = problems(name)
        failed += bool(said)
        took = "" if args.check else f" ({time.perf_counter() - begun:.0f} s)"
        print(f"{name}: {'; '.join(said) or 'as it should be'}{took}", flush=True)
    return min(1, failed)


if __name__ == "__main__":
    sys.exit(main())
