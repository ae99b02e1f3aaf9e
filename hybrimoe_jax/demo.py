"""`python -m hybrimoe_jax.demo`: a text by the bundled model, and a race of three systems on a larger machine.

The model writes on this machine first. Then three systems make the same text in real time, on a paced device: this
machine, slowed to a profile's, with experts as large as those of a full-size model. The virtual clock computes the
same runs. Where an expert is computed changes no token.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import textwrap
from typing import NamedTuple

from hybrimoe_jax.cli import Parser, first_paragraph, run
from hybrimoe_jax.encoding import argument, for_stream, show
from hybrimoe_jax.engine.config import EngineConfig
from hybrimoe_jax.errors import UserError

SYSTEMS = ("hybrimoe", "ktransformers", "llamacpp")
PROFILE, COST_SHAPE, CACHE_RATIO = "a6000-paper", "deepseek-v2-lite:int4-g64", 0.5
"""With half of the experts, llama.cpp's whole layers and the others' slots in every layer come to the same number."""
SLOWDOWN = 8
"""Of the race: enough for what two cores really compute."""
COMPILING = 0.01
"""Slowdown of the runs that are there to compile the race's programs."""
SAMPLING = {"temperature": 0.8, "top_p": 0.95, "seed": 1}
WIDTH, LABEL = 80, 15
"""Columns of the output, and of a system's name in it."""


class Row(NamedTuple):
    """One system on the profile's machine: counts, and tokens a second of decoding, on the virtual clock.

    `paced`: tokens a second in the race.
    """

    system: str
    hits: int
    fetches: int
    prefetches: int
    cpu: int
    device: int
    tokens_per_s: float
    same_text: bool
    paced: float | None = None


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="python -m hybrimoe_jax.demo", description=first_paragraph(__doc__))
    top.add_argument("--model", metavar="DIR", help="a converted checkpoint (default: the bundled model)")
    top.add_argument("--prompt", default="To be, or not to be", metavar="TEXT", help="what the text goes on from")
    top.add_argument("--max-tokens", type=int, default=32, metavar="N", help="new tokens (default 32)")
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    prompt = argument(args.prompt, "--prompt")
    if args.max_tokens < 2:
        raise UserError("--max-tokens must be at least 2: the second token is the first that is decoded")
    say("loading the model and timing this machine: some 10 seconds, the first time")
    from hybrimoe_jax.checkpoint.reader import open_checkpoint
    from hybrimoe_jax.engine.load import bundled_model

    checkpoint = open_checkpoint(bundled_model() if args.model is None else args.model)
    if checkpoint.tokenizer is None:
        raise UserError(f"{checkpoint.path}: has no tokenizer.json, and a demo is a text")
    (model, no_race), ids = read(checkpoint), checkpoint.tokenizer.encode(prompt)
    tokens, said = write(model, ids, args.max_tokens)
    print(f"\n\n{said}\n", flush=True)
    say("computing three systems, and compiling for them: some 10 seconds")
    rows = [on_profile(model, name, ids, tokens) for name in SYSTEMS]
    if no_race is None:
        warm_up(model, ids)
        print(filled(RACE, *about(rows[0], model.config)) + "\n", flush=True)
        rows = [race(model, row, ids, tokens) for row in rows]
    else:
        print(filled(COMPUTED, *about(rows[0], model.config)) + "\n\n" + filled(f"The race is left out: {no_race}."))
    print(f"\n{table(rows)}\n\n{next_step()}")
    return 0


def next_step() -> str:
    """One line: what to do with a checkpoint of one's own."""
    python = "python"
    with contextlib.suppress(OSError):  # the current folder may be gone
        below = os.path.relpath(sys.executable)
        python = python if below.startswith("..") else below
    return f"Next, your own: {python} -m hybrimoe_jax.convert HF_FOLDER my-model"


def say(stage: str) -> None:
    show(f"* {stage}\n\n")


def filled(*sentences: str) -> str:
    return textwrap.fill(" ".join(sentences), WIDTH - 1)


def paced(system: str, slowdown: float) -> EngineConfig:
    device = f"paced:{PROFILE}:{slowdown}"
    return EngineConfig(system=system, cache_ratio=CACHE_RATIO, device=device, cost_shape=COST_SHAPE)


def read(checkpoint):
    """The model, and why there can be no paced device in this process; None if there can."""
    from hybrimoe_jax.engine.load import read_model

    device = f"paced:{PROFILE}:{SLOWDOWN}"
    try:
        return read_model(checkpoint, EngineConfig(start_cache="default", device=device)), None
    except UserError as error:
        from hybrimoe_jax.host_kernels.native import pace

        built = pace.available()
        why = str(error) if built else "the native kernels that it needs were not built"
        return read_model(checkpoint, EngineConfig(start_cache="default")), why


def write(model, ids: list[int], count: int) -> tuple[list[int], str]:
    """Prints a text as it is made -> its tokens, and one line on how that went."""
    from hybrimoe_jax.engine.streaming import stream_generate

    engine, tokens = model.engine(EngineConfig(cache_ratio=CACHE_RATIO)), []
    for chunk in stream_generate(engine, ids, max_new_tokens=count, **SAMPLING):
        tokens.append(chunk.token_id)
        print(for_stream(chunk.text, sys.stdout), end="", flush=True)
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
    record = made.stats.summary()
    return Row(
        system,
        record["hits"],
        record["demand_fetches"],
        record["prefetch"]["issued"],
        record["cpu_experts"],
        record["device_experts"],
        tokens_per_s(made.stats),
        made.token_ids[0] == tokens,
    )


def tokens_per_s(stats) -> float:
    """Of decoding, by the run's own clock."""
    steps = [step for step in stats.steps if step.phase == "decode"]
    seconds = sum(step.seconds - step.compile_s for step in steps)
    return len(steps) / seconds if seconds else 0.0


def warm_up(model, ids: list[int]) -> None:
    """Compiles what the race runs."""
    for system in SYSTEMS:
        engine = model.engine(paced(system, COMPILING))
        engine.generate([ids], max_new_tokens=4, **SAMPLING)
        engine.close()


def race(model, row: Row, ids: list[int], tokens: list[int]) -> Row:
    """Prints the text as one system makes it on the paced device -> its row with what came of that."""
    from hybrimoe_jax.engine.streaming import stream_generate

    engine, made, shown = model.engine(paced(row.system, SLOWDOWN)), [], Column(row.system)
    for chunk in stream_generate(engine, ids, max_new_tokens=len(tokens), **SAMPLING):
        made.append(chunk.token_id)
        shown.push(chunk.text)
    shown.push("\n")
    print(flush=True)
    engine.close()
    return row._replace(paced=tokens_per_s(engine.stats) * SLOWDOWN, same_text=row.same_text and made == tokens)


class Column:
    """Prints a text beside a label, word by word as they come, on as many lines as it takes."""

    def __init__(self, label: str):
        self._word, self._at = "", LABEL - 1
        print(f"{label:{LABEL - 1}}", end="", flush=True)

    def push(self, text: str) -> None:
        *whole, self._word = re.split(r"\s+", self._word + text)
        for part in (part for word in whole for part in textwrap.wrap(word, WIDTH - LABEL - 1)):
            if self._at + 1 + len(part) >= WIDTH:
                print(f"\n{'':{LABEL - 1}}", end="")
                self._at = LABEL - 1
            print("", part, end="", flush=True)
            self._at += 1 + len(part)


MACHINE = f"the paper's machine (an RTX A6000 and ten CPU cores, profile {PROFILE})"
RACE = (
    "The same text by three systems, in real time on a paced device: this machine, slowed until all that is done takes "
    f"{SLOWDOWN} times as long as on {MACHINE}."
)
COMPUTED = f"The same text by three systems on {MACHINE}, computed and not measured."


def about(row: Row, config) -> list[str]:
    """What experts weigh and where they lie, in sentences."""
    shape, _, fmt = COST_SHAPE.partition(":")
    layers, experts = len(config.moe_layers), config.num_experts
    return [
        f"An expert weighs what one of {shape} does in {fmt}.",
        f"{CACHE_RATIO:.0%} of them ({layers} layers of {experts}) have a place in device memory.",
        f"{row.cpu + row.device} experts are wanted.",
    ]


def table(rows: list[Row]) -> str:
    """The rows and what they say, no wider than 80 columns."""
    raced = rows[0].paced is not None
    lines = [
        f"{'tokens/s':>68}{'same':>10}" if raced else f"{'tokens/s':>64}{'same':>6}",
        f"system         hits  fetches  prefetches   cpu  device{'   paced' if raced else ''}  computed  text",
    ]
    for row in rows:
        paced = "" if row.paced is None else f"{row.paced:8.1f}"
        lines.append(
            f"{row.system:13} {row.hits:5}  {row.fetches:7}  {row.prefetches:10} {row.cpu:5}  {row.device:6}{paced}  "
            f"{row.tokens_per_s:8.1f}  {'yes' if row.same_text else 'no':>4}"
        )
    clocks = ["computed: by the virtual clock, as all counts are."]
    if raced:
        clocks = [f"paced: by the wall clock, times {SLOWDOWN}.", *clocks, "Neither was measured on that machine."]
    return "\n".join(
        [
            *lines,
            "",
            "hits: found in device memory. fetches: moved there while their layer waits.",
            "prefetches: moved ahead of need. cpu, device: which of them computed an expert.",
            filled(*clocks),
        ]
    )


if __name__ == "__main__":
    run(main)
