"""`python -m hybrimoe_jax.generate` as a user runs it: its output and its exit code."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys

import golden
import pytest
import tiny_checkpoint
from generate_cases import VIRTUAL, one_line, parsed, runner

from hybrimoe_jax import cli, generate
from hybrimoe_jax.checkpoint.reader import Checkpoint
from hybrimoe_jax.decide import POLICIES, PREDICTORS, SCHEDULERS
from hybrimoe_jax.decide.systems import PREFETCH_MODES, SYSTEMS
from hybrimoe_jax.machine.profile import PROFILES
from hybrimoe_jax.machine.shapes import SHAPES
from hybrimoe_jax.trace.file import load_trace

PROMPT = "héllo the and"
KEYS = {
    *("token_ids", "ttft_s", "tbt_ms", "compile_s", "hit_rate", "misses", "bytes_h2d", "prefetch", "lanes", "system"),
    *("executor", "cache_ratio", "clock", "peak_device_bytes"),
}
TOKENS = 24
# As a user's shell has it: the tests' own division of the cores is not inherited.
ENVIRONMENT = {
    key: value
    for key, value in os.environ.items()
    if key not in ("NPROC", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "PYTHONPATH")
}


@pytest.fixture(scope="module")
def decode():
    backend = tiny_checkpoint.tokenizer()
    return lambda ids: backend.decode(ids, skip_special_tokens=True)


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    """Measured and written by the first run, read by the others."""
    return tmp_path_factory.mktemp("profile") / "machine.json"


@pytest.fixture(scope="module")
def command(checkpoint, profile):
    """Runs the command on the checkpoint -> the finished process, outputs as bytes."""

    def run(*flags, model=checkpoint):
        base = ["--model", str(model), "--host-kernel", "reference", "--profile", str(profile)]
        return subprocess.run(
            [sys.executable, "-m", "hybrimoe_jax.generate", *base, *map(str, flags)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=180,
            env=ENVIRONMENT,
        )

    return run


@pytest.fixture
def here(checkpoint, profile, first, in_process):
    """The same in this process, which saves a start."""
    return runner(in_process, checkpoint, profile)


@pytest.fixture(scope="module")
def first(command, tmp_path_factory):
    """The run that the others are compared with; it writes the profile, a trace and a timeline."""
    folder = tmp_path_factory.mktemp("records")
    files = ("--trace", folder / "trace.npz", "--timeline", folder / "timeline.json")
    done = command("--prompt", PROMPT, "--max-tokens", TOKENS, "--stats", "json", *files)
    return *parsed(done), folder


def test_the_last_line_holds_the_statistics(first, profile):
    _, stats, _ = first
    golden.check(stats)
    assert stats.keys() >= KEYS
    assert len(stats["token_ids"]) == stats["new_tokens"] == TOKENS and stats["finish_reason"] == "length"
    assert stats["tbt_ms"].keys() >= {"median", "p90"} and 0 < stats["tbt_ms"]["median"] <= stats["tbt_ms"]["p90"]
    assert stats["prefetch"].keys() >= {"issued", "useful", "late", "wasted"}
    assert (stats["system"], stats["executor"], stats["clock"]) == ("hybrimoe", "overlapped", "wall")
    assert stats["cache_ratio"] == 0.25 and stats["prompt_tokens"] > len(PROMPT) / 2
    assert 0 < stats["ttft_s"] < 60 and stats["compile_s"] > 0 and stats["peak_device_bytes"] > 0
    assert json.loads(profile.read_text())["expert_bytes"] == stats["costs"]["expert_bytes"]


def test_the_text_is_the_decoded_tokens(first, decode):
    text, stats, _ = first
    assert text == decode(stats["token_ids"])


def test_the_trace_loads_and_agrees_with_the_statistics(first):
    _, stats, folder = first
    trace = load_trace(folder / "trace.npz")
    steps = trace.step.max() + 1
    assert steps == TOKENS, "one prefill step and a decode step for every token but the first"
    activated = {(s, layer, e) for s, layer, ids in zip(trace.step, trace.layer, trace.ids, strict=True) for e in ids}
    assert len(activated) == stats["hits"] + stats["misses"]
    assert (trace.facts.layers, trace.facts.experts, trace.facts.top_k) == (3, 8, 2)


def test_the_timeline_is_trace_event_json_with_an_event_for_every_expert(first):
    _, stats, folder = first
    events = json.loads((folder / "timeline.json").read_text())["traceEvents"]
    lanes = {}
    for event in events:
        if event["ph"] == "X":
            assert event["dur"] >= 0 and event["ts"] >= 0
            lanes.setdefault(event["cat"], []).append(event["name"])
    assert len(lanes.get("cpu", [])) == stats["cpu_experts"]
    assert sum(name.startswith("expert") for name in lanes["device"]) == stats["device_experts"]
    fetches = sum(name.startswith("fetch") for name in lanes.get("link", []))
    assert fetches == stats["demand_fetches"]


@pytest.mark.parametrize(
    "system", [("--executor", "dense"), ("--system", "on-demand", "--cache-ratio", "0.5", "--debug")]
)
def test_other_executors_and_systems_give_the_same_tokens(system, here, first):
    text, stats = parsed(here("--prompt", PROMPT, "--max-tokens", TOKENS, "--stats", "json", *system))
    assert stats["token_ids"] == first[1]["token_ids"] and text == first[0]
    assert stats.keys() >= KEYS


@pytest.mark.slow
def test_a_budget_of_memory_and_of_threads_gives_the_same_tokens(command, first):
    flags = ("--vram-budget", "48MiB", "--cache", "lru", "--scheduler", "released", "--lazy", "--verify")
    done = command("--prompt", PROMPT, "--max-tokens", TOKENS, "--stats", "json", "--threads", 1, *flags)
    text, stats = parsed(done)
    assert stats["token_ids"] == first[1]["token_ids"] and text == first[0]
    assert stats.keys() >= KEYS
    assert stats["cores"]["total"] == 1 and stats["peak_device_bytes"] <= 24 * 2**20


@pytest.mark.slow
def test_the_callback_executor_gives_the_same_tokens_and_a_timeline_of_transfers_and_blocks(command, first, tmp_path):
    path = tmp_path / "timeline.json"
    flags = ("--executor", "callback", "--system", "hybrimoe", "--cache-ratio", "0.5", "--timeline", path)
    text, stats = parsed(command("--prompt", PROMPT, "--max-tokens", TOKENS, "--stats", "json", *flags))
    assert stats["token_ids"] == first[1]["token_ids"] and text == first[0]
    assert stats.keys() >= KEYS
    names = [event["name"].split()[0] for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
    assert names.count("fetch") == stats["demand_fetches"]
    assert names.count("moe") == 3 * TOKENS, "one block a layer and step"


def test_text_goes_to_stdout_and_statistics_to_stderr(here, first, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
    done = here("--prompt", "-", "--max-tokens", TOKENS)
    assert done.returncode == 0 and done.stdout.decode() == first[0] + "\n"
    stderr = done.stderr.decode()
    assert all(word in stderr for word in ("hit rate", "prefetches", "wall clock", "device memory"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_reply_is_whole_where_standard_error_cannot_be_written(here, first, monkeypatch):
    kept = os.dup(2)
    with contextlib.suppress(OSError), open("/dev/full", "w") as full:  # closing it tries once more
        monkeypatch.setattr(sys, "stderr", full)
        os.dup2(full.fileno(), 2)
        try:
            done = here("--prompt", PROMPT, "--max-tokens", TOKENS)
        finally:
            os.dup2(kept, 2)
            os.close(kept)
    assert done.returncode == 0 and done.stdout.decode() == first[0] + "\n"


def test_a_stop_string_and_silence(here, first, decode):
    ids = first[1]["token_ids"]
    end = next(i for i in range(4, TOKENS) if decode(ids[i : i + 2]).isascii() and decode(ids[i : i + 2]).strip())
    stop = decode(ids[end : end + 2])
    done = here("--prompt", PROMPT, "--max-tokens", TOKENS, "--stats", "none", "--stop", "never", "--stop", stop)
    assert done.returncode == 0 and done.stderr == b""
    assert done.stdout.decode() == first[0][: first[0].index(stop)] + "\n"


def test_endings_and_templates_come_from_the_checkpoints_files(here, checkpoint, first, decode, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    (model / "chat_template.jinja").write_text("{% for m in messages %}Q: {{ m.content }}\nA:{% endfor %}")
    _, chat = parsed(here("--prompt", PROMPT, "--max-tokens", 2, "--stats", "json", model=model))
    assert chat["prompt_tokens"] == len(tiny_checkpoint.tokenizer().encode(f"Q: {PROMPT}\nA:").ids)

    ids = first[1]["token_ids"]
    end = next(i for i in range(3, TOKENS) if ids[i] not in ids[:i])
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [262, ids[end]]}))
    flags = ("--prompt", PROMPT, "--max-tokens", TOKENS, "--stats", "json", "--ignore-chat-template")
    text, plain = parsed(here(*flags, model=model))
    assert plain["token_ids"] == ids[: end + 1] and plain["finish_reason"] == "eos"
    assert text == decode(ids[:end])


def test_a_checkpoint_without_a_tokenizer_takes_and_gives_ids(here, checkpoint, tmp_path, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    text, stats = parsed(here("--prompt-ids", "1, 2,3", "--max-tokens", 4, "--stats", "json", model=model))
    assert text == ",".join(map(str, stats["token_ids"])) and stats["prompt_tokens"] == 3
    monkeypatch.delattr(Checkpoint, "experts")
    done = here("--prompt", "x", model=model)
    assert one_line(done) and b"--prompt-ids" in done.stderr


def test_ctrl_c_prints_what_there_is(checkpoint, profile, decode, first):
    """The text so far is already there (it streams), the statistics follow, and the exit code is 130."""
    flags = ["--model", str(checkpoint), "--host-kernel", "reference", "--profile", str(profile)]
    flags += ["--prompt", PROMPT, "--max-tokens", "4000", "--stats", "json"]
    with subprocess.Popen(
        [sys.executable, "-m", "hybrimoe_jax.generate", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    ) as process:
        shown = process.stdout.read(20)
        assert process.poll() is None and len(shown) == 20, "text must come while the program runs"
        process.send_signal(signal.SIGINT)
        rest, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in stderr
    text, line = (shown + rest).decode().removesuffix("\n").rsplit("\n", 1)
    stats = json.loads(line)
    assert stats["finish_reason"] == "interrupted" and 0 < len(stats["token_ids"]) < 4000
    assert stats["token_ids"][:TOKENS] == first[1]["token_ids"][: len(stats["token_ids"])]
    assert decode(stats["token_ids"]).startswith(text.rstrip("\ufffd")) and text


MOMENTS = {
    "the prompt is read": "hybrimoe_jax.generate.read_prompt",
    "the checkpoint is opened": "hybrimoe_jax.checkpoint.reader.open_checkpoint",
    "weights are read": "hybrimoe_jax.checkpoint.reader.Checkpoint.dense",
    "the engine is made": "hybrimoe_jax.engine.engine.assemble",
    "the prompt is computed": "hybrimoe_jax.engine.steps.layered.LayeredForward.front",
    "a token is chosen": "hybrimoe_jax.engine.sampling.Sampler.__call__",
    "files are written": "hybrimoe_jax.engine.recording.EngineTrace.save",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_at_any_moment_is_no_traceback(moment, here, tmp_path, monkeypatch):
    """The exit code is 130; what is printed on the way stays what it is."""

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(cli.os, "_exit", leave)
    monkeypatch.setattr(MOMENTS[moment], interrupted)
    done = here("--prompt", PROMPT, "--max-tokens", 4, "--stats", "json", "--trace", tmp_path / "trace.npz")
    assert done.returncode == 130 and b"Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [] or "token" in moment
    for line in done.stdout.splitlines():
        assert not line.startswith(b"{") or json.loads(line)["finish_reason"] == "interrupted"


def test_the_help_names_everything_that_is_registered(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100000")
    words = set(generate.parser().format_help().replace(",", " ").split())
    live = {*SYSTEMS, *POLICIES, *SCHEDULERS, *PREFETCH_MODES, *PROFILES, *PREDICTORS, *SHAPES} - {"perfect"}
    assert live - words == set()


def test_a_run_goes_on_from_a_saved_state(here, tmp_path, monkeypatch):
    """The same tokens; and a state of another system is refused before weights are read."""
    state, flags = tmp_path / "s.npz", (*VIRTUAL, "--max-tokens", "6", "--stats", "json", "--cache-ratio", "0.5")
    saved = parsed(here(*flags, "--save-cache-state", state))[1]
    warm = parsed(here(*flags, "--load-cache-state", state))[1]
    assert warm["token_ids"] == saved["token_ids"]
    assert warm["hits"] + warm["misses"] == saved["hits"] + saved["misses"]
    monkeypatch.delattr(Checkpoint, "experts")
    done = here(*flags, "--load-cache-state", state, "--cache", "lru")
    assert one_line(done) and b"its cache is 'mrs'; this run's is 'lru'" in done.stderr
