"""The process in which cases run, and may do what they want: it is limited, watched, and started again when it dies.

It reads lines of JSON, `{"kind": ..., "seed": ...}`, and answers each with two: what will be tried, then what came of
it. What the cases print goes into a file.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import json
import os
import random
import resource
import signal
import sys
import threading
import traceback
import warnings
from pathlib import Path
from typing import Any, NamedTuple, Protocol

LIMIT = 4 << 30
"""Bytes of memory that no case may ask for, beside what the process holds when it starts."""
MOST = 1 << 30
"""Bytes of memory that no case may use: every case is small."""
LONGEST_MESSAGE = 1700


class Case(NamedTuple):
    """What is tried (`what`), and the call that tries it.

    It returns where the answer is right, raises `Wrong` where it is not, UserError where the input is refused.
    `names`: one of them must be in a refusal.
    """

    what: str
    run: Any
    names: tuple[str, ...] = ()


class Kind(Protocol):
    """One kind of input."""

    def __init__(self, base: Path):
        """`base`: a folder of its own for what all its cases share."""

    def case(self, rng: random.Random, folder: Path) -> Case:
        """One case; its files lie in `folder`, and it may write into `folder / "out"` alone."""
        ...


class Wrong(Exception):
    """An answer that is not the reference's."""


class Watch:
    """Notices files that are opened for writing, made, moved or removed outside the places that a case may write to."""

    EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree")

    def __init__(self):
        self.allowed: tuple[str, ...] | None = None
        self.strays: list[str] = []
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple) -> None:
        if self.allowed is None:
            return
        if event == "open" and isinstance(args[0], (str, bytes)) and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            self.look(args[0], -1)
        elif event in self.EVENTS:
            for path in args[: 1 + (event in ("os.rename", "os.link", "os.symlink"))]:
                if isinstance(path, (str, bytes, os.PathLike)):
                    self.look(path, args[-1])

    def look(self, path: Any, folder: Any) -> None:
        """`folder`: the descriptor of the one that `path` is below, where it is at least 0."""
        above = f"/proc/self/fd/{folder}" if isinstance(folder, int) and folder >= 0 else ""
        place = os.path.realpath(os.path.join(above, os.fsdecode(path)))
        if not place.startswith(self.allowed or ()) and place != os.devnull:
            self.strays.append(place)


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Path -> size and time of change of every file below `folder`, what lies in an `out` left out."""
    found = {}
    for place, folders, names in os.walk(folder):
        if "out" in folders:
            folders.remove("out")
        for name in names:
            status = os.lstat(os.path.join(place, name))
            found[os.path.join(place, name)] = status.st_size, status.st_mtime_ns
    return found


def peak(reset: bool = False) -> int:
    """The most memory that the process has used, in bytes, since it was reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def check_message(message: str, names: tuple[str, ...]) -> None:
    """A refusal is one line that a person can read, and names what it is about."""
    line = " ".join(message.split())
    if not line:
        raise Wrong("the refusal says nothing")
    if len(line) > LONGEST_MESSAGE:
        raise Wrong(f"the refusal has {len(line)} characters: {line[:100]!a} ...")
    if not line.isprintable():
        raise Wrong(f"the refusal is not printable: {line[:300]!a}")
    if names and not any(name in line for name in names):
        raise Wrong(f"the refusal names none of {', '.join(names)}: {line[:300]!a}")


def place_of(error: BaseException) -> str:
    """Where in the package it came from: the deepest of its lines."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "hybrimoe_jax" in f.filename] or frames
    return f"{'/'.join(Path(ours[-1].filename).parts[-3:])}:{ours[-1].lineno}" if ours else "nowhere"


class Worker:
    """Runs cases of all kinds in a folder of its own."""

    def __init__(self, root: Path, planted: bool):
        self.root, self.planted, self.kinds = root, planted, {}
        self.watch = Watch()
        programs = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
        self.anywhere = str(root / "scratch"), "/dev/pts", "/dev/tty", "/proc/", *filter(None, [programs])
        self.threads: list[str] = []
        threading.excepthook = lambda args: self.threads.append(f"{args.exc_type.__name__}: {args.exc_value}")

    def kind(self, name: str) -> Kind:
        if name not in self.kinds:
            from fuzz.kinds import KINDS

            base = self.root / "bases" / name
            base.mkdir(parents=True)
            self.kinds[name] = importlib.import_module(f"fuzz.{KINDS[name]}").Kind(base)
            if self.planted:
                importlib.import_module("fuzz.planted").FAULTS[name]()
        return self.kinds[name]

    def prepare(self, name: str, seed: int) -> tuple[Case, Path]:
        folder = self.root / f"{name}-{seed}"
        (folder / "out").mkdir(parents=True)
        return self.kind(name).case(random.Random(f"{name} {seed}"), folder), folder

    def run(self, name: str, case: Case, folder: Path) -> dict[str, Any]:
        """-> outcome: "answered", "refused" or "found"; why and where, for what was found; bytes of memory."""
        from hybrimoe_jax.errors import UserError

        before = files_of(self.root)
        held = peak(reset=True)
        self.watch.strays, self.threads[:] = [], []
        self.watch.allowed = str(folder / "out"), *self.anywhere
        found: dict[str, Any] = {"outcome": "answered"}
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                case.run()
            except UserError as error:
                found = {"outcome": "refused"}
                try:
                    check_message(str(error), case.names)
                except Wrong as wrong:
                    found = {"outcome": "found", "why": str(wrong), "place": place_of(error)}
            except BaseException as error:  # a panic of a library in Rust, an exit, an interrupt
                kind = "" if isinstance(error, Wrong) else f"{type(error).__name__}: "
                found = {"outcome": "found", "why": f"{kind}{str(error)[:600]}", "place": place_of(error)}
                found["trace"] = traceback.format_exc()[-3000:]
        self.watch.allowed = None
        found["bytes"] = max(0, peak() - held)
        ours = [w for w in warned if not issubclass(w.category, (UserWarning, ImportWarning, ResourceWarning))]
        changed = [path for path, what in files_of(self.root).items() if before.get(path) != what]
        changed += [path for path in before if not os.path.lexists(path)]
        for what, why in (
            (self.threads, "an exception in a thread"),
            (self.watch.strays, "written outside the destination"),
            (changed, "files changed outside the destination"),
            ([f"{w.category.__name__}: {w.message} ({w.filename}:{w.lineno})" for w in ours], "a raw warning"),
            ([f"{found['bytes'] >> 20} MiB"] if found["bytes"] > MOST else [], "much memory"),
        ):
            if what and found["outcome"] != "found":
                found |= {"outcome": "found", "why": f"{why}: {what[0][:300]}", "place": why}
        return found


def serve(root: Path, planted: bool) -> None:
    """Answers requests until its input ends."""
    import shutil

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    said = os.open(root / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    faulthandler.register(signal.SIGUSR1, sys.stderr, all_threads=False)
    elsewhere, scratch = root / "elsewhere", root / "scratch"
    elsewhere.mkdir()
    scratch.mkdir()
    os.environ.update(
        HOME=str(elsewhere), XDG_CACHE_HOME=str(elsewhere), TMPDIR=str(scratch), HYBRIMOE_START_CACHE="off"
    )
    os.chdir(elsewhere)
    sys.dont_write_bytecode = True
    worker = Worker(root, planted)
    held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT + held, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number, line in enumerate(sys.stdin):
        if number % 100 == 99:
            gc.collect()  # engines that failed wait for it, and the limit counts what they have reserved
        asked = json.loads(line)
        case, folder = worker.prepare(asked["kind"], asked["seed"])
        answers.write(json.dumps({"what": case.what}) + "\n")
        answers.write(json.dumps(worker.run(asked["kind"], case, folder)) + "\n")
        with contextlib.suppress(OSError):
            shutil.rmtree(folder)
