"""Everything that wants a GPU, unattended, as two calls that keep to their time; `gpu_checks.sh` starts it.

    scripts/gpu_checks.sh first [--dry-run]      300 s: transfers, programs and kernels, then a real model
    scripts/gpu_checks.sh second [--dry-run]     240 s: exactness cells, memory, the engine's tests
    scripts/gpu_checks.sh summary DIR ...        puts the files of both calls together

The most valuable comes first. Each part is a process with a limit of its own. None stops the others, and what a part
that was stopped had found counts. `$OUT` (gpu-out) gets at most six files: `first.txt` with all that was printed,
`first.json` with every figure, `summary.json` (see `gpu_decisions`), the profile of a few decode steps. Exit code 0 if
all parts passed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gpu_decisions

ROOT = Path(__file__).resolve().parents[1]
CALLS = {"first": 300.0, "second": 240.0}
"""Seconds of each call, all of it."""
MARGIN_S = 6.0
"""Kept of a call's time for writing files."""
TESTS = (
    "two_programs",
    "out_of_memory",
    "device_memory",
    "slots",
    "engine",
    "engine_stats",
    "host_memory",
    "overlap",
    "layer_stream",
    "packed_experts",
)


@dataclasses.dataclass(frozen=True)
class Part:
    """One process: seconds at most, and what to run.

    `{json}` and `{out}` are filled in; `small` is added in a dry run.
    """

    name: str
    limit_s: float
    command: tuple[str, ...]
    small: tuple[str, ...] = ("--small",)


def facts(limit_s: float, name: str, *parts: str) -> Part:
    chosen = [word for part in parts for word in ("--part", part)]
    return Part(name, limit_s, ("scripts/gpu_facts.py", "--json", "{json}", *chosen))


PARTS = {
    "first": (
        Part("environment", 40, ("scripts/gpu_environment.py", "--json", "{json}"), ()),
        facts(60, "transfers", "transfer", "read-back", "dispatch"),
        facts(70, "kernels", "slots", "cuda", "precision", "packed", "threads", "callback"),
        Part("model", 300, ("scripts/gpu_model.py", "--json", "{json}", "--trace", "{out}/profile.xplane.pb.gz")),
    ),
    "second": (
        Part("environment", 40, ("scripts/gpu_environment.py", "--json", "{json}"), ()),
        Part("cells", 90, ("scripts/gpu_cells.py", "--json", "{json}")),
        Part("memory", 60, ("scripts/gpu_memory.py", "--json", "{json}")),
        Part("tests", 240, ("-m", "pytest", "-q", "-n4", "--tb=short", "-W", "default", "-p", "no:cacheprovider",
                            *(f"tests/test_{name}.py" for name in TESTS)), ("--collect-only",)),
    ),
}  # fmt: skip


class Call:
    """One call under way.

    Args: name: a key of `CALLS`. out: its folder. dry: small sizes. only: parts to run; all if empty.
    """

    def __init__(self, name: str, out: Path, dry: bool, only: list[str]):
        self.name, self.out, self.dry = name, out, dry
        self.parts = [part for part in PARTS[name] if not only or part.name in only]
        self.end = time.monotonic() + CALLS[name] - MARGIN_S
        self.record: dict[str, Any] = {"call": name, "dry_run": dry, "device": "unknown", "platform": "unknown"}
        self.record |= {"parts": {}, "facts": {}}

    def run(self) -> bool:
        """Runs the parts in order; whether all passed. The files are whole after each."""
        with open(self.out / f"{self.name}.txt", "w", encoding="utf-8") as log:
            for part in self.parts:
                self.record["parts"][part.name] = done = self._run(part, log)
                print(f"{part.name}: {done['said']} in {done['seconds']:.0f} s", flush=True)
                self._write()
        for record in json.loads((self.out / "summary.json").read_text(encoding="utf-8"))["decisions"]:
            print(f"{record['verdict']:10} {record['decision']}: {record['assumes']}")
        return all(done["said"] == "passed" for done in self.record["parts"].values())

    def _run(self, part: Part, log) -> dict[str, Any]:
        began, left = time.monotonic(), min(part.limit_s, self.end - time.monotonic())
        if left < 3:
            return {"said": "left out: no time", "seconds": 0.0}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "facts.json")
            words = [word.format(json=file, out=self.out) for word in part.command]
            command = [os.environ.get("PYTHON", sys.executable), *words, *(part.small if self.dry else ())]
            log.write(f"\n=== {part.name}: {' '.join(command)}\n")
            log.flush()
            start = log.tell()
            grows = {} if part.name == "memory" else {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # beside others
            options: dict[str, Any] = {"cwd": ROOT, "env": {**os.environ, **grows}, "start_new_session": True}
            said = wait(subprocess.Popen(command, stdout=log, stderr=log, **options), left)
            if file.exists():
                found = json.loads(file.read_text(encoding="utf-8"))
                self.record |= found.get("about", {})
                self.record["facts"] |= found["facts"]
        if part.name == "tests":
            text = (self.out / f"{self.name}.txt").read_text(encoding="utf-8", errors="replace")[start:]
            self.record["facts"]["tests"] = counts(text)
        return {"said": said, "seconds": time.monotonic() - began}

    def _write(self) -> None:
        file = self.out / f"{self.name}.json"
        file.write_text(json.dumps(self.record, indent=1), encoding="utf-8")
        write_summary(self.out, [file])


def wait(process: subprocess.Popen, seconds: float) -> str:
    """Ends a process, and all that it started, once its time is up."""
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
    if code is None:
        return f"stopped after {seconds:.0f} s"
    return "passed" if code == 0 else f"FAILED (exit {code})"


def counts(text: str) -> dict[str, int]:
    """How many tests passed and failed, by pytest's last line; of a run that was stopped, the letters of its lines."""
    last = (text.strip().splitlines() or [""])[-1]
    found = {what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|error)", last)}
    if not found:
        marks = "".join(re.findall(r"^([.FEsxX]+)(?: +\[ *\d+%\])?$", text, re.MULTILINE))
        found = {"passed": marks.count("."), "failed": marks.count("F"), "error": marks.count("E")}
    return {"passed": found.get("passed", 0), "failed": found.get("failed", 0) + found.get("error", 0)}


def write_summary(out: Path, files: list[Path]) -> None:
    (out / "summary.json").write_text(json.dumps(gpu_decisions.summarise(files), indent=1), encoding="utf-8")


def main() -> int:
    top = argparse.ArgumentParser(prog="scripts/gpu_checks.sh", description=str(__doc__).splitlines()[0])
    top.add_argument("what", choices=(*CALLS, "summary"))
    top.add_argument("rest", nargs="*", help="only these parts of the call; of summary, folders of results")
    top.add_argument("--dry-run", action="store_true", help="small sizes, to see that everything runs")
    args = top.parse_args()
    out = Path(os.environ.get("OUT", "gpu-out")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    if args.what == "summary":
        write_summary(out, [f for folder in args.rest for f in sorted(Path(folder).glob("*.json")) if f.stem in CALLS])
        return 0
    unknown = set(args.rest) - {part.name for part in PARTS[args.what]}
    if unknown:
        top.error(
            f"unknown part {', '.join(sorted(unknown))}; {args.what} has {', '.join(p.name for p in PARTS[args.what])}"
        )
    return 0 if Call(args.what, out, args.dry_run, args.rest).run() else 1


if __name__ == "__main__":
    sys.exit(main())
