"""`python -m hybrimoe_jax.trace record|import|export|info|overlap|check`: routing traces, ours and public ones.

For each file a table for people, then one JSON line for programs.
"""

from __future__ import annotations

import json
from pathlib import Path

from hybrimoe_jax import record
from hybrimoe_jax.cli import Parser, progress, run
from hybrimoe_jax.encoding import say
from hybrimoe_jax.errors import UserError, printable
from hybrimoe_jax.files import check_folder_to_be, check_writable
from hybrimoe_jax.records import stamped
from hybrimoe_jax.trace.export import EXPORTS, export_trace, layout_of
from hybrimoe_jax.trace.importers import READS, join_traces, open_trace

PURPOSES = {
    "info": "what a trace holds, lacks and looks like",
    "overlap": "how far sequences that ran side by side asked for the same experts",
    "check": "name the first bad record",
}


def main(argv: list[str] | None = None) -> int:
    top = Parser(prog="python -m hybrimoe_jax.trace", description=f"Routing traces. A FILE is {READS}.")
    commands = top.add_subparsers(dest="command", required=True)
    record.add_arguments(commands.add_parser("record", help="run prompts through a model and write their routing"))
    bring = commands.add_parser("import", help="write traces of any known layout as one .npz trace")
    bring.add_argument("sources", nargs="+", metavar="FILE", help="a file or folder; several of one model are joined")
    bring.add_argument("destination", metavar="OUT.npz")
    out = commands.add_parser("export", help="write a trace as a table for other programs, or in a public layout")
    out.add_argument("source", metavar="FILE")
    out.add_argument("destination", metavar="OUT", help="a file, or with esft a folder; text files also as .gz")
    out.add_argument("--to", choices=EXPORTS, help="default: what the end of OUT's name tells")
    for name, purpose in PURPOSES.items():
        command = commands.add_parser(name, help=purpose)
        command.add_argument("sources", nargs="+", metavar="FILE")
    args = top.parse_args(argv)
    run_one = {
        "record": record.record,
        "import": _import,
        "export": _export,
        "info": _info,
        "overlap": _overlap,
        "check": _check,
    }
    return run_one[args.command](args)


def _import(args) -> int:
    from hybrimoe_jax.trace.file import save_trace
    from hybrimoe_jax.trace.info import lacks

    out = Path(args.destination)
    check_writable(args.destination, "the destination", args.sources)
    traces = [open_trace(source) for source in progress(args.sources, len(args.sources), "reading")]
    trace = join_traces(traces)
    save_trace(trace, out)
    steps = int(trace.step.max()) + 1 if len(trace) else 0
    record = {"file": str(out), "steps": steps, "rows": len(trace), "lacks": lacks(trace)}
    _say(f"{out}: {steps} steps, {len(trace)} rows", record["lacks"])
    print(json.dumps(stamped("trace import", record)))
    return 0


def _export(args) -> int:
    out = Path(args.destination)
    layout = args.to or layout_of(out)
    if layout == "esft":
        check_folder_to_be(args.destination, "the destination")
    else:
        check_writable(args.destination, "the destination", [args.source])
    trace = open_trace(args.source)
    lost = export_trace(trace, out, layout)
    for what in lost:
        say(f"{layout} cannot hold {what}")
    print(printable(f"{out}: {len(trace)} rows"))
    said = {"file": str(out), "layout": layout, "rows": len(trace), "left_out": lost}
    print(json.dumps(stamped("trace export", said)))
    return 0


def _check(args) -> int:
    from hybrimoe_jax.trace.info import lacks

    records = []  # all of them before a word is said: a file that is refused leaves nothing on stdout
    for source in progress(args.sources, len(args.sources), "checking"):
        trace = open_trace(source)
        records.append({"file": source, "rows": len(trace), "lacks": lacks(trace)})
    for made in records:
        _say(f"{made['file']}: all {made['rows']} rows are sound", made["lacks"])
        print(json.dumps(stamped("trace check", made)))
    return 0


def _info(args) -> int:
    from hybrimoe_jax.trace.info import info

    sources = progress(args.sources, len(args.sources), "reading")
    for made in [{"file": source, **info(open_trace(source))} for source in sources]:
        for label, text in _lines(made):
            print(printable(f"{label:<16}{text}"))
        print(json.dumps(stamped("trace info", made)))
    return 0


def _overlap(args) -> int:
    from hybrimoe_jax.trace import concurrency

    records = []
    for source in progress(args.sources, len(args.sources), "reading"):
        try:
            records.append({"file": source, **concurrency.as_record(open_trace(source))})
        except UserError as error:
            raise UserError(f"{source}: {error}") from None
    for said in records:
        print(printable(f"{said['file']}: experts of a layer in a decode step, by how many sequences ran side by side"))
        print("sequences  chosen  distinct  shared  distinct by chance: uniform  by popularity")
        for row in said["side_by_side"]:
            print(
                f"{row['sequences']:9d}  {row['asked']:6.0f}  {row['distinct']:8.2f}  {row['shared']:6.1%}  "
                f"{row['uniform']:27.2f}  {row['popularity']:13.2f}"
            )
        print(json.dumps(stamped("trace overlap", said)))
    return 0


def _lines(record: dict) -> list[tuple[str, str]]:
    """The table of `info`: label and text."""
    steps, tokens = record["steps"], record["tokens"]
    overlap, skew, reuse = record["overlap"], record["skew"], record["reuse_distance"]
    lines = [
        ("trace", record["file"]),
        (
            "model",
            f"{record['model_type']}: {record['layers']} MoE layers, {record['experts']} experts, "
            f"{record['top_k']} a token",
        ),
        (
            "expert",
            ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in record["expert_bytes"].items()) or "size unknown",
        ),
        ("sequences", str(record["sequences"])),
        *((phase, f"{steps[phase]} steps, {tokens[phase]} tokens") for phase in steps),
    ]
    if overlap:
        lines.append(
            (
                "overlap",
                f"{overlap['measured']:.3f} with the token before (chance: {overlap['uniform_chance']:.3f} "
                f"if uniform, {overlap['popularity_chance']:.3f} by popularity alone)",
            )
        )
    if skew:
        lines.append(
            (
                "skew",
                f"{skew['hottest_quarter']:.3f} of activations on the hottest quarter (0.25 if uniform); "
                f"the hottest expert {skew['hottest_over_mean']:.1f}x the mean; {skew['never_used']:.1%} never used",
            )
        )
    if reuse:
        lines.append(
            (
                "reuse distance",
                f"{reuse['median']} experts at the median, {reuse['p90']} at p90, {reuse['p99']} at p99; "
                f"{reuse['first_uses']:.2%} first uses",
            )
        )
    if record["router_reuse"]:
        lines.append(
            (
                "router reuse",
                ", ".join(f"{d}: {share:.1%}" for d, share in record["router_reuse"].items() if share is not None)
                + " of predicted experts chosen, by distance",
            )
        )
    return lines + [("lacks", what) for what in record["lacks"]]


def _say(text: str, lacking: list[str]) -> None:
    print(printable(text))
    for what in lacking:
        print(printable(f"  lacks {what}"))


if __name__ == "__main__":
    run(main)
