"""Contenders that are not our engine: PyTorch's offload engine, transformers and llama.cpp."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from hybrimoe_jax.bench.served import Served, StepsContender, stepwise
from hybrimoe_jax.errors import UserError


class TorchContender(StepsContender):
    """PyTorch's offload engine; `open` takes a mode and the engine's other options. Its modes share the experts."""

    def __init__(self, model: str, threads: int, device: str = "auto"):
        from hybrimoe_jax.baselines.torch_offload import require_torch
        from hybrimoe_jax.checkpoint.reader import open_checkpoint

        self.about = {"torch": require_torch().__version__}
        self.usual = {"threads": threads, "device": device}
        self.checkpoint, self.engines = open_checkpoint(model), {}
        self.vocab = self.checkpoint.config.vocab_size

    def make(self, options: dict[str, Any]) -> Any:
        from hybrimoe_jax.baselines.torch_offload import TorchOffload

        return TorchOffload(self.checkpoint, **{**self.usual, **options})


DECODE_ONLY = "batched_mm"
"""It copies an expert's weights for every token routed to it: 13 GB for a prompt of 512 on the mid model."""
IMPLEMENTATIONS = ("eager", "grouped_mm", DECODE_ONLY)


class TransformersContender(Served):
    """Hugging Face transformers on the same weights, one model whose experts implementation is switched.

    A name is an implementation, or what `open` has chosen: the fastest one for prompts, the fastest one for decoding.
    """

    def __init__(self, folder: str, threads: int, implementations: Sequence[str] = (), dtype: str = "float32"):
        import torch
        import transformers

        warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch = torch
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self.uses = {f"transformers {name}": (name, name) for name in implementations}
        self.vocab = self.model.config.vocab_size
        self.about = {"transformers": transformers.__version__, "torch": torch.__version__}

    def names(self) -> list[str]:
        return list(self.uses)

    def open(self, name: str, options: dict[str, Any]) -> dict[str, Any]:
        """options: `ids`, of the prompt that implementations are compared with; one run before counts for nothing."""
        times: dict[str, list[tuple[float, str]]] = {"ttft_s": [], "decode_s": []}
        for one in IMPLEMENTATIONS:
            self.uses[name] = (IMPLEMENTATIONS[0] if one == DECODE_ONLY else one, one)
            self.generate(name, options["ids"], 4)
            made = self.generate(name, options["ids"], 4)
            for what in times if one != DECODE_ONLY else ("decode_s",):
                times[what].append((made[what], one))
        prefill, decode = (min(found)[1] for found in times.values())
        self.uses[name] = prefill, decode
        return {"implementations": {"prefill": prefill, "decode": decode}}

    def generate(self, name: str, ids: list[int], new: int) -> dict[str, Any]:
        cache, wanted = None, list(self.uses[name])

        def step(tokens: list[int]) -> int:
            nonlocal cache
            if wanted:  # of the prompt, then of the first token decoded
                self.model.set_experts_implementation(wanted.pop(0))
            out = self.model(self.torch.tensor([tokens]), past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            return int(out.logits[0, -1].argmax())

        return stepwise(ids, new, step)


class AccelerateContender(TransformersContender):
    """The same with accelerate's offload: weights in host memory, each module's on the device while it runs.

    The device is a GPU where torch has one. Else it is the CPU: then nothing is copied, and what is seen is what the
    hooks take.
    """

    def __init__(self, folder: str, threads: int, dtype: str = "float32"):
        super().__init__(folder, threads, dtype=dtype)
        import accelerate  # pyright: ignore[reportMissingImports]  # where it is installed

        device = self.torch.device("cuda" if self.torch.cuda.is_available() else "cpu")
        self.model = accelerate.cpu_offload(self.model, execution_device=device)
        self.about |= {"accelerate": accelerate.__version__, "device": device.type}


class LlamaCppContender(Served):
    """llama.cpp on a GGUF file, by llama-cpp-python's low-level interface: greedy, its default cache type (float16)."""

    def __init__(self, file: str, threads: int, context: int = 1024):
        import llama_cpp  # pyright: ignore[reportMissingImports]  # compiled on the machine that measures

        self.lib = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.no_perf = context, context, 512, True
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

    def generate(self, name: str, ids: list[int], new: int) -> dict[str, Any]:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        return stepwise(ids, new, self._next)
