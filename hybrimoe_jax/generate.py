"""`python -m hybrimoe_jax.generate`: text from a converted checkpoint, and what the cache and the scheduler did.

Text goes to stdout as it is made. Statistics go to stderr, or with `--stats json` as one last line on stdout.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from typing import Any

from hybrimoe_jax.cli import INTERRUPTED, Parser, check_results, run
from hybrimoe_jax.decide.cache_state import CacheState, load_state
from hybrimoe_jax.encoding import argument, for_stream, read_stdin, say
from hybrimoe_jax.engine.config import (
    EngineConfig,
)
from hybrimoe_jax.engine.flags import add_engine_flags, engine_config
from hybrimoe_jax.engine.stats_text import stats_text
from hybrimoe_jax.errors import UserError, shown
from hybrimoe_jax.machine.costs import CostModel, is_profile
from hybrimoe_jax.machine.profile import PROFILES, load_profile
from hybrimoe_jax.records import stamped

BUNDLED_PROMPT = "My lord,"


def parser() -> argparse.ArgumentParser:
    top = Parser(
        prog="python -m hybrimoe_jax.generate", description="Generate text with experts split between CPU and device."
    )
    top.add_argument(
        "--model", metavar="DIR", help="folder written by hybrimoe_jax.convert (default: the bundled model)"
    )
    prompt = top.add_mutually_exclusive_group()
    prompt.add_argument(
        "--prompt",
        metavar="TEXT",
        help=f'the prompt; "-" reads standard input (the bundled model goes on from "{BUNDLED_PROMPT}" without one)',
    )
    prompt.add_argument("--prompt-ids", metavar="IDS", help='token ids, e.g. "1,2,3"')
    top.add_argument("--max-tokens", type=int, default=64, metavar="N", help="new tokens at most (default 64)")
    top.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    top.add_argument("--top-p", type=float, default=1.0, metavar="P")
    top.add_argument("--top-k", type=int, default=0, metavar="K")
    top.add_argument("--seed", type=int, default=0, metavar="N")
    top.add_argument("--stop", action="append", default=[], metavar="TEXT", help="stop before this text (repeatable)")
    top.add_argument("--ignore-chat-template", action="store_true", help="send the prompt as it is")
    top.add_argument(
        "--chat-template", metavar="NAME|FILE", help="which of a checkpoint's templates, or a file with another"
    )
    top.add_argument("--tools", metavar="FILE", help="functions for the chat template: a JSON list of their schemas")
    top.add_argument("--documents", metavar="FILE", help="documents for it: a JSON list of objects")
    top.add_argument("--stats", choices=("text", "json", "none"), default="text")
    top.add_argument("--trace", metavar="FILE", help="write the routing trace (.npz)")
    top.add_argument(
        "--timeline", metavar="FILE", help="write a Chrome trace-event timeline (.json, opens in Perfetto)"
    )
    top.add_argument(
        "--save-cache-state", metavar="FILE", help="write who is resident and what the cache has learned at the end"
    )
    top.add_argument("--load-cache-state", metavar="FILE", help="go on from what --save-cache-state wrote")
    add_engine_flags(top)
    return top


def read_prompt(args: argparse.Namespace) -> str | list[int]:
    """The prompt as it was given, text or token ids; what is wrong with it is said before a model is loaded."""
    if args.prompt_ids is not None:
        try:
            return [int(part) for part in args.prompt_ids.split(",") if part.strip()]
        except ValueError:
            raise UserError(
                f'--prompt-ids {shown(args.prompt_ids)}: write token ids separated by commas, e.g. "1,2,3"'
            ) from None
    if args.prompt is None and args.model is not None:
        raise UserError("there is no prompt: give --prompt TEXT, --prompt - for standard input, or --prompt-ids IDS")
    if args.prompt is None:
        say(f'no --prompt: the bundled model goes on from "{BUNDLED_PROMPT}"')
        return BUNDLED_PROMPT
    text = read_stdin() if args.prompt == "-" else argument(args.prompt, "--prompt")
    if not text.strip():
        raise UserError("the prompt is empty: give --prompt TEXT, or text on standard input with --prompt -")
    return text


def read_chat_options(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags give to the chat template: its name or file, the tools and documents of their files."""
    given = {name: getattr(args, name, None) for name in ("chat_template", "tools", "documents")}
    given = {name: value for name, value in given.items() if value is not None}
    without = "--ignore-chat-template" if args.ignore_chat_template else "--prompt-ids"
    if given and (args.ignore_chat_template or getattr(args, "prompt_ids", None) is not None):
        raise UserError(f"--{next(iter(given)).replace('_', '-')} is for the chat template, and {without} uses none")
    from hybrimoe_jax.text.templates import read_objects

    return {name: value if name == "chat_template" else read_objects(value, name) for name, value in given.items()}


def prompt_ids(text: str, args: argparse.Namespace, tokenizer, chat: dict[str, Any], max_context: int) -> list[int]:
    """A text prompt as token ids, through the chat template where the checkpoint or the command line has one."""
    from hybrimoe_jax.engine.request import check_length

    if tokenizer is None:
        raise UserError("this checkpoint has no tokenizer.json: give the prompt as --prompt-ids")
    check_length(text, tokenizer, max_context)
    if chat or (tokenizer.has_chat_template and not args.ignore_chat_template):
        from hybrimoe_jax.text.templates import named_or_read

        if "chat_template" in chat:
            chat = chat | {"chat_template": named_or_read(chat["chat_template"], tokenizer.chat_templates)}
        return tokenizer.encode_chat([{"role": "user", "content": text}], **chat)
    return tokenizer.encode(text)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    check_files(args)
    options = engine_config(args)
    saves_profile = None
    if options.profile not in (None, *PROFILES) and options.clock == "wall" and not os.path.exists(options.profile):
        saves_profile = options.profile
        options = dataclasses.replace(options, profile=None, measure_again=True)
    prompt, chat = read_prompt(args), read_chat_options(args)
    args.stop = [argument(text, "--stop") for text in args.stop]
    check_flags(args, options)
    state = load_state(args.load_cache_state) if args.load_cache_state else None
    from hybrimoe_jax.checkpoint.reader import open_checkpoint
    from hybrimoe_jax.engine.load import bundled_model, load
    from hybrimoe_jax.engine.request import context_limit

    checkpoint = open_checkpoint(bundled_model() if args.model is None else args.model)
    limit = context_limit(options, checkpoint.config)
    ids = prompt_ids(prompt, args, checkpoint.tokenizer, chat, limit) if isinstance(prompt, str) else prompt
    check_request(ids, args, limit, checkpoint)
    if state is not None:
        check_state(state, options, checkpoint)
    engine = load(checkpoint, options)
    if state is not None:
        engine.load_cache_state(state)
    if saves_profile:
        engine.save_profile(saves_profile)
    trace, timeline = recorders(args, engine)
    engine.record(trace, timeline)

    from hybrimoe_jax.engine.streaming import stream_generate

    chunks = stream_generate(
        engine,
        ids,
        max_new_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        stop=args.stop,
    )
    tokens, interrupted, reason = [], False, None
    try:
        for chunk in chunks:
            tokens.append(chunk.token_id)
            reason = chunk.finish_reason
            sys.stdout.write(for_stream(chunk.text, sys.stdout))
            sys.stdout.flush()
    except KeyboardInterrupt:
        interrupted, reason = True, "interrupted"
        chunks.close()
    if engine.tokenizer is None:
        sys.stdout.write(",".join(map(str, tokens)))
    sys.stdout.write("\n")
    _write_files(args, engine, trace, timeline, interrupted)
    if engine.stats is not None and args.stats == "json":
        record = {"token_ids": tokens, "prompt_tokens": len(ids), "finish_reason": reason, **engine.stats.summary()}
        print(json.dumps(stamped("generation", record)), flush=True)
    elif engine.stats is not None and args.stats == "text":
        sys.stdout.flush()
        say("\n" + stats_text(engine.stats))
    return INTERRUPTED if interrupted else 0


def _write_files(args: argparse.Namespace, engine, trace, timeline, interrupted: bool) -> None:
    """What the flags ask for; of a run that was interrupted in its first step there is no trace."""
    if trace is not None and interrupted and not len(trace.recorder):
        say(f"{args.trace}: not written; no step was finished")
    elif trace is not None:
        trace.save(args.trace)
    if args.save_cache_state:
        engine.save_cache_state(args.save_cache_state)
    if timeline is not None:
        timeline.write(args.timeline)


def check_state(state: CacheState, options: EngineConfig, checkpoint) -> None:
    """UserError for a cache state of another model or system, before weights are read."""
    from hybrimoe_jax.engine.cache_state import facts_of

    state.check(facts_of(checkpoint.config), options.chosen_system)


def check_flags(args: argparse.Namespace, options: EngineConfig) -> None:
    """UserError for what can be refused without a model."""
    from hybrimoe_jax.engine.request import read_stop
    from hybrimoe_jax.engine.sampling import Sampling

    Sampling(args.temperature, args.top_k, args.top_p, options.seed)
    read_stop(args.stop)
    if args.max_tokens < 1:
        raise UserError(f"--max-tokens {args.max_tokens} must be at least 1")
    if options.profile is not None:
        (CostModel.load if is_profile(options.profile) else load_profile)(options.profile)


def check_request(ids: list[int], args: argparse.Namespace, max_context: int, checkpoint) -> None:
    """UserError for what the model cannot do: better said now than when its weights are read."""
    from hybrimoe_jax.engine.request import check_prompts, check_stop

    check_stop(args.stop, checkpoint.tokenizer)
    check_prompts([ids], args.max_tokens, checkpoint.config.vocab_size, max_context)


def check_files(args: argparse.Namespace) -> None:
    """Files that are written at the end must have a place to go: better said now than after the run."""
    results, profile = ["trace", "timeline", "save_cache_state"], args.profile
    if profile not in (None, *PROFILES) and (os.path.isdir(profile) or not os.path.exists(profile)):
        results.append("profile")
    check_results(args, results, [args.model], texts=("prompt", "prompt_ids", "stop"))
    if args.executor == "dense" and (args.trace or args.timeline):
        raise UserError("the dense executor routes inside one executable: it gives no trace and no timeline")
    if args.executor == "dense" and (args.save_cache_state or args.load_cache_state):
        raise UserError("the dense executor has every expert on the device: it keeps no cache state")


def recorders(args: argparse.Namespace, engine):
    """The trace and timeline recorders that the flags ask for."""
    trace = timeline = None
    if args.trace:
        from hybrimoe_jax.engine.recording import EngineTrace

        trace = EngineTrace(engine)
    if args.timeline:
        from hybrimoe_jax.engine.recording import EngineTimeline

        timeline = EngineTimeline(engine)
    return trace, timeline


if __name__ == "__main__":
    run(main)
