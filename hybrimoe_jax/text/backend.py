"""The `tokenizers` library behind one door: what it raises, panics included, becomes a UserError that names the file.

The library is written in Rust. Some damaged files make it panic, and a panic reaches Python as a BaseException, after
lines of its own on standard error.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hybrimoe_jax.errors import UserError, shown

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

PROBES = ("", "a", "To be, or not: naïve ﬁ① 你好 🙂\x00\n\u0301")
_ONE_AT_A_TIME = threading.Lock()  # file descriptor 2 is the whole process's


def load_backend(path: Path) -> Backend:
    """What `tokenizer.json` holds, as it serves a prompt: no truncation, no padding, no dropout of merges.

    All three are saved along with a tokenizer that was last used for batches or for training. Some texts are
    encoded, so that a file that makes the library panic at most texts does so here. Raises UserError.
    """
    from tokenizers import Tokenizer as Backend

    with _panics_unheard(), library(f"{path}: not a tokenizer; download or save it again"):
        backend = Backend.from_file(str(path))
        backend.no_truncation()
        backend.no_padding()
        if getattr(backend.model, "dropout", None) is not None:
            backend.model.dropout = None
        for text in PROBES:
            with contextlib.suppress(Exception):  # an error of one text is told when that text comes; panics pass
                backend.encode(text)
    _check_ids(backend.get_vocab(with_added_tokens=False), path)
    return backend


def _check_ids(vocabulary: dict[str, int], path: Path) -> None:
    """UserError for two tokens of one id: the library decodes it to either, another one at each load."""
    if len(set(vocabulary.values())) < len(vocabulary):
        holders = dict[int, str]()
        for token, number in sorted(vocabulary.items()):
            if number in holders:
                raise UserError(
                    f"{path}: the tokens {shown(holders[number])} and {shown(token)} have one id, {number}; "
                    "download or save it again"
                )
            holders[number] = token


@contextlib.contextmanager
def library(what: str) -> Iterator[None]:
    """Turns what the library raises in the block into a UserError that begins with `what`, its text in brackets."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:  # it raises bare Exception, and panics as a class that it does not export
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what} ({shown(str(error), 300)})") from None


@contextlib.contextmanager
def _panics_unheard() -> Iterator[None]:
    """Holds back what is written to standard error in the block; it is written after a block that raises nothing."""
    with _ONE_AT_A_TIME, contextlib.ExitStack() as stack:
        try:
            held, saved = stack.enter_context(tempfile.TemporaryFile()), os.dup(2)
        except OSError:  # no standard error, or no place for a file: then a panic is heard
            yield
            return
        stack.callback(os.close, saved)
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
        held.seek(0)
        with contextlib.suppress(OSError):  # a device that is full, for one: nobody can be told
            os.write(2, held.read())
