"""Whether logits and router probabilities are numbers. Imports no jax."""

from __future__ import annotations

import math

import numpy as np

from hybrimoe_jax.errors import UserError

CHUNK = 64
"""Tokens that go through a layer together while one looks where such numbers come up."""
NO_TOKEN = -1
"""What a device gives for the likeliest token of logits that are not finite."""


class NotFinite(UserError):
    """A step computed NaN or infinities. `counted`: whether it is already among the run's steps."""

    def __init__(self, what: str, counted: bool):
        super().__init__(f"{what} NaN or infinite")
        self.counted = counted


def explained(error: NotFinite, steps: int, found: str | None) -> UserError:
    """The one error for numbers that are not finite: at which step, and in which layer first.

    Args: steps: those that were whole. found: where a second pass had them first, if it did.
    """
    second = f"a second pass has such numbers first in {found}" if found else "a second pass does not have them again"
    return UserError(
        f"{error} at step {steps - error.counted}: {second}; the weights are damaged, or overflow in their format: "
        "convert the original again, with --format f32"
    )


def check_logits(logits: np.ndarray) -> np.ndarray:
    """The logits given, of any shape; NotFinite where one of them is no finite number."""
    if not (-math.inf < logits.item(logits.argmin()) and logits.item(logits.argmax()) < math.inf):  # NaN is both
        raise NotFinite("logits are", counted=True)
    return logits


def check_token(token: int) -> int:
    """The same of logits that a device has looked at."""
    if token == NO_TOKEN:
        raise NotFinite("logits are", counted=True)
    return token


def check_scores(scores: np.ndarray) -> None:
    """NotFinite where a router's probabilities [E] are NaN: one is if any is, since a softmax has a common divisor."""
    if scores[0] != scores[0]:
        raise NotFinite("a router's probabilities are", counted=False)
