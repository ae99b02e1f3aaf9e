"""`python -m hybrimoe_jax.reproduce`: the paper's experiments: docs/reproduction.md, and records in results/.

Times are simulated, see `simulate`, but for those of the bundled model, which say what they are. Traces of Mixtral and
Qwen2-57B by token are not public: their rows come from synthetic routing and say so.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from hybrimoe_jax.arguments import workers
from hybrimoe_jax.cli import Parser, first_paragraph, progress, run
from hybrimoe_jax.encoding import read_text, say
from hybrimoe_jax.errors import UserError, reading
from hybrimoe_jax.files import check_folder_to_be, check_writable, replacing
from hybrimoe_jax.machine.identity import cores
from hybrimoe_jax.records import stamped
from hybrimoe_jax.reproduce import analysis, experiments
from hybrimoe_jax.reproduce.page import NOT_RUN, page
from hybrimoe_jax.reproduce.sources import BUNDLED, inputs, public_traces
from hybrimoe_jax.simulate import grid
from hybrimoe_jax.simulate.cases import Case
from hybrimoe_jax.trace.file import load_trace

Records = list[dict]
ANALYSES: dict[str, Callable[[Mapping[str, str], int | None], Records]] = {
    "inputs": lambda traces, steps: inputs(traces),
    "links": lambda traces, steps: analysis.link_beliefs(steps),
    "reuse": lambda traces, steps: analysis.reuse_by_rank(traces),
    "traces": lambda traces, steps: analysis.fitted_knobs(traces),
}
"""Experiments that are no list of runs."""
LIVE = ("live", "similarity")
"""Those that run the bundled model."""
NAMES = (*LIVE, *ANALYSES, *experiments.all_runs({}))


def main(argv: list[str] | None = None) -> int:
    top = Parser(prog="python -m hybrimoe_jax.reproduce", description=first_paragraph(__doc__))
    top.add_argument("--data", metavar="DIR", help="the public traces (default: HYBRIMOE_DATA, else ../shared/data)")
    top.add_argument("--results", default="results", metavar="DIR", help="records go here (default results)")
    top.add_argument(
        "--docs",
        default="docs/reproduction.md",
        metavar="FILE",
        help="the page that is written (default docs/reproduction.md)",
    )
    top.add_argument("--text-only", action="store_true", help="write the page from the records that are there")
    top.add_argument("--only", metavar="NAME,...", help=f"run these experiments ({', '.join(NAMES)}); keep the others")
    top.add_argument("--steps", type=int, metavar="N", help="at most N tokens a run, a quick look (default: all)")
    top.add_argument("--jobs", type=int, default=cores(), metavar="N", help="runs at once (default: one a core)")
    args = top.parse_args(argv)
    for name in ("steps", "jobs"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1")
    workers("--jobs", args.jobs)
    names = chosen(args.only)
    check_writable(args.docs, "--docs")
    results, runs = Path(args.results), 0
    if not args.text_only:
        check_folder_to_be(args.results, "--results")
        for name, rows in measured(public_traces(args.data), names, args.steps, args.jobs):
            write_records(results, name, rows)
            runs += sum("run" in row for row in rows)
    with reading(f"--results {results}: a record"):
        text = page(read_records(results))
    if missing := text.count(NOT_RUN):
        say(f"{missing} places of {args.docs} say {NOT_RUN}: {args.results} has no records of them")
    with replacing(args.docs) as file:
        file.write(text)
    said = {"docs": args.docs, "results": args.results, "runs": runs, "clock": "virtual"}
    print(json.dumps(stamped("reproduction", said)))
    return 0


def chosen(only: str | None) -> tuple[str, ...]:
    """The experiments to run; UserError for one that is none."""
    names = NAMES if only is None else tuple(word.strip() for word in only.split(",") if word.strip())
    for name in names:
        if name not in NAMES:
            raise UserError(f"--only: there is no experiment {name!r} (known: {', '.join(NAMES)})")
    return names


def measured(
    traces: dict[str, str], names: Sequence[str], steps: int | None, jobs: int
) -> Iterator[tuple[str, Records]]:
    """(experiment, its records), each as soon as it is done."""
    with tempfile.TemporaryDirectory() as folder:
        if any(name in names for name in (*LIVE, "traces", "reuse", "alpha", "hits")):
            rows, recorded = bundled_model(Path(folder), "live" in names)
            if rows:
                yield "live", rows
            if recorded:
                traces = {**traces, BUNDLED: str(recorded)}
                if "similarity" in names:
                    yield "similarity", analysis.layer_similarity(load_trace(recorded))
        for name, make in ANALYSES.items():
            if name in names:
                yield name, make(traces, steps)
        runs = {name: rows for name, rows in experiments.all_runs(traces).items() if name in names}
        yield from simulated(runs if steps is None else experiments.shortened(runs, steps), jobs)


def simulated(runs: Mapping[str, list[tuple[str, Case]]], jobs: int) -> Iterator[tuple[str, Records]]:
    """The records of experiments, each run of them done once, whoever asks for it."""
    cases = list(dict.fromkeys(case for rows in runs.values() for _, case in rows))
    found: dict[Case, dict] = {}
    waiting = dict(runs)
    for case, record in zip(cases, progress(grid.run_cases(cases, jobs), len(cases), "reproducing")):
        found[case] = {name: value for name, value in record.items() if name not in ("costs", "replay_cpu_s")}
        for name, rows in list(waiting.items()):
            if all(case in found for _, case in rows):
                yield name, [{"run": run, **found[case]} for run, case in waiting.pop(name)]


def bundled_model(folder: Path, table: bool) -> tuple[Records, Path | None]:
    """(its rows of Table III if `table`, the file of its routing); nothing where it cannot run.

    It runs in a process of its own: this one does without jax.
    """
    command = [sys.executable, "-m", "hybrimoe_jax.reproduce.live", str(folder), *(["--table"] if table else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode == 0:
        return [json.loads(line) for line in done.stdout.splitlines()], folder / "bundled.npz"
    say("the bundled model did not run, see above: what is of it stays as it is")
    return [], None


def write_records(folder: Path, name: str, rows: Sequence[dict]) -> None:
    """One file an experiment, one line a record."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row if "kind" in row else stamped(f"reproduction {name}", row) for row in rows]
    with replacing(folder / f"{name}.jsonl") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read_records(folder: Path) -> dict[str, Records]:
    """Records by experiment; UserError where a file holds something else."""
    results = {}
    for path in sorted(folder.glob("*.jsonl")):
        try:
            results[path.stem] = [json.loads(line) for line in read_text(path).split("\n") if line]
        except ValueError as error:
            raise UserError(f"{path}: not a file of records ({error})") from None
    return results


if __name__ == "__main__":
    run(main)
