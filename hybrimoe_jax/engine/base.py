"""What every engine does with a call, whatever computes its steps: check it, serve it in turn, count it."""

from __future__ import annotations

import abc
import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np

from hybrimoe_jax import arguments
from hybrimoe_jax.engine.budget import readable
from hybrimoe_jax.engine.call import Call, Calls, Totals
from hybrimoe_jax.engine.config import EngineConfig
from hybrimoe_jax.engine.finite import NotFinite, check_logits, explained
from hybrimoe_jax.engine.generation import (
    LOGIT_ROWS,
    Generation,
    Steps,
    capacity_for,
    collect,
    generate_steps,
    prefill_chunks,
    show_steps,
)
from hybrimoe_jax.engine.inputs import StepInput
from hybrimoe_jax.engine.request import Prompts, Request, check_prompts, context_limit, one_prompt, read_request
from hybrimoe_jax.engine.stats import RunStats, StepStats
from hybrimoe_jax.engine.turns import Shared, Turns, in_turn
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.progress import Progress


class BaseEngine(abc.ABC):
    """Prompts in, tokens and statistics out. Calls of several threads are served in turn, in the order they came.

    Args: config, options, tokenizer, eos: as of `Engine`. totals: what has been counted so far. UserError for what is
      no list of ids; an id outside the vocabulary ends nothing and is dropped.
    """

    _parts: Any  # with a `footprint` and a `model`, whatever they are made for

    def __init__(
        self, config: Any, options: EngineConfig, tokenizer: Any, eos: Sequence[int], totals: Callable[[], Totals]
    ):
        self.config, self.options, self.tokenizer = config, options, tokenizer
        ids = (arguments.whole("eos", token, most=None) for token in arguments.several("eos", eos, int))
        self.eos = tuple(token for token in ids if 0 <= token < config.vocab_size)
        self.max_context = context_limit(options, config)
        self._turns, self._calls = Turns(self._settings), Calls(totals)
        self._last_stats: RunStats | None = None
        self._partial: Generation | None = None
        self._closed = False

    @property
    def stats(self) -> RunStats | None:
        """Of the latest call."""
        return self._last_stats

    @property
    def partial(self) -> Generation | None:
        """What an interrupted `generate` had made; None once another call has ended well."""
        return self._partial

    @in_turn
    def generate(
        self, prompts: Prompts, *, max_new_tokens: int = 64, stop: str | Sequence[str] | None = (), **options: Any
    ) -> Generation:
        """New tokens for each prompt. UserError, naming the argument, for what cannot be asked.

        Ctrl-C, or a notebook's stop button, leaves what was made so far in `partial`, and an engine that goes on.

        Args:
          prompts: a text or a list of them, or token ids: of one prompt, or a list of those.
          stop: strings that end a text, which needs a tokenizer; the tokens of the text up to the one that completed a
            stop string are returned.
          options: `seed` (the EngineConfig's), and how tokens are chosen: `temperature` (0:
            greedy), `top_k` (0: all) and `top_p` (1: all) of `Sampling`.
        """
        request = read_request(self, prompts, max_new_tokens, stop, **options)
        tokens: list[list[int]] = [[] for _ in request.prompts]
        reasons = ["interrupted"] * len(tokens)
        run, before = self._steps(request), self._last_stats
        try:
            with Progress("reading the prompts", sum(map(len, request.prompts)), "tokens") as progress:
                shown = show_steps(run, progress, len(tokens) * request.max_new_tokens)
                stats = collect(shown, tokens, reasons, request.stop, self.tokenizer)
        except KeyboardInterrupt as interrupt:
            run.close()  # which finishes the statistics
            if self._last_stats is not None and self._last_stats is not before:
                self._partial = Generation(tokens, reasons, self._last_stats, self.tokenizer, request.stop)
                interrupt.args = interrupt.args or ("the tokens so far are in the engine's `partial`",)
            raise
        self._partial = None
        return Generation(tokens, reasons, stats, self.tokenizer, request.stop)

    def steps(self, prompts: Prompts, *, max_new_tokens: int = 64, **options: Any) -> Steps:
        """The step-by-step form of `generate`: yields after every step; `.send(rows)` stops rows early.

        Between two steps the engine may serve others.
        """
        request = read_request(self, prompts, max_new_tokens, **options)
        if request.stop:
            raise UserError("steps take no stop strings, send the rows that are to stop; `generate` takes them")
        return self._steps(request)

    @in_turn
    def logits(self, prompt: Prompts) -> np.ndarray:
        """Logits of every position of one prompt, a text or token ids [T] -> float32 [T, V]."""
        prompts = one_prompt(prompt, self, "logits are")
        check_prompts(prompts, 0, self.config.vocab_size, self.max_context)
        capacity = capacity_for(prompts, 0, self.max_context)
        self._check_ready(1, capacity)
        call, out = self._start(1, capacity), []
        caches = self._init_cache(1, capacity)
        for chunk, positions, _ in prefill_chunks(prompts, min(self.options.prefill_chunk, LOGIT_ROWS), capacity):
            step = StepInput(chunk, positions, capacity, "prefill", None, first_sequence=call.sequence, checked=True)
            try:
                logits, caches, record = self._step(call, step, caches)
                call.stats.steps.append(record)
                out.append(check_logits(logits[0, : np.count_nonzero(positions[0] < capacity)]))
            except NotFinite as error:
                raise self._explained(error, call, prompts) from None
        self._finish(call)
        return np.concatenate(out)

    @in_turn
    def close(self) -> None:
        """Stops the worker threads; the engine cannot be used afterwards. A `with` block does it at its end."""
        self._closed = True
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _settings(self) -> contextlib.AbstractContextManager[Any]:
        """Of whatever computes, for as long as it does."""
        return contextlib.nullcontext()

    def _steps(self, request: Request) -> Steps:
        capacity = capacity_for(request.prompts, request.max_new_tokens, self.max_context)
        self._check_ready(len(request.prompts), capacity)
        return Shared(self._run(request, capacity))

    def _run(self, request: Request, capacity: int) -> Steps:
        call = self._turns.serve(lambda: self._start(len(request.prompts), capacity))

        def forward(step: StepInput, caches: list) -> tuple[np.ndarray, list, StepStats]:
            step.first_sequence = call.sequence
            result = self._turns.serve(lambda: self._step(call, step, caches), step=True)
            call.stats.steps.append(result[2])  # before its tokens are chosen: it counts, and is in a trace, without
            return result

        inner = generate_steps(
            forward,
            lambda *shape: self._turns.serve(lambda: self._init_cache(*shape), step=True),
            request.prompts,
            new_tokens=request.max_new_tokens,
            sampling=request.sampling,
            eos=self.eos,
            chunk=self.options.prefill_chunk,
            max_context=self.max_context,
        )
        stopped, rows = None, [list(prompt) for prompt in request.prompts]
        at_the_end, not_finite = sys.is_finalizing, NotFinite  # a stream that is left until then outlives the module
        try:
            while True:
                emitted = inner.send(stopped)
                call.stats.new_tokens += len(emitted.tokens)
                for row, token in emitted.tokens:
                    rows[row].append(token)
                stopped = yield emitted
        except StopIteration:
            self._turns.serve(lambda: self._finish(call))
        except not_finite as error:
            raise self._turns.serve(lambda why=error: self._explained(why, call, rows), step=True) from None
        finally:
            if not call.finished and not at_the_end():
                self._turns.serve_now(lambda: self._finish(call))
        return call.stats

    def _check_ready(self, batch: int, capacity: int) -> None:
        """UserError where so many sequences of so many tokens cannot be served."""
        self._check_open()
        reserved = self._parts.footprint
        needed = self._parts.model.cache_bytes(batch, capacity)
        if self.options.vram_budget is not None and (needed > reserved.kv or batch > self.options.max_batch):
            raise UserError(
                f"{batch} sequences of up to {capacity} tokens need {readable(needed)} of cache, but "
                f"vram_budget reserved {readable(reserved.kv)} for {self.options.max_batch} of "
                f"{self.max_context}; raise max_batch"
            )

    def _check_open(self) -> None:
        if self._closed:
            raise UserError("the engine is closed: its worker threads have ended; load it again")

    def _explained(self, error: NotFinite, call: Call, rows: Sequence[Sequence[int]]) -> UserError:
        """Numbers that are not finite in the latest step: where they come from, by a second pass over these tokens."""
        found = next(filter(None, map(self._first_not_finite, rows)), None)
        return explained(error, len(call.stats.steps), found)

    @abc.abstractmethod
    def _first_not_finite(self, tokens: Sequence[int]) -> str | None:
        """Where NaN or an infinity comes up first while these tokens are read; None if nowhere."""

    @abc.abstractmethod
    def _start(self, batch: int, capacity: int) -> Call:
        """A call, with statistics that say what runs it."""

    @abc.abstractmethod
    def _init_cache(self, batch: int, capacity: int) -> list:
        """The caches of each layer, empty."""

    @abc.abstractmethod
    def _step(self, call: Call, step: StepInput, caches: list) -> tuple[np.ndarray, list, StepStats]:
        """One forward pass -> logits or tokens, caches, statistics."""

    @abc.abstractmethod
    def _finish(self, call: Call) -> None:
        """Completes the statistics of a call, which become the latest."""

    @abc.abstractmethod
    def _end(self) -> None:
        """Ends threads; may be called again."""
