"""`python -m hybrimoe_jax.simulate` as a user runs it: table, records, timeline, one clear error for what cannot be."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import golden
import numpy as np
import pytest
from own_rules import Fading, Popular

from hybrimoe_jax import cli
from hybrimoe_jax.simulate import __main__ as simulate
from hybrimoe_jax.simulate import plots
from hybrimoe_jax.simulate.cases import Case, tokens_of, trace_names
from hybrimoe_jax.trace.columns import Trace
from hybrimoe_jax.trace.facts import MODELS
from hybrimoe_jax.trace.file import save_trace

SLOW = """
import os, time
from pathlib import Path
from hybrimoe_jax.simulate import grid
from hybrimoe_jax.simulate.cases import Case

def run_case(case):
    Path(case.trace, str(os.getpid())).touch()
    time.sleep(60)

def main(marks):
    grid.run_case = run_case
    list(grid.run_cases([Case(marks, "", "", ratio) for ratio in range(6)], jobs=2))
"""


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """Random routing of gpt-oss-20b's shape: five sequences of four tokens."""
    facts, generator = MODELS["gpt-oss-20b"], np.random.default_rng(0)
    rows = 20 * facts.layers
    ids = generator.random((rows, facts.experts)).argsort(axis=1)[:, : facts.top_k].astype(np.int32)
    step = np.repeat(np.arange(20), facts.layers).astype(np.int32)
    path = tmp_path_factory.mktemp("trace") / "t.npz"
    layer = np.tile(np.arange(facts.layers), 20).astype(np.int32)
    save_trace(Trace(facts, step, layer, np.ones(rows, np.uint8), step // 4, step % 4, ids), path)
    return str(path)


def command(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "hybrimoe_jax.simulate", *arguments], capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout, done.stderr


def test_a_table_for_people_and_a_record_for_every_run(trace, tmp_path):
    out, timeline = tmp_path / "r.jsonl", tmp_path / "t.json"
    systems = ["hybrimoe", "ktransformers", "on-demand", "freetoken"]
    code, text, error = command(
        "--trace", trace, "--systems", ",".join(systems), "--cache-ratios", "0.25,0.5", "--prompt-lengths", "8",
        "--prompts", "1",
        "--out", str(out), "--timeline", str(timeline), "--jobs", "2",
    )  # fmt: skip
    assert code == 0 and not error, error
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(records) == len(systems) * 2 * 2 * 2
    assert {(r["system"], r["cache_ratio"], r["start"], r["prompt_tokens"]) for r in records} == {
        (s, ratio, start, n) for s in systems for ratio in (0.25, 0.5) for start in ("warm", "cold") for n in (None, 8)
    }
    for record in records:
        golden.check(record)
        assert record["clock"] == "virtual" and record["versions"]["hybrimoe_jax"] and record["choices"]["cache"]
        assert record["seconds_per_step"]["mean"] > 0 and record["steps"] == (
            20 if record["prompt_tokens"] is None else 2
        )
        assert record["profile"] == "a6000-engineered" and record["model"] == "gpt-oss-20b"
    assert all(system in text for system in systems) and "simulated times" in text and "TTFT" in text
    events = json.loads(timeline.read_text())
    tracks = {e["args"]["name"] for e in events["traceEvents"] if e["name"] == "thread_name"}
    assert {"hybrimoe cpu", "on-demand link"} <= tracks and events["otherData"]["clock"] == "virtual"

    again = tmp_path / "again.jsonl"
    simulate.main(
        ["--trace", trace, "--systems", "hybrimoe", "--cache-ratios", "0.25", "--starts", "warm", "--out", str(again)]
    )
    same = json.loads(again.read_text())
    other = next(r for r in records if r["system"] == "hybrimoe" and r["prompt_tokens"] is None)
    assert {k: v for k, v in same.items() if k != "replay_cpu_s"} == {
        k: v for k, v in other.items() if k != "replay_cpu_s"
    }


def test_a_replaced_part_is_in_the_record(trace, tmp_path):
    out = tmp_path / "r.jsonl"
    flags = ["--systems", "hybrimoe", "--cache-ratios", "0.25", "--starts", "cold", "--steps", "3", "--out", str(out)]
    simulate.main(["--trace", trace, *flags, "--cache", "lru", "--scheduler", "fetch-misses"])
    (record,) = map(json.loads, out.read_text().splitlines())
    assert (record["choices"]["cache"], record["choices"]["scheduler"]) == ("lru", "fetch-misses")
    assert record["cpu_experts"] == 0 and record["steps"] == 6


def test_parts_that_cannot_be_replaced_are_said(trace, tmp_path, capsys):
    flags = ["--systems", "oracle,belady,hybrimoe", "--cache-ratios", "0.25", "--starts", "cold", "--steps", "2"]
    simulate.main(["--trace", trace, *flags, "--cache-scope", "pooled", "--cache", "lru", "--lookahead", "0"])
    note = "oracle, belady: parts are fixed: --cache, --lookahead, --cache-scope replaced nothing"
    assert note in capsys.readouterr().out
    simulate.main(["--trace", trace, *flags])
    assert "fixed" not in capsys.readouterr().out


def test_traces_that_end_alike_are_kept_apart(trace, tmp_path, capsys):
    from hybrimoe_jax.simulate.plots import _words

    for folder in ("d1/x", "d2/x"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "run.npz").write_bytes(Path(trace).read_bytes())
    paths = [str(tmp_path / folder / "run.npz") for folder in ("d1/x", "d2/x")]
    flags = ["--systems", "cpu-only", "--cache-ratios", "0.5", "--starts", "cold", "--steps", "1"]
    simulate.main(["--trace", *paths, *flags, "--out", str(tmp_path / "r.jsonl")])
    names = [json.loads(line)["trace"] for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert names == ["d1/x/run.npz", "d2/x/run.npz"]
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if "simulated times" in line] == names
    assert len(set(_words([*names, "d1/x/run.csv"]).values())) == 3
    assert trace_names(["a/x/run.npz", "x/run.npz", "run.npz"]) == {
        "a/x/run.npz": "a/x/run.npz", "x/run.npz": "x/run.npz", "run.npz": "run.npz"
    }  # fmt: skip
    assert trace_names(["/a/b/c/run.npz"]) == {"/a/b/c/run.npz": "c/run.npz"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--systems", "magic"], "system 'magic'"),
        (["--profile", "a7000"], "neither a known one"),
        (["--cache-ratios", "2"], "outside 0..1"),
        (["--cache-ratios", "half"], "not a number"),
        (["--format", "int5"], "weight format 'int5'"),
        (["--starts", "lukewarm"], "start 'lukewarm'"),
        (["--shape", "mixtral-8x7b"], "the trace has 24 of 32"),
        (["--out", "/no/such/folder/r.jsonl"], "there is no folder"),
        (["--jobs", "0"], "at least 1"),
        (["--as-recorded"], "carries no run"),
        (["--systems", ","], "is empty"),
        (["--prompt-lengths", "4096"], "do not hold a prompt"),
        (["--prompt-lengths", "inf"], "'inf' is not a number of tokens"),
        (["--prompt-lengths", "2,2.7"], "'2.7' is not a number of tokens"),
        (["--lookahead", "99"], "lookahead 99 is outside 0..8"),
        (["--lookahead", "1" + 23 * "0"], "is outside 0..8"),
    ],
)
def test_what_cannot_be_is_one_clear_error(trace, flags, message, capsys):
    from hybrimoe_jax.errors import UserError

    with pytest.raises(UserError, match=message):
        simulate.main(["--trace", trace, *flags])


@pytest.mark.parametrize("flag", ["--out", "--timeline", "--plots"])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(flag, trace, tmp_path, monkeypatch):
    from hybrimoe_jax.errors import UserError

    monkeypatch.setattr(simulate.grid, "run_cases", lambda *_: pytest.fail("it had begun"))
    (tmp_path / "file").write_text("mine")
    place = tmp_path / "file" if flag == "--plots" else tmp_path
    with pytest.raises(UserError, match=f"{flag} .* (give a file|is no folder)"):
        simulate.main(["--trace", trace, flag, str(place)])


def test_records_are_written_before_the_table_is_printed(trace, tmp_path, monkeypatch):
    def broken(records):
        raise BrokenPipeError

    monkeypatch.setattr(simulate, "table", broken)
    flags = ["--systems", "cpu-only", "--cache-ratios", "0.5", "--starts", "cold", "--steps", "1"]
    with pytest.raises(BrokenPipeError):
        simulate.main(["--trace", trace, *flags, "--out", str(tmp_path / "r.jsonl")])
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 1


def test_an_interrupt_ends_the_workers_too(tmp_path):
    marks = tmp_path / "marks"
    marks.mkdir()
    (tmp_path / "slow.py").write_text(SLOW)
    program = f"import slow, sys; from hybrimoe_jax import cli; cli.run(lambda: slow.main({str(marks)!r}))"
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            deadline = time.monotonic() + 60
            while len(list(marks.iterdir())) < 2 and time.monotonic() < deadline:
                time.sleep(0.05)
            os.killpg(process.pid, signal.SIGINT)
            _, error = process.communicate(timeout=30)  # the workers sleep for 60
            assert process.returncode == 130 and error == "interrupted\n"
            running = [int(mark.name) for mark in marks.iterdir()]
            assert len(running) == 2
            for worker in running:
                with pytest.raises(ProcessLookupError):
                    os.kill(worker, 0)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_pictures_are_written_and_hold_something(trace, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")
    from PIL import Image

    flags = [
        "--systems",
        "hybrimoe,on-demand,oracle",
        "--cache-ratios",
        "0.25,0.5",
        "--starts",
        "cold",
        "--prompt-lengths",
        "8",
    ]
    simulate.main(["--trace", trace, *flags, "--prompts", "1", "--plots", str(tmp_path / "p")])
    pictures = sorted(path.name.split("-")[0] for path in (tmp_path / "p").glob("*.png"))
    assert pictures == ["hits", "lanes", "lanes", "prediction", "tbt", "ttft"]
    for path in (tmp_path / "p").glob("*.png"):
        pixels = np.asarray(Image.open(path).convert("L"))
        assert pixels.shape[1] > 400 and pixels.std() > 10


def test_pictures_compare_what_is_asked_for(trace, monkeypatch):
    """Not a fixed few: rules of one's own too, however many."""
    plt = pytest.importorskip("matplotlib.pyplot", reason="the extra `plots` is not installed")
    policies = ["lru", Fading(decay=0.5), Fading(decay=0.9), "mrs:alpha=0.3", "random", "slru", "echo:window=9"]
    case = Case(trace, "a6000-paper", "hybrimoe", 0.5, steps=2, parts=(("cache", Fading), ("predictor", Popular)))
    monkeypatch.setattr(plots, "CAPACITIES", (0.25, 0.5))
    figure = plots.capacity(plt, case, policies)
    assert [line.get_label() for line in figure.axes[0].lines] == [*map(str, policies), "belady"]
    plt.close(figure)
    assert plots.asked([case], "cache", plots.POLICIES) == ["own_rules:Fading"]
    found = plots.recall_by_distance(tokens_of(trace), 3, 2, ["previous", Popular])
    assert list(found) == ["previous", "own_rules:Popular"] and all(found.values())


def test_without_matplotlib_plots_say_what_to_install(trace, monkeypatch):
    from hybrimoe_jax import figures
    from hybrimoe_jax.errors import UserError

    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="or the extra"):
        simulate.main(["--trace", trace, "--plots", "p"])


def test_a_file_that_is_no_trace_is_exit_code_2(tmp_path, capsys):
    (tmp_path / "x.npz").write_bytes(b"nothing")
    flags = ["--trace", str(tmp_path / "x.npz"), "--out", str(tmp_path / "r.jsonl")]
    with pytest.raises(SystemExit) as left:
        cli.run(lambda: simulate.main(flags))
    out, error = capsys.readouterr()
    assert left.value.code == 2 and not out and error.count("\n") == 1 and "not a trace" in error
    assert not (tmp_path / "r.jsonl").exists()
