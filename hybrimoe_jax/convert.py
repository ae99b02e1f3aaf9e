"""`python -m hybrimoe_jax.convert SRC DST`: makes a converted checkpoint, read expert by expert.

SRC is a Hugging Face folder or a GGUF file.

With `--format int4-g64` and the like the routed experts are rounded to that format (`formats`); dense tensors
keep their type. `--dense-format` rounds the dense projections too. `--calibrate TEXT` rounds experts by what
they do on a text. Experts that SRC has quantised already are taken over as they are. With `--random` SRC is only
a configuration, and the weights are made up. With `--export-hf` the direction is reversed: a converted
checkpoint becomes a Hugging Face folder.
"""

from __future__ import annotations

import os

from hybrimoe_jax import cli
from hybrimoe_jax.checkpoint.convert import convert, convert_random, return_freed_memory
from hybrimoe_jax.checkpoint.export import export_hf
from hybrimoe_jax.encoding import say
from hybrimoe_jax.errors import printable, shown_name
from hybrimoe_jax.files import read_json
from hybrimoe_jax.models.registry import family_of


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m hybrimoe_jax.convert", description=cli.first_paragraph(__doc__))
    add = parser.add_argument
    add(
        "src",
        metavar="SRC",
        help="Hugging Face folder or GGUF file; with --export-hf a converted checkpoint, with --random a "
        "config.json or its folder",
    )
    add("dst", metavar="DST", help="folder to make; must not exist")
    add(
        "--format",
        metavar="F",
        help="f32 or bf16 for every tensor, or a quantised format for the routed experts: int8-g64, int4-g64, "
        "int4z-g128, ... "
        "(default: the checkpoint's own)",
    )
    add(
        "--calibrate",
        metavar="TEXT",
        help="with a quantised --format: round by what the experts do on this text file (slower, smaller errors)",
    )
    add(
        "--dense-format",
        metavar="F",
        help="a quantised format for the dense projections too: attention, shared experts, dense layers, head "
        "(default: plain)",
    )
    add("--zip", action="store_true", help="put all arrays into one file, pieces.zip, where they are read in place")
    add("--random", action="store_true", help="write random weights for SRC, a configuration, at the model's real size")
    add("--seed", type=int, metavar="N", help="of --random (default 0)")
    add(
        "--export-hf",
        action="store_true",
        help="write SRC, a converted checkpoint, as a Hugging Face folder; quantised experts as float32 (with "
        "--format bf16 rounded)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.export_hf and args.random:
        parser.error("--random does not go with --export-hf")
    if args.seed is not None and (not args.random or args.seed < 0):
        parser.error("--seed is a number of at least 0 and goes with --random")
    if args.calibrate and (args.random or args.export_hf):
        parser.error("--calibrate goes with converting a folder")
    if args.dense_format is not None and args.export_hf:
        parser.error("--dense-format does not go with --export-hf")
    if args.zip and args.export_hf:
        parser.error("--zip does not go with --export-hf")
    return_freed_memory()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing here computes; leave an accelerator to others
    try:
        if args.export_hf:
            path = export_hf(args.src, args.dst, cli.progress, args.format)
        elif args.random:
            path = convert_random(
                args.src, args.dst, args.format, args.seed or 0, cli.progress, args.dense_format, args.zip
            )
        else:
            path = convert(args.src, args.dst, args.format, cli.progress, args.calibrate, args.dense_format, args.zip)
    except KeyboardInterrupt:
        say("interrupted; the same command " + ("starts over" if args.export_hf else "goes on from here"))
        return cli.INTERRUPTED
    total = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    print(printable(f"{path}: {total / 1e6:.1f} MB"))
    if not args.export_hf:
        raw = read_json(path / "config.json")
        if unknown := family_of(raw["model_type"]).config.passed_over(raw):
            said = ", ".join(map(shown_name, unknown[:20]))
            say(f"config.json: passed over, since neither transformers nor we know them: {said}")
    if args.src.endswith(".gguf"):
        say(f"a GGUF's vocabulary is not read: copy the model's tokenizer.json and tokenizer_config.json into {path}")
    return 0


if __name__ == "__main__":
    cli.run(main)
