"""One line that changes and vanishes, on a terminal and in a notebook; nothing anywhere else."""

from __future__ import annotations

import io
import sys
import types

import pytest

from hybrimoe_jax import encoding, progress
from hybrimoe_jax.progress import Progress, track


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def screen(monkeypatch):
    monkeypatch.setattr(progress, "SOON_S", 0.0)
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    stream = Screen()
    for module in (progress, encoding):  # pytest puts its own in place of sys.stderr after this
        monkeypatch.setattr(module, "sys", types.SimpleNamespace(stderr=stream, modules=sys.modules))
    return stream


def test_a_terminal_shows_one_line_that_vanishes(screen):
    assert list(track("abc", 3, "reading")) == ["a", "b", "c"]
    said = screen.getvalue()
    assert "reading: 2 of 3" in said and "\n" not in said and said.endswith("\r\x1b[K")


def test_it_vanishes_when_the_work_breaks_off(screen):
    with pytest.raises(KeyboardInterrupt), Progress("generating", 9, "tokens") as shown:
        shown.to(4)
        raise KeyboardInterrupt
    assert "4 of 9 tokens" in screen.getvalue() and screen.getvalue().endswith("\r\x1b[K")


def test_short_work_and_files_show_nothing(monkeypatch):
    for stream in (Screen(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        assert list(track(range(3), 3, "reading")) == [0, 1, 2]
        assert stream.getvalue() == ""


def test_it_can_be_turned_off(screen, monkeypatch):
    monkeypatch.setenv("HYBRIMOE_PROGRESS", "off")
    list(track(range(3), 3, "reading"))
    assert screen.getvalue() == ""


def test_a_notebook_replaces_one_html_line(screen, monkeypatch):
    shown = []

    class Handle:
        def update(self, data, raw):
            shown.append(data["text/html"])

    def display(data, raw, display_id):
        shown.append(data["text/html"])
        return Handle()

    shell = types.SimpleNamespace(get_ipython=lambda: types.SimpleNamespace(kernel=object()))
    monkeypatch.setitem(sys.modules, "IPython", shell)
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(display=display))
    list(track("ab", 2, "<reading>"))
    assert len(shown) == 3 and "&lt;reading&gt;: 1 of 2" in shown[1] and shown[-1] == ""
    assert screen.getvalue() == ""
