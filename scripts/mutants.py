"""Whether the tests of the decisions notice a wrong line. A mutant is one change of one line: some test must fail.

    python scripts/mutants.py                       # all of decide/, sampling and routing; goes on where it stopped
    python scripts/mutants.py --share 0.1 hybrimoe_jax/decide/residency

Mutants: a comparison moved to its boundary or turned round, an operator of arithmetic or logic exchanged, a condition
negated, a number or a truth value changed, min for max, a statement left out. Changed are the bodies of functions;
texts of messages and annotations are left alone.

One process imports and collects all tests once. Each mutant is a fork of it: the code object of the function is
exchanged, and those tests run that have run the changed line, in this process, the ones that noticed a mutant of the
same function first, the quickest next, until one fails or so much processor time has passed (`--seconds`). A mutant
that takes far longer than its tests do without it is noticed too. Nothing is written into the package.

A line of JSON a mutant goes to `--results`; a mutant whose line and tests are as they were is not tried again.
"""

from __future__ import annotations

import argparse
import ast
import collections
import gc
import hashlib
import json
import os
import resource
import signal
import sys
import time
import types
from pathlib import Path
from typing import Any

import coverage
import pytest
from _pytest import runner
from mutations import ROOT, Mutant, digest_of, functions_of, mutants_of

PATHS = ("hybrimoe_jax/decide", "hybrimoe_jax/engine/sampling.py", "hybrimoe_jax/engine/routing.py")
TESTS = ("test_decide_*.py", "test_sampling.py", "test_routing.py", "test_layer_stream.py", "test_cache_state*.py")
LEFT_OUT = "not live and not engine and not notebook and not worker and not microseconds"
MEMORY = 1 << 30
"""Bytes that a mutant may take beside what the collected tests take."""


class Lines:
    """A pytest plugin that notes which tests run which lines of the files, and how long each takes."""

    def __init__(self, paths: list[str]):
        included = [str(ROOT / path) for path in paths]
        self.coverage = coverage.Coverage(data_file=None, config_file=False, include=included)
        self.seconds: dict[str, float] = {}
        self.failing: list[str] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self.coverage.switch_context(item.nodeid)
        begun = time.process_time()
        result = yield
        self.seconds[item.nodeid] = time.process_time() - begun
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failing.append(report.nodeid)

    def by_line(self, paths: list[str]) -> dict[str, dict[int, list[str]]]:
        data = self.coverage.get_data()
        return {path: data.contexts_by_lineno(str(ROOT / path)) for path in paths}


class Trials:
    """A pytest plugin that tries mutants in place of running the collected tests."""

    def __init__(self, options: argparse.Namespace, paths: list[str], found: dict[str, Any], known: dict[str, Any]):
        self.options, self.paths, self.known = options, paths, known
        self.lines, self.seconds = found["lines"], found["seconds"]
        self.noticed: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.running: dict[int, tuple[Mutant, int]] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.items = {item.nodeid: item for item in session.items}
        self.functions = _functions_in_memory()
        gc.collect()
        gc.freeze()
        for path in self.paths:
            for mutant, tree in mutants_of(path, self.options.share, self.options.seed):
                if not self._is_known(mutant):
                    self._start(mutant, tree)
        while self.running:
            self._finish()
        return True

    def _is_known(self, mutant: Mutant) -> bool:
        before = self.known.get(mutant.key)
        if before is None or before["source"] != mutant.source:
            return False
        return bool(before["by"]) or before["tests"] == self.options.digest

    def _tests(self, mutant: Mutant) -> list[str]:
        """Those that run the line, the likeliest to notice first."""
        known, lines = self.noticed[mutant.source], self.lines[mutant.path]
        nearest = (str(line) for line in range(mutant.line, mutant.function[1], -1))  # of a statement of several lines
        tests = set(next((lines[line] for line in nearest if line in lines), ())) & self.seconds.keys()
        ordered = sorted(tests, key=lambda test: (-known[test], self.seconds[test]))
        spent, chosen = 0.0, list[str]()
        for test in ordered:
            if spent < self.options.seconds:
                chosen.append(test)
                spent += self.seconds[test]
        return chosen

    def _start(self, mutant: Mutant, tree: ast.Module) -> None:
        while len(self.running) >= self.options.jobs:
            self._finish()
        tests = self._tests(mutant)
        if not tests:
            return self._note(mutant, None, "no test runs the line")
        code = _code_of(compile(tree, str(ROOT / mutant.path), "exec"), mutant.function)
        functions = self.functions[mutant.path, *mutant.function]
        assert functions, f"{mutant.function} is not in memory"
        here, there = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(here)
                _child(there, code, functions, [(self.items[test], 10 * self.seconds[test] + 2) for test in tests])
            finally:
                os._exit(3)
        os.close(there)
        self.running[pid] = mutant, here

    def _finish(self) -> None:
        pid, status = os.wait()
        mutant, pipe = self.running.pop(pid)
        with os.fdopen(pipe) as said:
            text = said.read()
        if os.WIFSIGNALED(status):
            text = f"signal {os.WTERMSIG(status)}"
        self._note(mutant, text or None, "survives")
        self.noticed[mutant.source][text] += 1

    def _note(self, mutant: Mutant, by: str | None, otherwise: str) -> None:
        line = {**mutant._asdict(), "by": by, "tests": self.options.digest}
        self.known[mutant.key] = line
        with open(self.options.results, "a") as file:
            file.write(json.dumps(line) + "\n")
        if by is None:
            print(f"{otherwise}: {mutant.path}:{mutant.line}: {mutant.key}", file=sys.__stdout__, flush=True)


def _functions_in_memory() -> dict[tuple[str, str, int], list[types.FunctionType]]:
    found: dict[tuple[str, str, int], list[types.FunctionType]] = collections.defaultdict(list)
    gc.unfreeze()
    for each in gc.get_objects():
        if isinstance(each, types.FunctionType) and each.__code__.co_filename.startswith(str(ROOT)):
            code = each.__code__
            path = os.path.relpath(code.co_filename, ROOT)
            found[path, code.co_qualname, code.co_firstlineno].append(each)
    return found


def _code_of(code: types.CodeType, function: tuple[str, int]) -> types.CodeType:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            if (constant.co_qualname, constant.co_firstlineno) == function:
                return constant
            if function[0].startswith(constant.co_qualname + "."):
                return _code_of(constant, function)
    raise LookupError(function)


def _child(pipe: int, code: types.CodeType, functions: list[Any], items: list[tuple[pytest.Item, float]]) -> None:
    """Runs tests, each in so many seconds, against the mutant until one fails, which it names."""
    for function in functions:
        function.__code__ = code
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for (item, longest), after in zip(items, [*(item for item, _ in items[1:]), None]):
        signal.setitimer(signal.ITIMER_VIRTUAL, longest)
        if any(report.failed for report in runner.runtestprotocol(item, nextitem=after, log=False)):
            os.write(pipe, item.nodeid.encode())
            os._exit(1)
    os._exit(0)


class Hasty:
    """A pytest plugin: hypothesis looks for no simpler example once it has one."""

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self) -> None:
        import hypothesis  # by now pytest has prepared for it

        phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
        hypothesis.settings.register_profile("mutants", hypothesis.settings(), phases=phases)
        hypothesis.settings.load_profile("mutants")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("paths", nargs="*", default=PATHS, help="files and folders to mutate")
    parser.add_argument("--tests", nargs="+", default=TESTS, metavar="PATTERN", help="files in tests/ that may notice")
    parser.add_argument("--share", type=float, default=1.0, help="of the mutants (default 1: all), by --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=4.0, help="of tests a mutant, at most (default 4)")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--results", type=Path, default=Path("build/mutants.jsonl"))
    options = parser.parse_args(argv)
    os.chdir(ROOT)
    files = [file for path in map(Path, options.paths) for file in (path.rglob("*.py") if path.is_dir() else [path])]
    paths = sorted(map(str, files))
    tests = sorted(str(file.relative_to(ROOT)) for pattern in options.tests for file in ROOT.glob(f"tests/{pattern}"))
    sources = [*sorted(ROOT.glob("tests/*.py")), *(ROOT / path for path in paths)]
    options.digest = hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()[:12]
    options.results.parent.mkdir(parents=True, exist_ok=True)
    known: dict[str, Any] = {}
    if options.results.exists():
        known = {line["key"]: line for line in map(json.loads, options.results.read_text().splitlines())}
    arguments = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", LEFT_OUT, *tests]
    found = _lines(paths, arguments, options.results.with_suffix(f".{options.digest}.lines"))
    pytest.main(arguments, plugins=[Hasty(), Trials(options, paths, found, known)])
    return _summary(paths, known)


def _lines(paths: list[str], arguments: list[str], cache: Path) -> dict[str, Any]:
    """Which tests run which lines: measured in a process of its own, and kept beside the results."""
    if not cache.exists() and os.fork() == 0:
        lines = Lines(paths)
        lines.coverage.start()
        pytest.main(arguments, plugins=[Hasty(), lines])
        lines.coverage.stop()
        for test in lines.failing:  # it fails without a mutant
            lines.seconds.pop(test)
        cache.write_text(json.dumps({"lines": lines.by_line(paths), "seconds": lines.seconds}))
        os._exit(0)
    if not cache.exists():
        os.wait()
    return json.loads(cache.read_text())


def _summary(paths: list[str], known: dict[str, Any]) -> int:
    """Tells how many were noticed, by file and in all; of functions that are as they were."""
    every, noticed = 0, 0
    for path in paths:
        sources = {digest_of(function) for function, _ in functions_of(ast.parse((ROOT / path).read_text()))}
        found = [
            line["by"] is not None for line in known.values() if line["path"] == path and line["source"] in sources
        ]
        if found:
            print(f"{sum(found):5} of {len(found):5} noticed  {path}")
        every, noticed = every + len(found), noticed + sum(found)
    print(json.dumps({"mutants": every, "noticed": noticed, "share": noticed / max(1, every)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
