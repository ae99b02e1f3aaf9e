"""`python -m hybrimoe_jax.reproduce`: the paper's experiments: tables in docs/reproduction.md, records in results/.

Every time is simulated, see `simulate`. Traces of Mixtral and Qwen2-57B by token are not public: their rows come from
synthetic routing and say so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from hybrimoe_jax.cli import Parser, first_paragraph, progress, run
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.files import check_folder_to_be, check_writable, replacing
from hybrimoe_jax.reproduce import experiments
from hybrimoe_jax.reproduce.tables import all_tables, places, renewed
from hybrimoe_jax.simulate import grid
from hybrimoe_jax.trace.file import Trace, load_trace

TRACES = {
    "deepseek-v2-lite": "trace-deepseek-v2-lite-esft/law.npz",
    "gpt-oss-20b": "trace-gpt-oss-20b/decode.npz",
}

PROMPT = "To be, or not to be, that is the question:"


def main(argv: list[str] | None = None) -> int:
    top = Parser(prog="python -m hybrimoe_jax.reproduce", description=first_paragraph(__doc__))
    top.add_argument("--data", metavar="DIR", help="the public traces (default: HYBRIMOE_DATA, else ../shared/data)")
    top.add_argument("--results", default="results", metavar="DIR", help="records go here (default results)")
    top.add_argument(
        "--docs",
        default="docs/reproduction.md",
        metavar="FILE",
        help="the document in which tables are renewed (default docs/reproduction.md)",
    )
    top.add_argument("--tables-only", action="store_true", help="renew the tables from the records that are there")
    top.add_argument("--steps", type=int, default=150, metavar="N", help="tokens of each half of a trace (default 150)")
    top.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once (default 1)")
    args = top.parse_args(argv)
    for name in ("steps", "jobs"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1")
    check_writable(args.docs, "--docs")
    if not args.tables_only:
        check_folder_to_be(args.results, "--results")
    traces = {} if args.tables_only else public_traces(args.data)
    text = document(args.docs)
    runs = 0
    if not args.tables_only:
        results, runs = measured(traces, args.steps, args.jobs)
        write_records(Path(args.results), results)
    tables = all_tables(read_records(Path(args.results)))
    for name in places(text):
        if name not in tables:
            print(f"table {name}: no records of it in {args.results}; it stays as it is", file=sys.stderr)
    with replacing(args.docs) as file:
        file.write(renewed(text, tables))
    print(json.dumps({"docs": args.docs, "results": args.results, "runs": runs, "clock": "virtual"}))
    return 0


def public_traces(folder: str | None) -> dict[str, str]:
    """The traces at hand, by model; UserError where `folder` is given and holds none."""
    data = Path(folder or os.environ.get("HYBRIMOE_DATA") or "../shared/data")
    traces = {model: str(data / path) for model, path in TRACES.items() if (data / path).is_file()}
    if folder and not traces:
        raise UserError(f"--data {data}: holds none of {', '.join(TRACES.values())}")
    for model in TRACES.keys() - traces.keys():
        print(f"{data / TRACES[model]} is not there: rows of {model} are left out", file=sys.stderr)
    return traces


def document(path: str) -> str:
    """Its text; UserError where it has no place for a table."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--docs {path}: cannot be read ({error})") from None
    if not places(text):
        raise UserError(f"--docs {path}: has no place for a table (`<!-- table: NAME -->` to `<!-- end -->`)")
    return text


def measured(traces: dict[str, str], steps: int, jobs: int) -> tuple[dict[str, list[dict]], int]:
    """(records by experiment, how many runs they took)."""
    named = experiments.all_cases(traces, steps)
    flat = [case for cases in named.values() for case in cases]
    records = iter(list(progress(grid.run_cases(flat, jobs), len(flat), "reproducing")))
    results = {name: [next(records) for _ in cases] for name, cases in named.items()}
    results["links"] = experiments.link_beliefs(steps)
    results["reuse"] = experiments.reuse_by_rank(traces)
    if recorded := run_bundled_model():
        results["similarity"] = experiments.layer_similarity(recorded)
    return results, len(flat)


def write_records(folder: Path, results: dict[str, list[dict]]) -> None:
    """One file an experiment, one line a record; without what differs from run to run."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in results.items():
        with replacing(folder / f"{name}.jsonl") as file:
            file.writelines(json.dumps({k: v for k, v in row.items() if k != "replay_cpu_s"}) + "\n" for row in rows)


def read_records(folder: Path) -> dict[str, list[dict]]:
    """Records by experiment; UserError where a file holds something else."""
    results = {}
    for path in sorted(folder.glob("*.jsonl")):
        try:
            results[path.stem] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except ValueError as error:
            raise UserError(f"{path}: not a file of records ({error})") from None
    return results


def run_bundled_model() -> Trace | None:
    """A trace of the bundled model with full scores and lookahead; None where it cannot run.

    It is made in a process of its own: this one does without jax.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.npz"
        command = [sys.executable, "-m", "hybrimoe_jax.generate", "--prompt", PROMPT, "--max-tokens", "200", "--trace"]
        done = subprocess.run([*command, str(path), "--stats", "none"], capture_output=True, text=True)
        if done.returncode == 0:
            return load_trace(path)
    said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    print(f"the bundled model did not run ({said}): the table of it stays as it is", file=sys.stderr)
    return None


if __name__ == "__main__":
    run(main)
