"""Sequences side by side: distinct experts counted one by one, and what chance would give."""

from __future__ import annotations

import itertools
import json

import golden
import numpy as np
import pytest
from test_trace_command import recorded

from hybrimoe_jax.__main__ import command_main
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.trace.columns import Trace
from hybrimoe_jax.trace.concurrency import side_by_side
from hybrimoe_jax.trace.facts import TraceFacts
from hybrimoe_jax.trace.file import save_trace


def test_it_counts_as_one_would_by_hand(tmp_path, capsys):
    trace = recorded(((2, 3), (1, 1), (1, 1), (0, 1), (1, 1)))
    save_trace(trace, tmp_path / "t.npz")
    command_main("trace")(["overlap", str(tmp_path / "t.npz")])
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    golden.check(said)
    groups = [r for r in trace.records() if r.phase == "decode" and len(r.ids) > 1]
    distinct = [len(set(r.ids.ravel().tolist())) for r in groups]
    (row,) = said["side_by_side"]
    assert (row["sequences"], row["records"], row["asked"]) == (2, 9, 4)
    assert row["distinct"] == pytest.approx(np.mean(distinct))
    for layer in range(3):
        mine = [len(set(r.ids.ravel().tolist())) for r in groups if r.layer == layer]
        assert said["shared_by_layer"][layer] == pytest.approx(1 - np.mean(mine) / 4)


def test_chance_is_what_independent_sequences_show():
    """Of many sequences that choose by chance, uniformly or not, what is expected is what is counted."""
    rng, steps, width, facts = np.random.default_rng(0), 400, 4, TraceFacts("toy", 1, 12, 2)
    for skew in (0.0, 1.5):
        logits = skew * rng.standard_normal(12)
        ids = np.argsort(-(logits + rng.gumbel(size=(steps * width, 12))), axis=1)[:, :2]
        step, sequence = (a.ravel() for a in np.divmod(np.arange(steps * width), width))
        trace = Trace(facts, step, np.zeros_like(step), np.ones(len(step), np.uint8), sequence, step, ids)
        (row,) = side_by_side(trace)
        assert row.distinct == pytest.approx(row.popularity, rel=0.02)
        assert (row.uniform == pytest.approx(row.distinct, rel=0.02)) == (skew == 0)


def test_a_trace_without_such_steps_says_so(tmp_path):
    save_trace(recorded(((2, 3), (1, 0), (0, 1))), tmp_path / "t.npz")
    with pytest.raises(UserError, match=r"t.npz: overlap: no decode step has several sequences.* --batch 4"):
        command_main("trace")(["overlap", str(tmp_path / "t.npz")])


@pytest.mark.parametrize("column", ["step", "sequence"])
def test_marks_that_contradict_the_steps_are_refused(column, tmp_path):
    trace = recorded()
    trace.batch = trace.sequence.copy() if column == "step" else (trace.step > 1).astype(np.int32)
    row = next(i for i in itertools.count() if trace.batch[i])
    with pytest.raises(UserError, match=f"record {row} .*batch 1 is not that of its {column}"):
        save_trace(trace, tmp_path / "t.npz")
