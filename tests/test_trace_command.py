"""`python -m hybrimoe_jax.trace` as a user runs it, its figures against naive counting; damaged files too."""

from __future__ import annotations

import functools
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import golden
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from public_traces import ESFT, GPT_OSS, esft_folder, fingerprint_json, route_csv, routing

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.trace.__main__ import main
from hybrimoe_jax.trace.facts import TraceFacts
from hybrimoe_jax.trace.file import save_trace
from hybrimoe_jax.trace.importers import open_trace
from hybrimoe_jax.trace.info import info, lacks
from hybrimoe_jax.trace.recorder import TraceRecorder
from hybrimoe_jax.trace.tokens import REPLAYED, by_token, one_token_steps


def command(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "hybrimoe_jax.trace", *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def here(in_process):
    """The same in this process, which saves a start."""
    return functools.partial(in_process, main)


def recorded(steps=((2, 3), (1, 1), (1, 1)), layers=3, experts=8, top_k=2, seed=0):
    """Two sequences with scores and lookahead: prefill, then decode; `steps`: tokens of each sequence in a step."""
    rng = np.random.default_rng(seed)
    recorder = TraceRecorder(TraceFacts("toy", layers, experts, top_k), clock="virtual")
    position = [0, 0]
    for number, counts in enumerate(steps):
        recorder.next_step()
        sequence = np.repeat([0, 1], counts)
        at = np.concatenate([np.arange(p, p + n) for p, n in zip(position, counts)])
        position = [p + n for p, n in zip(position, counts)]
        for layer in range(layers):
            scores = rng.random((len(at), experts)).astype(np.float32)
            ids = np.argsort(-scores, axis=1)[:, :top_k]
            ahead = {d: rng.random((len(at), experts)).astype(np.float32) for d in (1, 2)}
            weights = np.take_along_axis(scores, ids, 1)
            phase = "decode" if number else "prefill"
            recorder.add(
                layer, phase, sequence=sequence, position=at, ids=ids, weights=weights, scores=scores, lookahead=ahead
            )
    return recorder.trace()


def written(layout: str, folder: Path) -> Path:
    """A sound file (or folder) of a layout."""
    if layout == "native":
        save_trace(recorded(), folder / "t.npz")
        return folder / "t.npz"
    if layout == "route":
        return route_csv(folder / "t.route.csv")
    if layout == "route.gz":
        return route_csv(folder / "t.route.csv.gz")
    ids, weights = routing(ESFT if layout.startswith("esft") else GPT_OSS, 4)
    lengths = np.array([3, 1])
    if layout == "esft":
        return esft_folder(folder / "task", ids, weights, lengths)
    if layout == "esft.npz":
        np.savez(folder / "t.npz", expert_ids=ids, weights_e4=weights, seq_lens=lengths)
    elif layout == "fingerprint.npz":
        np.savez(folder / "t.npz", expert_ids=ids, probs=weights / 1e4, seq_lens=lengths)
    else:
        return fingerprint_json(folder / "t.json", ids, weights / 1e4)
    return folder / "t.npz"


LAYOUTS = ("native", "route", "route.gz", "esft", "esft.npz", "fingerprint", "fingerprint.npz")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_truncated_file_is_refused_and_other_damage_never_crashes(layout, tmp_path):
    path = written(layout, tmp_path)
    sound = open_trace(path)
    file = path / "expert_weights_3.txt" if path.is_dir() else path
    whole = file.read_bytes()

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.integers(0, len(whole) - 1), st.binary(min_size=1, max_size=4), st.booleans())
    def damaged(at, other, cut):
        file.write_bytes(whole[:at] if cut else whole[:at] + other + whole[at + len(other) :])
        try:
            trace = open_trace(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            return
        if cut:  # only whole steps can be missing from a text that has no end mark
            assert layout == "route" and len(trace) < len(sound) and len(trace) % 5 in (0, 3)
            assert np.array_equal(trace.ids, sound.ids[: len(trace)])

    damaged()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_imports_to_a_trace_that_checks(layout, tmp_path, here):
    path = written(layout, tmp_path)
    done = (command if layout == "native" else here)("import", path, tmp_path / "out.npz")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    golden.check(said)
    sound, back = open_trace(path), open_trace(tmp_path / "out.npz")
    assert said["rows"] == len(back) == len(sound) and said["lacks"] == lacks(sound)
    for column in ("step", "layer", "phase", "sequence", "position", "ids", "weights"):
        assert np.array_equal(getattr(back, column), getattr(sound, column))
    assert back.about == sound.about and back.facts == sound.facts


def test_bad_files_are_one_line_and_exit_2(tmp_path, here):
    trace = recorded()
    good = tmp_path / "good.npz"
    save_trace(trace, good)
    arrays = dict(np.load(good))
    arrays["ids"][17] = [9, 1]
    np.savez(tmp_path / "bad.npz", **arrays)
    (tmp_path / "empty").mkdir()
    (tmp_path / "words.txt").write_text("nothing of the kind\n")
    (tmp_path / "one.json").write_text('{"a": 1}')
    np.savez(tmp_path / "strange.npz", rows=np.zeros(3))
    ids, _ = routing(ESFT, 2)
    np.savez(tmp_path / "lens.npz", expert_ids=ids, weights_e4=ids, seq_lens=[1, 2])
    cases = {
        ("check", "bad.npz"): r"record 17 \(step 1, layer 1, sequence 0, position 2\): expert id 9 is outside 0..7",
        ("check", "none.npz"): r"cannot be read \(No such file",
        ("info", "empty"): "without expert_weights_",
        ("info", "words.txt"): "not a trace; this program reads",
        ("check", "one.json"): "no `router_data`",
        ("info", "strange.npz"): "no known layout has the arrays rows",
        ("check", "lens.npz"): "seq_lens must hold positive integers that add up to 2",
    }
    for (what, name), said in cases.items():
        done = (command if name == "bad.npz" else here)(what, tmp_path / name)
        assert done.returncode == 2 and done.stdout == "", done
        assert re.fullmatch(rf"error: trace \S+{name}: .*{said}.*\n", done.stderr), done.stderr
    for what in ("check", "info", "overlap"):
        done = here(what, good, tmp_path / "bad.npz")
        assert done.returncode == 2 and done.stdout == "", "nothing is said of one file where another is refused"
    done = here("import", good, tmp_path / "bad.npz", tmp_path / "out.npz")
    assert done.returncode == 2 and not (tmp_path / "out.npz").exists()
    done = here("import", good, good)
    assert done.returncode == 2 and "another name" in done.stderr and len(open_trace(good)) == len(trace)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("n_layer=5 n_expert=16 n_expert_used=2", "n_layer=0 n_expert=16 n_expert_used=0", "layers is 0"),
        ("n_layer=5", "n_layer=99999999999", "layers is above 4096"),
        ("expert_bytes=1003", "expert_bytes=" + "9" * 400, "line 6: expert_bytes 9+ is outside"),
        (",1,1000\n", ",300,1000\n", "line 10: residency 300 is outside 0..127"),
        ("\n0,0,0,0,0,", "\n" + "9" * 20 + ",0,0,0,0,", "line 9: a number beyond 2147483647"),
        ("\n0,0,0,0,0,", "\n0,0,0,0,0," + "9" * 20, "line 9: a number beyond 2147483647"),
        ("\n0,1,", "\n0,-1,", "phase is -1"),
    ],
)
def test_a_route_trace_with_impossible_numbers_is_refused(old, new, said, tmp_path):
    path = route_csv(tmp_path / "t.route.csv")
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=f"t.route.csv: .*{said}"):
        open_trace(path)


def test_fingerprints_with_impossible_contents_are_refused(tmp_path):
    path = tmp_path / "t.json"
    ids, weights = routing(GPT_OSS, 1)
    fingerprint_json(path, ids, weights / 1e4, first=10**20 - 1)
    whole = path.read_text()
    for text, said in {"[]": "no reply", whole: "whole numbers", "[" * 100_000 + "]" * 100_000: "JSON"}.items():
        path.write_text(text)
        with pytest.raises(UserError, match=f"t.json: .*{said}"):
            open_trace(path)
    np.savez(tmp_path / "t.npz", expert_ids=ids.astype(np.int64) + 2**32, probs=weights / 1e4, seq_lens=[1])
    with pytest.raises(UserError, match=r"expert id 42949.* is outside 0..31"):
        open_trace(tmp_path / "t.npz")


def test_rows_missing_from_one_layer_are_noticed(tmp_path):
    trace = recorded()
    keep = np.arange(len(trace)) != 7
    save_trace(recorded(), tmp_path / "t.npz")
    arrays = {n: a[keep] if n != "meta" else a for n, a in np.load(tmp_path / "t.npz").items()}
    np.savez(tmp_path / "t.npz", **arrays)
    with pytest.raises(UserError, match=r"record 5 \(step 0, layer 1, .*not the tokens of its step"):
        open_trace(tmp_path / "t.npz")


def test_info_counts_as_one_would_by_hand(tmp_path, here):
    trace = recorded(steps=((6, 4), *[(1, 1)] * 9), seed=3)
    save_trace(trace, tmp_path / "t.npz")
    done = here("info", tmp_path / "t.npz")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    golden.check(said)
    assert said["steps"] == {"prefill": 1, "decode": 9} and said["tokens"] == {"prefill": 10, "decode": 18}
    assert said["lookahead"] == [1, 2] and said["lacks"] == [] and said["sequences"] == 2
    chosen = {}
    for row in range(len(trace)):
        chosen[int(trace.sequence[row]), int(trace.layer[row]), int(trace.position[row])] = set(trace.ids[row].tolist())
    shares = [len(e & chosen[s, l, p - 1]) / 2 for (s, l, p), e in chosen.items() if p]
    assert said["overlap"]["measured"] == pytest.approx(np.mean(shares))
    quarters, products = [], []
    for layer in range(3):
        used = [e for (_, l, _), es in chosen.items() if l == layer for e in es]
        counts = sorted((used.count(e) for e in range(8)), reverse=True)
        quarters.append(sum(counts[:2]) / len(used))
        products.append(sum((c / 28) ** 2 for c in counts) / 2)
    assert said["skew"]["hottest_quarter"] == pytest.approx(np.mean(quarters))
    assert said["overlap"]["popularity_chance"] == pytest.approx(np.mean(products))
    order = sorted({(int(a), int(b), int(c)) for a, b, c in zip(trace.sequence, trace.step, trace.position)})
    distances, firsts, uses = [], 0, 0
    for layer in range(3):
        walk = [chosen[s, layer, p] for s, _, p in order]
        for now, experts in enumerate(walk):
            for expert in experts:
                uses += 1
                before = [t for t in range(now) if expert in walk[t]]
                if not before:
                    firsts += 1
                    continue
                between = [walk[t] for t in range(before[-1] + 1, now)]
                distances.append(len(set().union(*between)))
    assert said["reuse_distance"]["median"] == sorted(distances)[(len(distances) - 1) // 2]
    assert said["reuse_distance"]["first_uses"] == pytest.approx(firsts / uses)
    right = [
        len(set(np.argsort(-r.lookahead[1][i])[:2].tolist()) & chosen[int(s), r.layer + 1, int(p)]) / 2
        for r in trace.records() if 1 in r.lookahead
        for i, (s, p) in enumerate(zip(r.sequence, r.position))
    ]  # fmt: skip
    assert said["router_reuse"]["1"] == pytest.approx(np.mean(right))


def test_what_is_absent_is_said(tmp_path):
    missing = lacks(open_trace(written("route", tmp_path)))
    assert [m.split(" (")[0] for m in missing] == ["full router scores", "lookahead predictions", "2 of 35"]
    assert "prefill steps" in lacks(open_trace(written("fingerprint", tmp_path)))
    assert any("decode steps" in m for m in info(open_trace(written("esft", tmp_path)))["lacks"])


def test_one_token_steps_keep_the_routing_and_say_what_they_are(tmp_path):
    trace = open_trace(written("esft.npz", tmp_path))
    split = one_token_steps(trace)
    assert [len(r.ids) for r in split.records()] == [1] * 4 * 26 and split.about["replayed"] == REPLAYED
    assert np.array_equal(by_token(split).ids, by_token(trace).ids)
    save_trace(split, tmp_path / "split.npz")
    mixed = recorded()
    alone = one_token_steps(mixed)
    assert np.unique(alone.step).tolist() == list(range(9)) and alone.about["replayed"] == REPLAYED
    assert set(zip(alone.sequence.tolist(), alone.position.tolist())) == set(itertools.product([0], range(4))) | set(
        itertools.product([1], range(5))
    )
    rows = {
        (int(s), int(p), int(l)): row for row, (s, p, l) in enumerate(zip(mixed.sequence, mixed.position, mixed.layer))
    }
    for row, key in enumerate(zip(alone.sequence.tolist(), alone.position.tolist(), alone.layer.tolist())):
        assert np.array_equal(alone.ids[row], mixed.ids[rows[key]])
        assert np.array_equal(alone.lookahead[1][row], mixed.lookahead[1][rows[key]], equal_nan=True)
    assert "replayed" not in one_token_steps(open_trace(written("fingerprint", tmp_path))).about
