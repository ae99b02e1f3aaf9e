"""Contenders of the engine benchmark.

Each lives in a process of its own and answers requests, one JSON object a line:

    {"run": "prefill", "name": ..., "tokens": n}  ->  {"seconds": time to the first token}
    {"run": "decode", "name": ..., "tokens": n, "new": m}  ->  {"seconds": seconds a token, "token_ids": [...]}

An answer {"error": message} ends it: what was asked for cannot be done.

`python -m hybrimoe_jax.bench.contenders KIND MODEL ...` starts one; the first line it prints says what it is.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time

import numpy as np

from hybrimoe_jax.cli import INTERRUPTED
from hybrimoe_jax.errors import UserError


def prompt(tokens: int, vocab: int) -> list[int]:
    """The same prompt for every contender."""
    return np.random.default_rng(1).integers(0, min(vocab, 2000), tokens).tolist()


class EngineContender:
    """Our engine under several systems, in one process that shares host weights and executables."""

    def __init__(self, model: str, systems: list[str], threads: int, cache_ratio: float):
        from hybrimoe_jax.engine.config import EngineConfig
        from hybrimoe_jax.engine.lanes import threads as cores

        cores.split_threads(threads, "overlapped")
        from hybrimoe_jax.checkpoint.reader import open_checkpoint
        from hybrimoe_jax.engine.engine import Engine

        checkpoint = open_checkpoint(model)
        dense, store = checkpoint.dense(), checkpoint.experts(dtype="float32", lazy=False)
        self.vocab = checkpoint.config.vocab_size
        self.engines = {
            name: Engine(
                checkpoint.config,
                dense,
                store,
                EngineConfig(system=name, cache_ratio=cache_ratio, threads=threads, max_context=1024),
                frequencies=checkpoint.frequencies(),
            )
            for name in systems
        }
        config = checkpoint.config
        expert = 3 * config.hidden_size * config.moe_width
        routed = store.expert_bytes * config.num_experts_per_tok * len(config.moe_layers)
        held = next(iter(self.engines.values()))._parts.model
        read = [held.norm, held.head, *(array for layer in held.layers for array in layer.params.values())]
        self.about = {
            "parameters": sum(a.size for a in dense.values()) + expert * store.num_experts * store.num_layers,
            "bytes_per_token": routed + sum(array.nbytes for array in read),
            "moe_layers": len(config.moe_layers),
        }

    def names(self) -> list[str]:
        return list(self.engines)

    def prefill(self, name: str, tokens: int) -> dict:
        engine = self.engines[name]
        ids = prompt(tokens, self.vocab)
        start = time.perf_counter()
        engine.generate([ids], max_new_tokens=1)
        return {"seconds": time.perf_counter() - start}

    def decode(self, name: str, tokens: int, new: int) -> dict:
        engine = self.engines[name]
        ids = prompt(tokens, self.vocab)
        made, times = [], []
        for emitted in engine.steps([ids], max_new_tokens=new + 1):
            if emitted.tokens:
                times.append(time.perf_counter())
            made += [token for _, token in emitted.tokens]
        seconds = (time.perf_counter() - times[0]) / new
        assert engine.stats is not None
        stats = engine.stats.summary()
        kept = ("hit_rate", "cpu_experts", "device_experts", "demand_fetches", "bytes_h2d", "prefetch", "lanes")
        return {"seconds": seconds, "token_ids": made, **{key: stats[key] for key in kept}}

    def overhead(self, name: str, tokens: int, new: int) -> dict:
        """The engine's own time per MoE layer at decode.

        It is the step less what its kernels take when nothing else is timed.

        Kernel time of a layer: its front program, then the longer of the host's experts (as measured in the run) and
        the device's (shared and resident experts), each device program timed back to back so that dispatch is hidden.
        """
        engine = self.engines[name]
        run = engine.generate([prompt(tokens, self.vocab)], max_new_tokens=new + 1)
        decoded = [step for step in run.stats.steps if step.phase == "decode"]
        layers = [layer for step in decoded for layer in step.layers]
        steps = [step.seconds for step in decoded if not step.compile_s]
        parts = device_kernel_seconds(engine)
        kernels = [
            parts["front"] + max(layer.lanes.cpu, parts["shared"] + len(layer.device) * parts["expert"])
            for layer in layers
        ]
        count = self.about["moe_layers"]
        per_layer = (statistics.median(steps) - parts["head"]) / count - statistics.mean(kernels)
        return {"overhead_us_per_layer": 1e6 * per_layer, "kernel_us": {k: 1e6 * v for k, v in parts.items()}}


def device_kernel_seconds(engine, repeats: int = 30) -> dict[str, float]:
    """Seconds of the device programs of one decode step, each queued `repeats` times before waiting."""
    import jax
    import jax.numpy as jnp

    from hybrimoe_jax.engine import programs

    parts = engine._parts
    model, pool = parts.model, parts.pool
    x = jnp.zeros((1, engine.config.hidden_size), jnp.float32)
    layers = model.moe_layers
    caches = model.init_cache(1, 256)
    positions = jnp.full((1, 1), 128, jnp.int32)
    state = {"h": x[None], "i": 0}

    def queued(run) -> float:
        out, times = jax.block_until_ready(run()), []
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(repeats):
                out = run()
            jax.block_until_ready(out)
            times.append((time.perf_counter() - start) / repeats)
        return statistics.median(times)

    def front():
        i = state["i"] = (state["i"] + 1) % len(layers)
        layer = layers[i]
        routers = model.lookahead_routers(layer.moe_layer, parts.lookahead)
        state["h"], *_, caches[i], packed = layer.programs.front(
            layer.params, routers, state["h"], x, x, caches[i], positions, 256
        )
        return packed

    def shared():
        i = state["i"] = (state["i"] + 1) % len(layers)
        return layers[i].programs.shared(layers[i].params, x)

    slots = [(layer, expert) for layer in range(len(layers)) for expert in sorted(pool.residents(layer))]

    def expert():
        i = state["i"] = state["i"] + 1
        slot = pool.get(*slots[i % len(slots)])
        return programs.dense_rows(x, x, one, slot, kernel=model.device_kernel)

    one = jnp.ones((1, 1), jnp.float32)
    last = jnp.zeros(1, jnp.int32)
    return {
        "front": queued(front),
        "shared": queued(shared) if layers[0].programs.shared is not None else 0.0,
        "expert": queued(expert) if slots else 0.0,
        "head": queued(lambda: programs.last_logits(model.norm, model.head, x[None], x, x, last, eps=model.eps)),
    }


class TransformersContender:
    """Hugging Face transformers on the same weights, float32, one model per experts implementation."""

    def __init__(self, folder: str, implementations: list[str], threads: int):
        import torch
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch = torch
        self.models = {}
        for name in implementations:
            self.models[f"transformers {name}"] = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, experts_implementation=name
            ).eval()
        self.vocab = next(iter(self.models.values())).config.vocab_size
        self.about = {"transformers": transformers.__version__, "torch": torch.__version__}

    def names(self) -> list[str]:
        return list(self.models)

    def prefill(self, name: str, tokens: int) -> dict:
        model, ids = self.models[name], self.torch.tensor([prompt(tokens, self.vocab)])
        start = time.perf_counter()
        int(model(ids, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())
        return {"seconds": time.perf_counter() - start}

    def decode(self, name: str, tokens: int, new: int) -> dict:
        model, ids = self.models[name], self.torch.tensor([prompt(tokens, self.vocab)])
        out = model(ids, use_cache=True, logits_to_keep=1)
        made = [int(out.logits[0, -1].argmax())]
        start = time.perf_counter()
        for _ in range(new):
            token = self.torch.tensor([made[-1:]])
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            made.append(int(out.logits[0, -1].argmax()))
        return {"seconds": (time.perf_counter() - start) / new, "token_ids": made}


class LlamaCppContender:
    """llama.cpp on a GGUF file, by llama-cpp-python's low-level interface: greedy, its default cache type (float16)."""

    def __init__(self, file: str, threads: int):
        import llama_cpp  # pyright: ignore[reportMissingImports]  # compiled on the machine that measures

        self.lib = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.no_perf = 1024, 512, 512, True
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings) if self.model else None
        if not self.context:
            raise UserError(f"{file}: llama.cpp could not load it")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.about = {"llama_cpp_python": llama_cpp.__version__}

    def names(self) -> list[str]:
        return ["llama.cpp"]

    def _next(self, ids: list[int]) -> int:
        lib = self.lib
        array = (lib.llama_token * len(ids))(*ids)  # must outlive the batch, which only points at it
        if lib.llama_decode(self.context, lib.llama_batch_get_one(array, len(ids))):
            raise UserError("llama.cpp could not compute a batch")
        return int(np.ctypeslib.as_array(lib.llama_get_logits_ith(self.context, -1), (self.vocab,)).argmax())

    def prefill(self, name: str, tokens: int) -> dict:
        ids = prompt(tokens, self.vocab)
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        start = time.perf_counter()
        self._next(ids)
        return {"seconds": time.perf_counter() - start}

    def decode(self, name: str, tokens: int, new: int) -> dict:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        made = [self._next(prompt(tokens, self.vocab))]
        start = time.perf_counter()
        for _ in range(new):
            made.append(self._next(made[-1:]))
        return {"seconds": (time.perf_counter() - start) / new, "token_ids": made}


CONTENDERS = {"engine": EngineContender, "transformers": TransformersContender, "llama.cpp": LlamaCppContender}


def serve() -> None:
    kind, options = sys.argv[1], json.loads(sys.argv[2])
    contender = CONTENDERS[kind](**options)
    print(json.dumps({"names": contender.names(), **contender.about}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(contender, request.pop("run"))(**request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    try:
        serve()
    except UserError as error:
        print(json.dumps({"error": str(error)}), flush=True)
    except (KeyboardInterrupt, BrokenPipeError):  # the benchmark was ended, and says so
        os._exit(INTERRUPTED)
