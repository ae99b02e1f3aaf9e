"""`python -m hybrimoe_jax.reproduce.live FOLDER`: what the bundled model itself does, in a process that has jax.

`routing`: its routing on texts of its own, as bundled.npz in the folder. `table`: the rows of Table III, run by the
engine three ways: measured on this machine, which has no device but its CPU; on a paced device, in real time; and under
the virtual clock. Every prompt is asked of all rows in turn. The records go to standard output, one a line.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrimoe_jax.cli import Parser, progress, run
from hybrimoe_jax.files import check_writable
from hybrimoe_jax.machine.identity import cores, processor
from hybrimoe_jax.reproduce.experiments import PAPER, TABLE_III, Variant
from hybrimoe_jax.simulate.records import versions

if TYPE_CHECKING:
    from hybrimoe_jax.engine.engine import Engine
    from hybrimoe_jax.engine.load import Model

RECORDED, RECORDED_TOKENS = 32, 64
"""Texts whose routing is recorded, and new tokens of each."""
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 32, 12
ROWS = ("baseline", "+scheduling", "+prefetching", "+scheduling, +caching", "all")
"""Of Table III."""
COST_SHAPE = "deepseek-v2-lite"
PACED = f"paced:{PAPER}:8"
WAYS: dict[str, dict[str, Any]] = {
    "measured": {},
    "paced": {"device": PACED, "cost_shape": COST_SHAPE},
    "computed": {"clock": "virtual", "profile": PAPER, "cost_shape": COST_SHAPE},
}
"""The engine's options. The first is timed by the wall on this machine, the last is computed."""


def main(argv: list[str] | None = None) -> int:
    top = Parser(prog="python -m hybrimoe_jax.reproduce.live", description="what the bundled model does, see reproduce")
    top.add_argument("folder", help="where its trace goes")
    top.add_argument("--table", action="store_true", help="run the rows of Table III, too")
    args = top.parse_args(argv)
    check_writable(Path(args.folder) / "bundled.npz", "the trace")
    from hybrimoe_jax.engine.config import EngineConfig
    from hybrimoe_jax.engine.load import read_model

    model = read_model(None, EngineConfig(device=PACED, start_cache="default"))
    record(model, Path(args.folder) / "bundled.npz")
    for row in table(model) if args.table else ():
        print(json.dumps(row))
    return 0


def texts(model: Model, count: int, tokens: int) -> list[list[int]]:
    """Token ids of stretches of the text that the model was not trained on, evenly spread."""
    path = Path(__file__).parents[1] / "assets" / "text" / "held-out.txt"
    ids = model.tokenizer.encode(path.read_text(encoding="utf-8"))
    return [ids[i * (len(ids) - tokens) // count :][:tokens] for i in range(count)]


def record(model: Model, path: Path) -> None:
    """Each text continued greedily, all at once: one trace, a sequence each, with full scores and lookahead."""
    from hybrimoe_jax.engine.config import EngineConfig
    from hybrimoe_jax.engine.recording import EngineTrace

    options = EngineConfig(clock="virtual", profile=PAPER, max_batch=RECORDED)
    engine = model.engine(options)
    trace = EngineTrace(engine)
    engine.record(trace)
    engine.generate(texts(model, RECORDED, PROMPT_TOKENS), max_new_tokens=RECORDED_TOKENS)
    trace.save(path)
    engine.close()


def table(model: Model) -> Iterator[dict]:
    """A record for each way and row."""
    for way, options in WAYS.items():
        yield from rows(model, way, options)


def rows(model: Model, way: str, more: dict[str, Any]) -> list[dict]:
    """One way: every row's seconds a token and to the first one, prompt by prompt, as of the machine that is named."""
    from hybrimoe_jax.engine.config import EngineConfig
    from hybrimoe_jax.machine.paced import parse_device

    def engine(variant: Variant) -> Engine:
        return model.engine(EngineConfig(system=variant.system, cache_ratio=0.25, **dict(variant.parts), **more))

    paced = parse_device(more["device"]) if "device" in more else None
    slowdown = paced.slowdown if paced else 1.0
    engines = {name: engine(TABLE_III[name]) for name in ROWS}
    prompts = texts(model, PROMPTS, PROMPT_TOKENS)
    found: dict[str, list[dict]] = {name: [] for name in engines}
    turns = [(prompt, name) for prompt in [prompts[0], *prompts] for name in engines]
    for number, (prompt, name) in enumerate(progress(turns, len(turns), f"the bundled model, {way}")):
        made = asked(engines[name], prompt, slowdown)
        if number >= len(engines):  # the first prompt is asked twice: the first time to warm up
            found[name].append(made)
    for one in engines.values():
        one.close()
    about = {"way": way, "clock": "virtual" if way == "computed" else "wall", "device": more.get("device", "cpu")}
    about |= {"processor": processor(), "cores": cores(), "load": round(os.getloadavg()[0], 1), "versions": versions()}
    about |= {"profile": None if way == "measured" else PAPER, "costs_of": more.get("cost_shape", "bundled")}
    return [{"run": name, **about, **columns(each)} for name, each in found.items()]


def asked(engine: Engine, prompt: Sequence[int], slowdown: float) -> dict[str, Any]:
    """One prompt's figures."""
    made = engine.generate([prompt], max_new_tokens=NEW_TOKENS)
    stats = engine.stats
    assert stats is not None and stats.ttft_s is not None
    decode = [step.seconds - step.compile_s for step in stats.steps if step.phase == "decode"]
    hits, misses = (int(sum(s.total(n) for s in stats.steps if s.phase == "decode")) for n in ("hits", "misses"))
    return {
        "seconds": sum(decode) / slowdown, "steps": len(decode), "ttft": stats.ttft_s / slowdown, "hits": hits,
        "activated": hits + misses, "tokens": made.token_ids[0],
    }  # fmt: skip


def columns(each: Sequence[dict]) -> dict[str, Any]:
    """The prompts' figures as lists, in the form of a simulation's record."""
    by = {name: [one[name] for one in each] for name in ("seconds", "steps", "ttft", "hits", "activated")}
    mean = sum(by["seconds"]) / sum(by["steps"])
    return {
        "seconds_per_step": {"mean": mean},
        "hit_rate": {"mean": sum(by["hits"]) / sum(by["activated"])},
        "sequences": len(each),
        "by_sequence": by,
        "tokens": [one["tokens"] for one in each],
    }


if __name__ == "__main__":
    sys.exit(run(main))
