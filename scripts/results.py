"""`python scripts/results.py`: the tables of README.md and docs/, from the records in results/.

People write the documents. This renews what stands between `<!-- table: NAME -->` and `<!-- end -->` in them.
A benchmark prints its record as the last line; this keeps it, with the machine, the commit and the versions:

    python -m hybrimoe_jax.bench formats | python scripts/results.py --add formats

A record of the same benchmark on the same processor is replaced. The records of simulated runs come from
`python -m hybrimoe_jax.reproduce`.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hybrimoe_jax.bench.engine import processor
from hybrimoe_jax.reproduce.__main__ import read_records
from hybrimoe_jax.reproduce.tables import markdown, places, renewed, seconds
from hybrimoe_jax.simulate.records import commit

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "docs/results.md", "docs/starting.md", "docs/paced.md")
MEASURED = "results/measured"
__all__ = ["add", "places", "renewed", "tables"]
Records = Mapping[str, Sequence[dict]]
MODELS = {"deepseek-v2-lite": "DeepSeek-V2-Lite", "gpt-oss-20b": "gpt-oss-20b"}
PROFILE, CACHE, PREFILL = "a6000-paper", 0.25, 512


def kept(benchmark: str, record: dict) -> dict:
    """A benchmark's record with what else a reader wants to know of it."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "numpy")}
    return {
        "benchmark": benchmark,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[1], 1),  # of the last five minutes, this run's own part included
        "python": platform.python_version(),
        **versions,
        "record": record,
    }


def add(benchmark: str, line: str, folder: Path) -> None:
    """Keeps the record, in place of an earlier one of this processor."""
    new, path = kept(benchmark, json.loads(line)), folder / f"{benchmark}.jsonl"
    old = read_records(folder).get(benchmark, []) if path.exists() else []
    rows = [row for row in old if row["processor"] != new["processor"]] + [new]
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def where(row: dict) -> str:
    """Machine and commit of a measured record."""
    name = row["processor"].split(" cpu family")[0]
    return (
        f"{name}, {row['cores']} cores, load average {row['load']}; commit {row['commit']}, {row['date']}; "
        f"Python {row['python']}, jax {row['jax']}"
    )


def per_machine(make: Callable[[dict], str]) -> Callable[[Sequence[dict]], str]:
    """A table for each record, under a line that names machine and commit."""
    return lambda rows: "\n".join(f"{where(row)}:\n\n{make(row['record'])}" for row in rows)


def engine(record: dict) -> str:
    parts = []
    for result in record["results"]:
        measures = ("prefill 128", "prefill 512", "decode")
        rows = []
        for name, row in result["medians"].items():
            times = [f"{row[f'{what}_ms']:.2f}" if f"{what}_ms" in row else "-" for what in measures]
            rows.append([name, *times, "yes" if result["same_tokens"][name] else "no"])
        if "ratios" in result:
            ratios = [f"{result['ratios'][what]:.2f}x" for what in measures]
            rows.append(["**hybrimoe against the best transformers**", *ratios, ""])
        size = f"{result['model']}, {result['parameters'] / 1e6:.0f} M parameters: milliseconds"
        parts.append(markdown([size, "prompt of 128", "prompt of 512", "a token", "same tokens"], rows))
    return "\n".join(parts)


def e2e(record: dict) -> str:
    """A table of each model, format and prompt, the savings by part, and the bars."""
    from hybrimoe_jax.bench.e2e import parts, table

    made = [markdown([title, *table.HEAD[1:]], rows) for title, rows in table.lines_of(record)]
    made.append(markdown(parts.HEAD, map(parts.line, record["parts"])))
    said = [table.bar_line(bar) for bar in record["bars"]] + table.doubts(record["rows"])
    said += [f"left out: {name}: {why}" for name, why in record["left_out"].items()]
    return "\n".join([*made, "".join(f"* {line}\n" for line in said)])


def formats(record: dict) -> str:
    rows = []
    calibrated = {row["format"]: row for row in record["formats"] if row["calibrated"]}
    for row in record["formats"]:
        if not row["calibrated"]:
            other = calibrated.get(row["format"])
            cells = [f"{row['bits_per_weight']:.2f}", *quality(row), *(quality(other) if other else ["", ""])]
            rows.append([row["format"], *cells])
    head = ["format", "bits a weight", "divergence, nats", "perplexity"]
    return markdown([*head, "calibrated: divergence", "perplexity"], rows)


def quality(row: dict) -> list[str]:
    return [f"{row['kl']:.4f}", f"{100 * row['change']:+.2f} %"]


def schedule(record: dict) -> str:
    rules, gaps, times = list(next(iter(record["gap"].values()))), record["gap"], record["cpu_us"]
    rows = [[f"`{rule}`", *(percent(gap[rule]) for gap in gaps.values())] for rule in rules]
    decisions = [[f"`{rule}`", *(f"{cell[rule]:.0f}" for cell in times.values())] for rule in rules]
    head = ["gap: mean / p99 / worst, %", *gaps]
    return markdown(head, rows) + "\n" + markdown(["a decision, us of CPU time", *times], decisions)


def start(record: dict) -> str:
    medians = record["medians"]
    rows = [[part, *(f"{times[part]:.2f}" for times in medians.values())] for part in next(iter(medians.values()))]
    rows.append(["**times faster**", "", *(f"{ratio:.1f}" for ratio in record["times_faster"].values())])
    size = f"{record['model']}: seconds, medians of {len(record['runs']['next'])}"
    return markdown([size, "nothing kept", "first start", "next start"], rows)


def paced(record: dict) -> str:
    """Milliseconds of the profile's machine: the wall's divided by the slowdown, and the virtual clock's."""
    rows = []
    for machine, found in record["machines"].items():
        for system, times in found["systems"].items():
            cells = [f"{times[kind]:.2f}" for kind in ("tbt_ms", "virtual_tbt_ms", "ttft_ms", "virtual_ttft_ms")]
            cells += [f"{times['tbt_ratio']:.2f}", f"{times['ttft_ratio']:.2f}"]
            speeds = f"{times['speed']:.2f} / {times['virtual_speed']:.2f}"
            rows.append([f"`paced:{machine}`", f"`{system}`", *cells, speeds, f"{times['own_layer_ms']:.2f}"])
    head = ["device", "system", "a token, wall", "virtual", "a prompt, wall", "virtual", "token's ratio", "prompt's"]
    return markdown([*head, "against ktransformers, wall / virtual", "a layer unpaced"], rows)


def percent(gap: dict) -> str:
    cells = (100 * gap[name] for name in ("mean", "p99", "worst"))
    return " / ".join(f"{cell:.1f}" if 0 < cell < 10 else f"{cell:.0f}" for cell in cells)


def results(records: Records) -> str:
    """README's table: measured runs first, then computed ones."""
    rows = []
    for row in records.get("engine", ()):
        machine = measured_on(row)
        for result in row["record"]["results"]:
            if "ratios" in result:
                rows.append([*decoding(result), row["commit"]])
                rows[-1].insert(1, machine)
    rows += [beside for row in records.get("e2e", ())[-1:] for beside in beside_torch(row)]  # of the latest
    for experiment, prompt in (("decode", None), ("prefill", PREFILL)):
        rows += [simulated(records[experiment], model, prompt) for model in MODELS]
    return markdown(["what", "clock: machine", "`hybrimoe`", "others", "commit"], rows)


def measured_on(row: dict) -> str:
    return f"measured: {row['processor'].split(' cpu family')[0]}, {row['cores']} cores"


def beside_torch(row: dict) -> list[list[str]]:
    """A row for each format of the mid model: a token, beside the fastest mode of PyTorch's offload engine."""
    rows = []
    for part in row["record"]["parts"]:
        if (part["model"], part["device"], part["phase"]) == ("mid", "auto", "decode"):
            what = f"a token of a random model, {part['format']}, after {part['prompt_tokens']}, a quarter in slots"
            ours, theirs = (
                f"{part['hybrimoe_ms']:.2f} ms",
                f"offloading in torch, {part['mode']}: {part['torch_ms']:.2f}",
            )
            rows.append([what, measured_on(row), ours, theirs, row["commit"]])
    return rows


def decoding(result: dict) -> list[str]:
    """What was decoded by the CPU alone, our time of a token, and the best of transformers."""
    name = "a random model" if result["model"] == "mid" else f"the {result['model']} model"
    ours = result["medians"]["hybrimoe"]["decode_ms"]
    what = f"decoding, {name} of {result['parameters'] / 1e6:.0f} M parameters"
    return [what, f"{ours:.2f} ms a token", f"transformers on torch {ours * result['ratios']['decode']:.2f}"]


def simulated(records: Sequence[dict], model: str, prompt: int | None) -> list[str]:
    """One row: a model with a quarter of its experts resident, on the paper's machine."""
    found = {}
    for row in records:
        here = (row["model"], row["profile"], row["cache_ratio"], row["prompt_tokens"])
        if here == (model, PROFILE, CACHE, prompt):
            found.setdefault(row["system"], row)
    shown = {name: seconds(found[name]) for name in ("hybrimoe", "ktransformers", "llamacpp")}
    cells = {name: f"{1 / value:.1f}" if prompt is None else f"{value:.2f}" for name, value in shown.items()}
    first = found["hybrimoe"]
    what = f"decoding, {MODELS[model]}" if prompt is None else f"a prompt of {prompt} tokens, {MODELS[model]}"
    what += f" ({first['rows']})" if first["rows"].startswith("prefill, ") else ""
    unit = "tokens a second" if prompt is None else "seconds"
    others = f"`ktransformers` {cells['ktransformers']}, `llamacpp` {cells['llamacpp']}"
    told = first["versions"].get("commit", "")
    return [what, f"computed: `{PROFILE}`", f"{cells['hybrimoe']} {unit}", others, told]


def tables(root: Path) -> dict[str, str]:
    """Every table, by name, that the records suffice for."""
    records = {**read_records(root / "results"), **read_records(root / MEASURED)}
    made = {"results": results(records)}
    for make in (engine, e2e, formats, schedule, start, paced):
        rows = records.get(make.__name__)
        made[make.__name__] = per_machine(make)(rows) if rows else "No record of it is kept yet.\n"
    return made


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--add", metavar="NAME", help="keep the benchmark's record that standard input ends with")
    args = parser.parse_args(argv)
    if args.add:
        add(args.add, sys.stdin.read().strip().splitlines()[-1], ROOT / MEASURED)
    made = tables(ROOT)
    for name in DOCUMENTS:
        path = ROOT / name
        path.write_text(renewed(path.read_text(encoding="utf-8"), made), encoding="utf-8")


if __name__ == "__main__":
    main()
