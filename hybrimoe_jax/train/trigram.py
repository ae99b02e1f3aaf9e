"""The byte trigram model that the bundled model has to beat: what counting alone learns from the same training bytes.

It is smoothed by the recursive interpolation of Witten and Bell (IEEE Trans. Inf. Theory 37(4), 1991):

    p(c | ab) = (n(abc) + u(ab) p(c | b)) / (n(ab) + u(ab)),    u(ab) = number of different bytes seen after ab

down to a uniform distribution over 256 bytes. With two bytes of context and millions of bytes to count, the choice of smoothing
hardly matters: nearly every context of a held-out text has been seen often.
"""

from __future__ import annotations

import numpy as np

BYTES = 256


class ByteTrigram:
    """Witten-Bell interpolated trigram over bytes, fitted on `documents`; the start of a document has no context."""

    def __init__(self, documents: list[bytes]):
        counts = np.zeros((BYTES, BYTES, BYTES), np.int64)
        pairs = np.zeros((BYTES, BYTES), np.int64)
        singles = np.zeros(BYTES, np.int64)
        for document in documents:
            b = np.frombuffer(document, np.uint8).astype(np.int64)
            singles += np.bincount(b, minlength=BYTES)
            pairs += np.bincount(b[:-1] * BYTES + b[1:], minlength=BYTES**2).reshape(pairs.shape)
            triples = (b[:-2] * BYTES + b[1:-1]) * BYTES + b[2:]
            counts += np.bincount(triples, minlength=BYTES**3).reshape(counts.shape)
        self.unigram = _interpolate(singles, np.full(BYTES, 1 / BYTES))
        self.bigram = _interpolate(pairs, self.unigram[None, :])
        self.trigram = _interpolate(counts, self.bigram[None, :, :])

    def loss(self, document: bytes) -> float:
        """Total -ln p of the document, in nats."""
        b = np.frombuffer(document, np.uint8)
        p = [self.unigram[b[:1]], self.bigram[b[:1], b[1:2]], self.trigram[b[:-2], b[1:-1], b[2:]]]
        return float(-np.sum(np.log(np.concatenate(p))))


def _interpolate(counts: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """counts [..., 256] and the shorter context's distribution -> the interpolated distribution [..., 256]."""
    total = counts.sum(-1, keepdims=True)
    different = (counts > 0).sum(-1, keepdims=True)
    lower = np.broadcast_to(lower, counts.shape)
    return np.where(total > 0, (counts + different * lower) / np.maximum(total + different, 1), lower)
