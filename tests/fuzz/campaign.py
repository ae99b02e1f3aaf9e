"""The campaign: cases of all kinds for so many seconds, shared evenly, in a worker that may die.

A case is found where the answer is wrong, a refusal is no line that names its object, anything but a UserError is
raised, the worker dies, is silent for 20 seconds, takes much memory or writes where it must not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fuzz.kinds import KINDS

HERE = Path(__file__).parent
HANG = 20.0
"""Seconds that a case may run. Nowhere those count in which the machine has no core for it."""
START = 300.0
"""Seconds that a worker may take for what a kind's cases share."""


@dataclasses.dataclass
class Count:
    """Cases of one kind."""

    tried: int = 0
    answered: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest: float = 0.0


@dataclasses.dataclass(frozen=True)
class Finding:
    """A case that broke the promise. `place`: where, in the package; findings of one place are told once."""

    kind: str
    seed: int
    what: str
    why: str
    place: str
    trace: str = ""

    def __str__(self) -> str:
        repeat = f"python tests/fuzz {self.kind} {self.seed}"
        return f"{self.kind} {self.seed}: {self.what}\n    {self.why} [{self.place}]\n    again: {repeat}"


class Client:
    """A worker process, started when it is needed and again when it has ended."""

    def __init__(self, planted: bool = False):
        self.planted, self.root = planted, Path()
        self.process: subprocess.Popen[bytes] | None = None
        self.gone, self.ran, self.last, self.read = 0.0, 0.0, time.monotonic(), b""

    def start(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="hybrimoe-fuzz-"))
        command = [sys.executable, str(HERE), "--serve", str(self.root), *["--planted"] * self.planted]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.read = b""

    def ask(self, kind: str, seed: int) -> tuple[dict[str, Any], float]:
        """What came of a case, and its seconds."""
        if self.process is None:
            self.start()
        process = self.process
        assert process is not None and process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps({"kind": kind, "seed": seed}).encode() + b"\n")
            process.stdin.flush()
        announced = self.line(START)
        if "why" in announced:
            return {"what": "its base", **announced}, HANG
        begun = self.now()
        answer = {**announced, **self.line(HANG)}
        return answer, self.now() - begun

    def line(self, limit: float) -> dict[str, Any]:
        """The next answer; a finding where there is none."""
        process = self.process
        assert process is not None and process.stdout is not None
        begun = self.now()
        while b"\n" not in self.read:
            if select.select([process.stdout], [], [], 0.5)[0]:
                piece = os.read(process.stdout.fileno(), 1 << 16)
                if not piece:
                    break
                self.read += piece
            if self.now() - begun > limit:
                process.send_signal(signal.SIGUSR1)  # it says where it is
                time.sleep(0.5)
                why = f"no end within {limit:g} seconds"
                return {"outcome": "found", "why": why, "place": "hang", "trace": self.ended()}
        text, end, self.read = self.read.partition(b"\n")
        if end:
            return json.loads(text)
        code, said = process.wait(), self.ended()
        return {
            "outcome": "found",
            "why": f"the process ended ({code}): {said[-300:]!a}",
            "place": "end",
            "trace": said,
        }

    def ended(self) -> str:
        """Stops it: the end of what it has said."""
        file = self.root / "said"
        said = file.read_text(errors="replace")[-2500:] if file.exists() else ""
        self.stop()
        return said

    def now(self) -> float:
        """Seconds that have gone. Of those in which the worker wanted to run only what it ran counts.

        It is asked at least every second; more than a second is a time in which this process stood still.
        """
        here = time.monotonic()
        past, self.last = here - self.last, here
        if past > 0.3:
            before, (self.ran, ready) = self.ran, self.work()
            past = min(past, 1.0, max(0.0, self.ran - before) if ready else 1.0)
        self.gone += past
        return self.gone

    def work(self) -> tuple[float, bool]:
        """Seconds of a core that the worker and its own processes have had, and whether one of them wants one now."""
        worker = str(self.process and self.process.pid)
        seconds, ready = 0.0, False
        with contextlib.suppress(OSError):  # there is no worker, or no such file on this system
            for pid in (worker, *Path(f"/proc/{worker}/task/{worker}/children").read_text().split()):
                for thread in Path(f"/proc/{pid}/task").iterdir():
                    state, *fields = (thread / "stat").read_text().rpartition(")")[2].split()
                    seconds += (int(fields[10]) + int(fields[11])) / os.sysconf("SC_CLK_TCK")
                    ready |= state == "R"
        return seconds, ready

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                with contextlib.suppress(OSError):
                    if pipe:
                        pipe.close()
            self.process = None
            shutil.rmtree(self.root, ignore_errors=True)


@dataclasses.dataclass
class Campaign:
    """What a run has tried and found."""

    counts: dict[str, Count]
    found: list[Finding]

    def table(self) -> str:
        """A line for each kind."""
        lines = [f"{'kind':12} {'tried':>7} {'answered':>9} {'refused':>8} {'found':>6} {'slowest s':>10}"]
        for kind, c in self.counts.items():
            found = sum(f.kind == kind for f in self.found)
            lines.append(f"{kind:12} {c.tried:7} {c.answered:9} {c.refused:8} {found:6} {c.slowest:10.2f}")
        return "\n".join(lines)


def run(
    seconds: float,
    kinds: Iterable[str] = tuple(KINDS),
    first: int = 0,
    planted: bool = False,
    until_found: bool = False,
    most: int | None = None,
    told: Callable[[Finding], None] = lambda finding: None,
) -> Campaign:
    """Cases from seed `first` on, of every kind for its share of the seconds, `most` of each at most.

    `until_found`: a kind ends with its first finding. Findings of one kind and place are told once, at once to `told`.
    """
    counts = {kind: Count() for kind in kinds}
    found: dict[tuple[str, str, str], Finding] = {}
    client = Client(planted)
    ends = client.now() + seconds
    active = list(counts)
    try:
        while active and client.now() < ends:
            kind = min(active, key=lambda name: counts[name].seconds)
            if counts[kind].tried == most:
                active.remove(kind)
                continue
            count, seed = counts[kind], first + counts[kind].tried
            answer, took = client.ask(kind, seed)
            count.seconds += took + 0.01
            count.tried += 1
            count.slowest = max(count.slowest, took)
            if answer["outcome"] != "found":
                setattr(count, answer["outcome"], getattr(count, answer["outcome"]) + 1)
                continue
            key = kind, answer["place"], answer["why"][:12]
            trace = answer.get("trace", "")
            if key not in found:
                found[key] = Finding(kind, seed, answer["what"], answer["why"], answer["place"], trace)
                told(found[key])
            if until_found:
                active.remove(kind)
    finally:
        client.stop()
    return Campaign(counts, list(found.values()))


def repeat(kind: str, seed: int, planted: bool = False) -> Finding | str:
    """One case again: the finding, or how it ended."""
    client = Client(planted)
    try:
        answer, took = client.ask(kind, seed)
    finally:
        client.stop()
    if answer["outcome"] == "found":
        return Finding(kind, seed, answer["what"], answer["why"], answer["place"], answer.get("trace", ""))
    return f"{kind} {seed}: {answer['what']}\n    {answer['outcome']} in {took:.2f} s, {answer['bytes'] >> 20} MiB"
