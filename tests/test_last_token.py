"""What leaves a device at a step's end: the token itself where tokens are the likeliest ones, else logits."""

from __future__ import annotations

import numpy as np
import pytest
import tiny

from hybrimoe_jax.engine import programs


@pytest.mark.parametrize(
    ("temperature", "slots", "sent"), [(0.0, "stacked", 1), (0.7, "stacked", 2), (0.0, "separate", 2)]
)
def test_greedy_steps_send_a_token_and_others_logits(temperature, slots, sent, monkeypatch):
    """As on a GPU with stacked slots; the CPU backend's logits are in the host's memory already."""
    results = []
    for name in ("last_token", "last_logits"):
        function = getattr(programs, name)
        monkeypatch.setattr(programs, name, lambda *a, f=function, **k: results.append(f(*a, **k)) or results[-1])
    monkeypatch.setattr("hybrimoe_jax.models.products.native_here", lambda: False)
    engine = tiny.engine("qwen2_moe", slots=slots, max_batch=2)
    prompts = tiny.prompts(engine.config, (5, 9))
    options = {"temperature": temperature, "seed": 3}
    tokens = engine.generate(prompts, max_new_tokens=6, **options).token_ids
    assert {result.ndim for result in results} == {sent}
    want = tiny.engine("qwen2_moe", executor="dense").generate(prompts, max_new_tokens=6, **options).token_ids
    assert tokens == want
    assert all(np.asarray(result).shape[0] == 2 for result in results)
