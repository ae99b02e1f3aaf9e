"""What the PyTorch engine reserves of a budget for intermediate results is what a prompt takes."""

from __future__ import annotations

import weakref

import pytest
import tiny

pytest.importorskip("torch", reason="the PyTorch baseline needs torch")

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch_models import offload


class Live(TorchDispatchMode):
    """`most`: bytes of what operations have made and somebody still holds, at most."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {id_of(tensor) for tensor in tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in tensors(out):
            if id_of(tensor) not in given and id_of(tensor) not in self._seen:
                storage = tensor.untyped_storage()
                self._seen[id_of(tensor)] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, id_of(tensor))
        self.most = max(self.most, self.now)
        return out

    def _gone(self, key: int) -> None:
        self.now -= self._seen.pop(key)


def tensors(tree) -> list:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def id_of(tensor) -> int:
    return tensor.untyped_storage()._cdata


@pytest.mark.parametrize("family", tiny.CONFIGS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_workspace_is_what_a_prompt_takes(family, precision):
    tokens = 96
    options = {"mode": "hybrid", "precision": precision, "vram_budget": "1GiB", "max_context": 128}
    with offload(family, **{**options, "prefill_chunk": tokens}) as engine:
        (prompt,) = tiny.prompts(engine.config, (tokens,))
        engine.generate(prompt, max_new_tokens=1)
        with Live() as live:
            engine.generate(prompt, max_new_tokens=1)
        taken = live.most - engine._parts.model.cache_bytes(1, 128)
        assert taken <= engine._parts.footprint.workspace <= 2 * taken, (taken, engine._parts.footprint.workspace)
