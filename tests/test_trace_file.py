"""Traces: what was recorded is what is read, and a malformed file names its first bad record."""

from __future__ import annotations

import dataclasses
import json
import zipfile

import numpy as np
import pytest

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.trace.columns import Trace
from hybrimoe_jax.trace.facts import TraceFacts
from hybrimoe_jax.trace.file import load_trace, save_trace
from hybrimoe_jax.trace.recorder import TraceRecorder

FACTS = TraceFacts("qwen2_moe", layers=3, experts=8, top_k=2, expert_bytes={"f32": 4096, "int4": 640})


def routed(rng, tokens: int) -> dict:
    scores = rng.random((tokens, FACTS.experts)).astype(np.float32)
    ids = np.argsort(-scores, axis=1)[:, : FACTS.top_k]
    ahead = {d: rng.random((tokens, FACTS.experts)).astype(np.float32) for d in (1, 2)}
    return {"ids": ids, "weights": np.take_along_axis(scores, ids, 1), "scores": scores, "lookahead": ahead}


def recorded(scores: bool = True, lookahead: bool = True, seed: int = 0) -> tuple[TraceRecorder, list]:
    """Two ragged sequences: a prefill of 3 + 2 tokens, then two decode steps of 2 tokens."""
    rng = np.random.default_rng(seed)
    recorder, kept = TraceRecorder(FACTS, clock="wall", seed=seed), []
    passes = [("prefill", [0, 0, 0, 1, 1], [0, 1, 2, 0, 1]), ("decode", [0, 1], [3, 2]), ("decode", [0, 1], [4, 3])]
    for step, (phase, sequence, position) in enumerate(passes):
        recorder.next_step()
        for layer in range(FACTS.layers):
            row = routed(rng, len(sequence))
            if not scores:
                row.pop("scores")
            if not lookahead:
                row.pop("lookahead")
            recorder.add(layer, phase, sequence=sequence, position=position, **row)
            kept.append((step, layer, phase, sequence, position, row))
    return recorder, kept


def test_a_saved_trace_reads_back_record_by_record(tmp_path):
    recorder, kept = recorded()
    path = tmp_path / "run.npz"
    recorder.save(path)
    trace = load_trace(path)
    assert trace.facts == FACTS and trace.about == {"clock": "wall", "seed": 0} and len(trace) == 27
    got = list(trace.records())
    assert len(got) == len(kept) == 9
    for record, (step, layer, phase, sequence, position, row) in zip(got, kept):
        assert (record.step, record.layer, record.phase) == (step, layer, phase)
        assert record.sequence.tolist() == sequence and record.position.tolist() == position
        assert np.array_equal(record.ids, row["ids"]) and np.array_equal(record.weights, row["weights"])
        assert np.array_equal(record.scores, row["scores"])
        assert sorted(record.lookahead) == [d for d in (1, 2) if layer + d < FACTS.layers]
        assert all(np.array_equal(record.lookahead[d], row["lookahead"][d]) for d in record.lookahead)
    assert trace.ids.dtype == np.int32 and trace.scores.dtype == np.float32 and trace.phase.dtype == np.uint8


def test_what_was_not_recorded_is_absent_not_faked(tmp_path):
    recorder, _ = recorded(scores=False, lookahead=False)
    recorder.save(tmp_path / "t.npz")
    trace = load_trace(tmp_path / "t.npz")
    assert trace.scores is None and trace.lookahead == {}
    assert all(r.scores is None and r.lookahead == {} for r in trace.records())


def test_scores_of_some_steps_only_are_none_in_the_others(tmp_path):
    recorder, _ = recorded()
    recorder.next_step()
    recorder.add(0, "decode", sequence=[0], position=[5], ids=[[1, 2]])
    recorder.save(tmp_path / "t.npz")
    *_, before, last = load_trace(tmp_path / "t.npz").records()
    assert before.scores is not None and before.weights is not None
    assert last.scores is None and last.lookahead == {} and np.isnan(last.weights).all()


def test_the_recorder_copies_what_it_is_given():
    recorder = TraceRecorder(FACTS)
    ids = np.array([[1, 2]])
    recorder.add(0, "decode", sequence=[0], position=[0], ids=ids)
    ids[:] = 7
    assert recorder.trace().ids.tolist() == [[1, 2]]


def test_an_empty_trace_is_refused(tmp_path):
    with pytest.raises(UserError, match="it is empty: no token was recorded"):
        TraceRecorder(FACTS).save(tmp_path / "t.npz")
    write_raw(TraceRecorder(FACTS).trace(), tmp_path / "t.npz")
    with pytest.raises(UserError, match="it is empty: no token was recorded"):
        load_trace(tmp_path / "t.npz")


def test_additions_of_other_programs_survive(tmp_path):
    trace = recorded()[0].trace()
    trace.extra["landed"] = np.arange(27) * 0.5
    save_trace(trace, tmp_path / "t.npz")
    assert np.array_equal(load_trace(tmp_path / "t.npz").extra["landed"], np.arange(27) * 0.5)


@pytest.mark.parametrize(
    "name, array, said",
    [
        ("\ud800", np.zeros(1), "an addition is named .*give it a short, printable name"),
        ("a" * 70_000, np.zeros(1), "70,002 characters.*give it a short, printable name"),
        ("a", np.array([None]), "array x_a holds object; a NumPy array of numbers or texts is needed"),
        ("a", np.array(["a"], np.dtypes.StringDType()), "array x_a holds StringDType"),
        ("a", [1, 2], "array x_a holds list"),
    ],
)
def test_additions_that_no_file_holds_are_refused(tmp_path, name, array, said):
    with pytest.raises(UserError, match=said):
        save_trace(dataclasses.replace(recorded()[0].trace(), extra={name: array}), tmp_path / "t.npz")


def test_additions_of_any_shape_go_with_a_selection():
    trace = dataclasses.replace(recorded()[0].trace(), extra={"text": np.array("hello"), "row": np.arange(27)})
    part = trace.select(trace.step == 0)
    assert part.extra["text"] == "hello" and len(part.extra["row"]) == len(part) < 27


def with_row(column: str, row, value, dtype=None) -> dict:
    changed = np.array(getattr(recorded()[0].trace(), column), dtype)
    changed[row] = value
    return {column: changed}


@pytest.mark.parametrize(
    "change, said",
    [
        (
            with_row("ids", 16, [8, 1]),
            r"record 16 \(step 1, layer 0, sequence 1, position 2\): expert id 8 is outside 0..7",
        ),
        (with_row("ids", 4, [5, 5]), r"record 4 .*an expert twice among \[5, 5\]"),
        (with_row("ids", 4, [-1, 5]), r"record 4 .*expert id -1 is outside"),
        (with_row("layer", 26, 3), r"record 26 .*layer is outside 0..2"),
        (with_row("layer", 5, 0), r"record 5 .*(same token twice|later step or layer)"),
        (with_row("step", 0, 1), r"record 1 .*comes after a later step or layer"),
        (with_row("step", 0, -1), r"record 0 .*step is negative"),
        (with_row("phase", 17, 0), r"record 17 .*phase differs from the phase of its step"),
        (with_row("phase", 0, 2), r"record 0 .*phase is 2"),
        (with_row("phase", slice(5), -1, np.int64), r"record 0 .*phase is -1"),
        (with_row("sequence", 7, 2**32, np.int64), r"record 7 .*sequence 4294967296.*: sequence is above 2147483647"),
        (with_row("sequence", 7, 2**63 + 1, np.uint64), r"record 7 .*sequence is above 2147483647"),
        (with_row("step", slice(21, None), 2**33, np.int64), r"record 21 .*step is above 2147483647"),
        (with_row("position", 3, 2**31, np.int64), r"record 3 .*position is above 2147483647"),
        (with_row("position", 6, 0), r"record 6 .*the same token twice"),
        (with_row("position", 6, -3), r"record 6 .*position is negative"),
        (with_row("weights", 9, [0.5, np.inf]), r"record 9 .*weights \[0.5, inf\]"),
        (with_row("weights", 9, [0.5, -0.5]), r"record 9 .*weights"),
        (with_row("scores", 11, [0.5] * 7 + [np.nan]), r"record 11 .*scores are not all finite"),
        ({"lookahead": {1: np.zeros((27, 8), np.float32)}}, r"record 10 .*lookahead_1 predicts a layer past the last"),
        ({"ids": np.zeros((27, 3), np.int32)}, r"array ids has shape \[27, 3\]; \[27, 2\] is needed"),
        ({"scores": np.zeros((27, 9), np.float32)}, r"array scores has shape \[27, 9\]; \[27, 8\]"),
        ({"position": np.zeros(26, np.int32)}, r"array position has shape \[26\]; \[27\]"),
        ({"sequence": np.zeros(27)}, "array sequence holds float64; integers are needed"),
        ({"weights": np.ones((27, 2), np.int32)}, "array weights holds int32; floats are needed"),
    ],
)
def test_the_first_bad_record_is_named(tmp_path, change, said):
    good = recorded()[0].trace()
    bad = dataclasses.replace(good, **change)
    path = tmp_path / "bad.npz"
    with pytest.raises(UserError, match=said):
        save_trace(bad, path)
    assert not any(tmp_path.iterdir())
    write_raw(bad, path)
    with pytest.raises(UserError, match=rf"^trace .*bad\.npz: .*{said}"):
        load_trace(path)


def write_raw(trace: Trace, path, meta: dict | None = None, **arrays) -> None:
    """A file as another program might have written it, unchecked."""
    facts = {**dataclasses.asdict(trace.facts), "expert_bytes": dict(trace.facts.expert_bytes)}
    meta = {"format": "hybrimoe-trace", "version": 1, "facts": facts, **(meta or {})}
    names = ("step", "layer", "phase", "sequence", "position", "ids", "weights", "scores")
    columns = {name: getattr(trace, name) for name in names}
    columns |= {f"lookahead_{d}": a for d, a in trace.lookahead.items()}
    columns = {name: array for name, array in {**columns, **arrays}.items() if array is not None}
    np.savez(path, meta=np.array(json.dumps(meta)), **columns)


def test_of_several_bad_records_the_first_is_named(tmp_path):
    trace = recorded()[0].trace()
    trace.ids[20] = [9, 1]
    trace.weights[13] = -1
    trace.scores[25] = np.inf
    with pytest.raises(UserError, match="record 13 "):
        save_trace(trace, tmp_path / "t.npz")


@pytest.mark.parametrize(
    "meta, arrays, said",
    [
        ({"format": "other"}, {}, "its format is 'other'"),
        ({"version": 3}, {}, r"version 3 is not supported \(this program reads 1, 2\)"),
        ({"facts": {"model_type": "x"}}, {}, "its facts must be model_type, layers, experts, top_k"),
        ({"facts": {"model_type": "x", "layers": 0, "experts": 4, "top_k": 1}}, {}, "layers is 0; a positive integer"),
        ({"facts": {"model_type": "x", "layers": 1, "experts": 4, "top_k": 5}}, {}, "top_k is 5 of only 4 experts"),
        ({"facts": {"model_type": "x", "layers": 10**9, "experts": 4, "top_k": 1}}, {}, "layers is above 4096"),
        ({"facts": {"model_type": "x", "layers": 10**30, "experts": 4, "top_k": 1}}, {}, "layers is above 4096"),
        (
            {"facts": {"model_type": "x", "layers": 4096, "experts": 257, "top_k": 1}},
            {},
            "4096 layers of 257 experts are above 1048576 experts together",
        ),
        ({}, {"x_" + "a" * 300: np.zeros(3)}, "an addition is named 'x_aaa.*give it a short, printable name"),
        ({"about": {"a": [float("nan")]}}, {}, "not the JSON of a trace"),
        ({}, {"lookahead_²": np.zeros((27, 8), np.float32)}, "unknown array 'lookahead_²'"),
        ({}, {f"lookahead_{10**20}": np.full((27, 8), np.nan, np.float32)}, "unknown array 'lookahead_1000"),
        ({}, {"step": None, "ids": None}, "lacks the arrays step, ids"),
        ({}, {"surprise": np.zeros(3)}, "unknown array 'surprise'"),
        ({}, {"step": np.array(3)}, r"array step has shape \[\]"),
    ],
)
def test_wrong_archives_are_refused(tmp_path, meta, arrays, said):
    path = tmp_path / "t.npz"
    write_raw(recorded()[0].trace(), path, meta, **arrays)
    with pytest.raises(UserError, match=said):
        load_trace(path)


def test_files_that_are_no_trace_are_one_clear_error(tmp_path):
    path = tmp_path / "t.npz"
    with pytest.raises(UserError, match=r"t\.npz: cannot be read \(No such file"):
        load_trace(path)
    path.write_text("hello")
    with pytest.raises(UserError, match=r"not a readable .npz"):
        load_trace(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"not a readable .npz"):
        load_trace(path)
    np.save(tmp_path / "one.npy", np.arange(3))
    with pytest.raises(UserError, match="a single array"):
        load_trace(tmp_path / "one.npy")
    np.savez(path, ids=np.arange(3))
    with pytest.raises(UserError, match="no `meta` text"):
        load_trace(path)
    np.savez(path, meta=np.array("{nonsense"))
    with pytest.raises(UserError, match="not the JSON of a trace"):
        load_trace(path)
    head = '{"format": "hybrimoe-trace", "version": 1, "about": '
    for text in ("[" * 100_000 + "]" * 100_000, "1e999"):
        np.savez(path, meta=np.array(head + text + "}"))
        with pytest.raises(UserError, match="not the JSON of a trace"):
            load_trace(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("step.npy", b"not an array")
    with pytest.raises(UserError, match=r"t.npz"):
        load_trace(path)
    pickled = np.array([{"a": 1}], dtype=object)
    np.savez(path, meta=pickled)
    with pytest.raises(UserError, match=r"not a readable .npz"):
        load_trace(path)


def test_damage_anywhere_is_an_error_or_harmless(tmp_path):
    """Truncations and flipped bytes all over the file: a UserError, or exactly the trace that was saved."""
    recorder, _ = recorded()
    path, hurt = tmp_path / "t.npz", tmp_path / "hurt.npz"
    recorder.save(path)
    whole, good = path.read_bytes(), load_trace(path)
    rng = np.random.default_rng(0)
    cases = [whole[:n] for n in rng.integers(0, len(whole), 40)]
    for at in rng.integers(0, len(whole), 120):
        flipped = bytearray(whole)
        flipped[at] ^= 0x5A
        cases.append(bytes(flipped))
    refused = 0
    for data in cases:
        hurt.write_bytes(data)
        try:
            trace = load_trace(hurt)
        except UserError as error:
            assert str(error).startswith(f"trace {hurt}") and "\n" not in str(error)
            refused += 1
            continue
        assert trace.facts == good.facts and np.array_equal(trace.ids, good.ids)
        assert np.array_equal(trace.scores, good.scores) and np.array_equal(trace.step, good.step)
    assert refused > 100


def test_saving_twice_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        recorded()[0].save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    with pytest.raises(UserError, match="cannot be written"):
        recorded()[0].save(tmp_path / "none" / "a")


def test_facts_and_about_are_checked():
    with pytest.raises(UserError, match=r"experts is 2.5"):
        TraceFacts("x", layers=1, experts=2.5, top_k=1)
    with pytest.raises(UserError, match="expert_bytes"):
        TraceFacts("x", layers=1, experts=2, top_k=1, expert_bytes={"f32": 0})
    for about in ({"made": object()}, {"rate": float("nan")}):
        with pytest.raises(UserError, match="`about` holds something"):
            save_trace(dataclasses.replace(recorded()[0].trace(), about=about), "never-written.npz")
