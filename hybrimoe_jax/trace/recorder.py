"""Collecting a run's routing, step by step, into a trace."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from hybrimoe_jax.trace.columns import PHASES, Trace, stack_lookahead, stack_rows
from hybrimoe_jax.trace.facts import TraceFacts
from hybrimoe_jax.trace.file import save_trace


class TraceRecorder:
    """Collects a run's routing.

    Call `next_step` before each forward pass and `add` per MoE layer in order, then `save`.

    Args: facts; `about`: what the file says of its origin (clock, system, seed ...), JSON values.
    """

    def __init__(self, facts: TraceFacts, **about: Any):
        self.facts, self.about = facts, about
        self.step = -1
        self._rows: list[tuple] = []
        self._notes: dict[str, list[tuple[int, ...]]] = {}

    def __len__(self) -> int:
        """Rows so far."""
        return sum(len(row[3]) for row in self._rows)

    def next_step(self) -> None:
        """A new forward pass begins."""
        self.step += 1

    def add(
        self, layer: int, phase: str, *, sequence, position, ids, weights=None, scores=None, lookahead=None, batch=None
    ) -> None:
        """One MoE layer of the current step. The arrays are copied.

        Args:
          layer: counted over MoE layers, from 0.
          phase: "prefill" or "decode".
          sequence, position: [N] integers.
          ids, weights: [N, k].
          scores: [N, E].
          lookahead: distance -> [N, E], the prediction for layer + distance.
          batch: the number of the batch that these sequences run in, if that is known.
        """
        copies = (np.array(sequence, np.int32), np.array(position, np.int32), np.array(ids, np.int32))
        floats = [None if a is None else np.array(a, np.float32) for a in (weights, scores)]
        ahead = {d: np.array(a, np.float32) for d, a in (lookahead or {}).items() if layer + d < self.facts.layers}
        self._rows.append((max(self.step, 0), layer, PHASES.index(phase), *copies, *floats, ahead, batch))

    def trace(self) -> Trace:
        """What has been recorded so far."""
        rows, facts = self._rows, self.facts
        sizes = [len(row[3]) for row in rows]

        def column(index: int, dtype) -> np.ndarray:
            return np.repeat(np.array([row[index] for row in rows], dtype), sizes)

        empty = np.zeros(0, np.int32)
        return Trace(
            facts,
            column(0, np.int32),
            column(1, np.int32),
            column(2, np.uint8),
            np.concatenate([row[3] for row in rows]) if rows else empty,
            np.concatenate([row[4] for row in rows]) if rows else empty,
            np.concatenate([row[5] for row in rows]) if rows else np.zeros((0, facts.top_k), np.int32),
            stack_rows([row[6] for row in rows], sizes, facts.top_k),
            stack_rows([row[7] for row in rows], sizes, facts.experts),
            stack_lookahead([row[8] for row in rows], sizes, facts.experts),
            dict(self.about),
            {name: np.array(rows, np.int32) for name, rows in self._notes.items() if rows},
            column(9, np.int32) if all(row[9] is not None for row in rows) else None,
        )

    def note(self, name: str, row: tuple[int, ...]) -> None:
        """Adds a row to the extra array `x_<name>`; its first number is the step it belongs to."""
        self._notes.setdefault(name, []).append(row)

    def drop_from(self, step: int) -> None:
        """Forgets all of the steps from this one on; the next forward pass gets its number."""
        self._rows = [row for row in self._rows if row[0] < step]
        self._notes = {name: [row for row in rows if row[0] < step] for name, rows in self._notes.items()}
        self.step = min(self.step, step - 1)

    def save(self, path: str | os.PathLike) -> None:
        """Writes what has been recorded so far; see `save_trace`."""
        save_trace(self.trace(), path)
