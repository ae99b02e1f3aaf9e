"""What the tests of predictors share: a small model, random steps of it, and a recording of some."""

from __future__ import annotations

import numpy as np

from hybrimoe_jax.decide.prefetch.prediction import RouterOutlook
from hybrimoe_jax.decide.prefetch.predictors import build_predictor
from hybrimoe_jax.trace.facts import TraceFacts
from hybrimoe_jax.trace.file import save_trace
from hybrimoe_jax.trace.recorder import TraceRecorder
from hybrimoe_jax.trace.tokens import load_recording

LAYERS, EXPERTS, TOP_K, DISTANCES = 4, 6, 2, 3
MODEL = (LAYERS, EXPERTS, TOP_K, DISTANCES)


def recorded_predictor(path):
    return build_predictor(f"recorded:{path}", *MODEL, load_recording(str(path)))


def steps(rng, sizes, gates: bool = True, skew: float = 1.0):
    """[step][layer] -> Shown of random tokens; what routers say early is the truth with noise."""
    found = []
    for tokens in sizes:
        logits = rng.normal(size=(LAYERS, tokens, EXPERTS)) * skew
        scores = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        noisy = np.exp(logits + rng.normal(size=logits.shape))
        noisy /= noisy.sum(axis=-1, keepdims=True)
        found.append(
            [
                RouterOutlook(
                    np.argsort(-scores[layer], axis=1)[:, :TOP_K],
                    scores[layer],
                    [noisy[min(layer + d, LAYERS - 1)] for d in range(1, DISTANCES + 1)] if gates else (),
                )
                for layer in range(LAYERS)
            ]
        )
    return found


def recorded_file(folder, tokens=6):
    rng = np.random.default_rng(5)
    recorder = TraceRecorder(TraceFacts("toy", LAYERS, EXPERTS, TOP_K))
    for position, step in enumerate(steps(rng, [1] * tokens)):
        recorder.next_step()
        for layer, shown in enumerate(step):
            recorder.add(layer, "decode", sequence=[0], position=[position], ids=shown.ids)
    save_trace(recorder.trace(), folder / "recorded.npz")
    return folder / "recorded.npz"
