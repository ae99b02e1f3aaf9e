"""`python -m hybrimoe_jax.trace record`: prompts through a model, and the routing of all of them as one trace.

Every prompt is a sequence. With `--batch N` so many run side by side: the trace marks which. Interrupted, it keeps the
batches that were finished.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from hybrimoe_jax.cli import INTERRUPTED, check_results, progress
from hybrimoe_jax.encoding import check_text, read_text, say
from hybrimoe_jax.engine.flags import add_engine_flags, engine_config
from hybrimoe_jax.errors import UserError, printable
from hybrimoe_jax.generate import prompt_ids, read_chat_options
from hybrimoe_jax.records import stamped

if TYPE_CHECKING:
    from hybrimoe_jax.engine.generation import Generation
    from hybrimoe_jax.trace.columns import Trace


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The flags of `trace record`."""
    command.add_argument(
        "--prompts", required=True, metavar="FILE", help='a prompt a line, or JSON lines with a "prompt": text or ids'
    )
    command.add_argument("--out", required=True, metavar="OUT.npz", help="the trace")
    command.add_argument("--model", metavar="DIR", help="a converted checkpoint (default: the bundled model)")
    command.add_argument("--max-tokens", type=int, default=64, metavar="N", help="new tokens a prompt (default 64)")
    command.add_argument("--batch", type=int, default=1, metavar="N", help="prompts that run side by side (default 1)")
    command.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    command.add_argument("--top-p", type=float, default=1.0, metavar="P")
    command.add_argument("--top-k", type=int, default=0, metavar="K")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling; each batch has one of its own")
    command.add_argument("--ignore-chat-template", action="store_true", help="send the prompts as they are")
    command.add_argument(
        "--chat-template", metavar="NAME|FILE", help="which of a checkpoint's templates, or a file with another"
    )
    add_engine_flags(command)


def record(args: argparse.Namespace) -> int:
    """Carries the command out."""
    from hybrimoe_jax.engine.sampling import Sampling

    check_results(args, ["out"], [args.model])
    options, chat = engine_config(args), read_chat_options(args)
    if options.executor == "dense":
        raise UserError("the dense executor routes inside one executable: it gives no trace")
    for name in ("batch", "max_tokens"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    prompts = read_prompts(args.prompts)
    options = dataclasses.replace(options, max_batch=max(options.max_batch, min(args.batch, len(prompts))))

    from hybrimoe_jax.checkpoint.reader import open_checkpoint
    from hybrimoe_jax.engine.load import bundled_model, load
    from hybrimoe_jax.engine.recording import EngineTrace
    from hybrimoe_jax.engine.request import check_prompts, context_limit

    checkpoint = open_checkpoint(bundled_model() if args.model is None else args.model)
    limit, vocab = context_limit(options, checkpoint.config), checkpoint.config.vocab_size
    ids = [prompt_ids(p, args, checkpoint.tokenizer, chat, limit) if isinstance(p, str) else p for p in prompts]
    check_prompts(ids, args.max_tokens, vocab, limit)
    engine = load(checkpoint, options)
    trace = EngineTrace(engine)
    trace.recorder.about |= {"prompts": Path(args.prompts).name, "batch": args.batch}
    engine.record(trace)
    sampling = {name: getattr(args, name) for name in ("temperature", "top_p", "top_k")}
    made: list[Generation] = []
    batches = [ids[at : at + args.batch] for at in range(0, len(ids), args.batch)]
    begun, interrupted = 0, False
    try:
        for number, batch in enumerate(progress(batches, len(batches), "recording")):
            begun = trace.recorder.step + 1
            made.append(engine.generate(batch, max_new_tokens=args.max_tokens, seed=args.seed + number, **sampling))
    except KeyboardInterrupt:
        if not made:
            raise
        interrupted = True
        trace.recorder.drop_from(begun)
        say(f"interrupted after {len(made)} of {len(batches)} batches")
    engine.close()
    trace.save(args.out)
    _say(args, trace.recorder.trace(), sum(map(len, ids[: len(made) * args.batch])), made)
    return INTERRUPTED if interrupted else 0


def _say(args: argparse.Namespace, trace: Trace, prompt_tokens: int, made: list[Generation]) -> None:
    from hybrimoe_jax.trace.info import lacks

    said = {
        "file": args.out,
        "sequences": int(trace.sequence.max()) + 1,
        "batch": args.batch,
        "steps": int(trace.step.max()) + 1,
        "rows": len(trace),
        "prompt_tokens": prompt_tokens,
        "new_tokens": sum(len(tokens) for generation in made for tokens in generation.token_ids),
        "hits": sum(int(generation.stats.total("hits")) for generation in made),
        "misses": sum(int(generation.stats.total("misses")) for generation in made),
        "lacks": lacks(trace),
    }
    print(printable(f"{args.out}: {said['sequences']} sequences, {said['steps']} steps, {said['rows']} rows"))
    print(json.dumps(stamped("trace recording", said)))


def read_prompts(path: str | Path) -> list[str | list[int]]:
    """The prompts in a file: a line each, or JSON lines whose `prompt` is a text or a list of token ids.

    Empty lines are passed over. UserError naming the line that is no prompt, and for a file without any.
    """
    where = f"--prompts {path}"
    lines = read_text(path, where).split("\n")
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"{where}: it holds no prompts; write one a line")
    if str(path).endswith(".jsonl") or numbered[0][1].startswith("{"):
        return [_prompt(line, f"{where}, line {number}") for number, line in numbered]
    return [line for _, line in numbered]


def _prompt(line: str, where: str) -> str | list[int]:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f'{where}: not a JSON object with a "prompt"') from None
    if isinstance(prompt, str) and prompt.strip():
        return check_text(prompt, f"{where}: its prompt")
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        return prompt
    raise UserError(f"{where}: its prompt is neither a text nor a list of token ids, or it is empty")
