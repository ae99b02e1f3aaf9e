"""`python -m hybrimoe_jax.reproduce`: the paper's figures beside ours, as docs/reproduction.md and one JSON record a run in results/.

Every time is simulated, see `simulate`. Traces of Mixtral and Qwen2-57B by token are not public: their rows come from synthetic routing and say so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from hybrimoe_jax.cli import Parser, progress, run
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.files import replacing
from hybrimoe_jax.reproduce import experiments
from hybrimoe_jax.reproduce.document import document
from hybrimoe_jax.simulate import grid
from hybrimoe_jax.trace.file import Trace, load_trace

TRACES = {
    "deepseek-v2-lite": "trace-deepseek-v2-lite-esft/law.npz",
    "gpt-oss-20b": "trace-gpt-oss-20b/decode.npz",
}

PROMPT = "To be, or not to be, that is the question:"


def main(argv: list[str] | None = None) -> int:
    top = Parser(prog="python -m hybrimoe_jax.reproduce", description=__doc__.splitlines()[0])
    top.add_argument("--data", metavar="DIR", help="the public traces (default: HYBRIMOE_DATA, else ../shared/data)")
    top.add_argument("--results", default="results", metavar="DIR", help="records go here (default results)")
    top.add_argument(
        "--docs", default="docs/reproduction.md", metavar="FILE", help="the comparison (default docs/reproduction.md)"
    )
    top.add_argument("--steps", type=int, default=150, metavar="N", help="tokens of each half of a trace (default 150)")
    top.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once (default 1)")
    args = top.parse_args(argv)
    for name in ("steps", "jobs"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1")
    folder = Path(args.docs).parent
    if not folder.is_dir():
        raise UserError(f"--docs {args.docs}: there is no folder {folder}")
    data = Path(args.data or os.environ.get("HYBRIMOE_DATA") or "../shared/data")
    traces = {model: str(data / path) for model, path in TRACES.items() if (data / path).is_file()}
    if args.data and not traces:
        raise UserError(f"--data {data}: holds none of {', '.join(TRACES.values())}")
    for model in TRACES.keys() - traces.keys():
        print(f"{data / TRACES[model]} is not there: rows of {model} are left out", file=sys.stderr)

    named = experiments.all_cases(traces, args.steps)
    flat = [case for cases in named.values() for case in cases]
    records = iter(list(progress(grid.run_cases(flat, args.jobs), len(flat), "reproducing")))
    results = {name: [next(records) for _ in cases] for name, cases in named.items()}
    links = experiments.link_beliefs(args.steps)
    reuse = experiments.reuse_by_rank(traces)
    mixed = experiments.mixed_formats(traces, args.steps)
    similarity = experiments.layer_similarity(recorded) if (recorded := run_bundled_model()) else []
    Path(args.results).mkdir(parents=True, exist_ok=True)
    for name, rows in results.items():
        with replacing(Path(args.results) / f"{name}.jsonl") as file:
            file.writelines(json.dumps({k: v for k, v in row.items() if k != "replay_cpu_s"}) + "\n" for row in rows)
    with replacing(args.docs) as file:
        file.write(document(results, links, reuse, similarity, mixed, args.steps))
    print(json.dumps({"docs": args.docs, "results": args.results, "runs": len(flat), "clock": "virtual"}))
    return 0


def run_bundled_model() -> Trace | None:
    """A trace of the bundled model with full scores and lookahead, made in a process of its own (this one does without jax); None where it cannot run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.npz"
        command = [sys.executable, "-m", "hybrimoe_jax.generate", "--prompt", PROMPT, "--max-tokens", "200", "--trace"]
        done = subprocess.run([*command, str(path), "--stats", "none"], capture_output=True, text=True)
        if done.returncode == 0:
            return load_trace(path)
    said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    print(f"the bundled model did not run ({said}): layer similarity is left out", file=sys.stderr)
    return None


if __name__ == "__main__":
    run(main)
