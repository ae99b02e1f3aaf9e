"""`python -m hybrimoe_jax.demo`: a text by the bundled model, and what three systems make of it on a larger machine.

The model writes on this machine first. Then the same text is made again under the virtual clock, once by each system:
a profile's machine, experts as large as those of a full-size model. Where an expert is computed changes no token.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import NamedTuple

from hybrimoe_jax.cli import Parser, first_paragraph, run
from hybrimoe_jax.engine.config import EngineConfig
from hybrimoe_jax.errors import UserError

SYSTEMS = ("hybrimoe", "ktransformers", "llamacpp")
PROFILE, COST_SHAPE, CACHE_RATIO = "a6000-paper", "deepseek-v2-lite:int4-g64", 0.5
"""With half of the experts, llama.cpp's whole layers and the others' slots in every layer come to the same number."""
SAMPLING = {"temperature": 0.8, "top_p": 0.95, "seed": 1}


class Row(NamedTuple):
    """One system on the profile's machine; tokens a second of decoding, on the virtual clock."""

    system: str
    hits: int
    fetches: int
    prefetches: int
    cpu: int
    device: int
    tokens_per_s: float
    same_text: bool


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="python -m hybrimoe_jax.demo", description=first_paragraph(__doc__))
    top.add_argument("--model", metavar="DIR", help="a converted checkpoint (default: the bundled model)")
    top.add_argument("--prompt", default="To be, or not to be", metavar="TEXT", help="what the text goes on from")
    top.add_argument("--max-tokens", type=int, default=80, metavar="N", help="new tokens (default 80)")
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.max_tokens < 2:
        raise UserError("--max-tokens must be at least 2: the second token is the first that is decoded")
    say("loading the model and timing this machine: some 10 seconds, the first time")
    from hybrimoe_jax.checkpoint.reader import open_checkpoint
    from hybrimoe_jax.engine.load import bundled_model, read_model

    checkpoint = open_checkpoint(args.model or bundled_model())
    if checkpoint.tokenizer is None:
        raise UserError(f"{checkpoint.path}: has no tokenizer.json, and a demo is a text")
    model, ids = read_model(checkpoint, EngineConfig(start_cache="default")), checkpoint.tokenizer.encode(args.prompt)
    tokens, said = write(model, ids, args.max_tokens)
    print(f"\n\n{said}\n", flush=True)
    say(f"the same text under the virtual clock, by {len(SYSTEMS)} systems: a few seconds")
    print(table([on_profile(model, name, ids, tokens) for name in SYSTEMS], model.config) + f"\n\n{next_step()}")
    return 0


def next_step() -> str:
    """One line: what to do with a checkpoint of one's own."""
    python = os.path.relpath(sys.executable)
    python = "python" if python.startswith("..") else python
    return f"Next, your own: {python} -m hybrimoe_jax.convert HF_FOLDER my-model"


def say(stage: str) -> None:
    print(f"* {stage}\n", file=sys.stderr, flush=True)


def write(model, ids: list[int], count: int) -> tuple[list[int], str]:
    """Prints a text as it is made -> its tokens, and one line on how that went."""
    from hybrimoe_jax.engine.streaming import stream_generate

    engine, tokens = model.engine(EngineConfig(cache_ratio=CACHE_RATIO)), []
    for chunk in stream_generate(engine, ids, max_new_tokens=count, **SAMPLING):
        tokens.append(chunk.token_id)
        print(chunk.text, end="", flush=True)
    each, moved = engine.stats.tbt_ms(), engine.stats.summary()["bytes_h2d"]
    engine.close()
    took = f", {each['median']:.1f} ms each" if each else ""
    where = f"{moved / 1e6:.0f} MB of experts moved" if moved else "no expert moved"
    return tokens, f"{len(tokens)} tokens{took}: measured on this machine, where {where}."


def on_profile(model, system: str, ids: list[int], tokens: list[int]) -> Row:
    """The same text by one system under the virtual clock."""
    options = EngineConfig(
        system=system, cache_ratio=CACHE_RATIO, clock="virtual", profile=PROFILE, cost_shape=COST_SHAPE
    )
    engine = model.engine(options)
    made = engine.generate([ids], max_new_tokens=len(tokens), **SAMPLING)
    engine.close()
    record, steps = made.stats.summary(), [step for step in made.stats.steps if step.phase == "decode"]
    seconds = sum(step.seconds for step in steps)
    return Row(
        system,
        record["hits"],
        record["demand_fetches"],
        record["prefetch"]["issued"],
        record["cpu_experts"],
        record["device_experts"],
        len(steps) / seconds if seconds else 0.0,
        made.token_ids[0] == tokens,
    )


def table(rows: list[Row], config) -> str:
    """The rows and what they are of, no wider than 80 columns."""
    shape, _, fmt = COST_SHAPE.partition(":")
    layers, experts = len(config.moe_layers), config.num_experts
    wanted = rows[0].cpu + rows[0].device
    lines = [
        "The same text on the paper's machine (an RTX A6000 and ten CPU cores, profile",
        f"{PROFILE}). All figures are computed, not measured. An expert weighs what one",
        f"of {shape} does in {fmt}; {CACHE_RATIO:.0%} of them ({layers} layers of {experts}) have a",
        f"place in device memory. {wanted} experts are wanted.",
        "",
        "system         hits  fetches  prefetches   cpu  device  tokens/s  same text",
    ]
    for row in rows:
        lines.append(
            f"{row.system:13} {row.hits:5}  {row.fetches:7}  {row.prefetches:10} {row.cpu:5}  {row.device:6}  "
            f"{row.tokens_per_s:8.1f}  {'yes' if row.same_text else 'no':>9}"
        )
    return "\n".join(
        [
            *lines,
            "",
            "hits: found in device memory. fetches: moved there while their layer waits.",
            "prefetches: moved ahead of need. cpu, device: which of them computed an expert.",
        ]
    )


if __name__ == "__main__":
    run(main)
