"""Every command's results: refused before anything is read or run, written into what is no plain file."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import stat
import threading

import numpy as np
import pytest
from checkpoint_folders import CONFIG

from hybrimoe_jax.__main__ import command_main
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.models.registry import parse_config
from hybrimoe_jax.trace.columns import Trace
from hybrimoe_jax.trace.facts import MODELS
from hybrimoe_jax.trace.file import load_trace, save_trace

OUTPUTS = {
    "generate --prompt x --model gone": ("--trace", "--timeline", "--save-cache-state", "--profile"),
    "trace record --prompts gone --model gone": ("--out",),
    "trace import gone": ("",),
    "trace export gone --to csv": ("",),
    "trace export gone --to esft": ("",),
    "simulate --trace gone": ("--out", "--timeline", "--save-cache-state", "--plots"),
    "calibrate --model gone": ("--out", "--plot"),
    "convert gone": ("",),
    "export-hf gone": ("",),
    "train --text gone": ("--run",),
    "reproduce": ("--docs", "--results"),
    "bench engine --models bundled --no-baseline": ("--workdir",),
    "bench e2e --quick": ("--workdir",),
    "bench llamacpp": ("--workdir",),
}
ALL = [(command, flag) for command, flags in OUTPUTS.items() for flag in flags]


def run(line: str) -> int | None:
    command, *arguments = line.replace("export-hf", "convert --export-hf").split(" ")
    return command_main(command)([word.replace("<empty>", "") for word in arguments])


@pytest.mark.parametrize(("command", "flag"), ALL, ids=lambda words: words)
@pytest.mark.parametrize(
    "path", ["/proc/nowhere/x.npz", "<empty>", "/dev/null/x.png", "y" * 300 + ".png"], ids=range(4)
)
def test_what_cannot_be_written_is_refused_before_what_is_read(command, flag, path):
    with pytest.raises(UserError) as refused:
        run(f"{command} {flag} {path}".replace("  ", " "))
    message = str(refused.value)
    assert "gone" not in message and (flag.strip("-") in message or "destination" in message), message


def trace(path, model_type="toy", **about):
    model = MODELS["gpt-oss-20b"]
    facts, steps = dataclasses.replace(model, model_type=model_type), 4
    counted = np.repeat(np.arange(steps, dtype=np.int32), model.layers)
    rows = len(counted)
    columns = {"layer": np.tile(np.arange(model.layers, dtype=np.int32), steps), "sequence": np.zeros(rows, np.int32)}
    ids, weights = np.tile(np.arange(4, dtype=np.int32), (rows, 1)), np.full((rows, 4), 0.25, np.float32)
    phase = np.ones(rows, np.uint8)
    save_trace(
        Trace(facts, step=counted, position=counted, phase=phase, ids=ids, weights=weights, about=about, **columns),
        path,
    )
    return path


SIMULATE = "simulate --systems on-demand --cache-ratios 0.5 --starts cold --shape gpt-oss-20b --trace"


@pytest.mark.parametrize(
    ("line", "begins"),
    [
        (SIMULATE + " {trace} --out {pipe}", b'{"'),
        (SIMULATE + " {trace} --timeline {pipe}", b'{"traceEvents"'),
        ("trace import {trace} {pipe}", b"PK"),
        ("trace export {trace} {pipe} --to csv", b"# {"),
        ("trace export {trace} {pipe} --to route-csv", b"# route_trace"),
    ],
)
def test_a_pipe_is_written_into(line, begins, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    got = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    assert run(line.format(trace=trace(tmp_path / "t.npz"), pipe=tmp_path / "pipe")) == 0
    reader.join()
    assert got[0].startswith(begins) and stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)


CLASHES = (
    SIMULATE + " {t} --out {t}",
    SIMULATE + " {t} --out {o} --timeline {o}",
    SIMULATE + " {t} --load-cache-state {s} --out {s}",
    SIMULATE + " {t} --predictor recorded:{s} --out {s}",
    SIMULATE + " {t} --cache {s}:Mine --timeline {s}",
    SIMULATE + " {t} --profile laptop-8gb,{s} --out {s}",
    "calibrate --device paced:{s}:2 --out {s}",
    "trace record --prompts {t} --chat-template {s} --out {s}",
    "trace record --prompts {s} --out {s}",
    *(
        f"generate --prompt x {reads} --{writes} {{s}}"
        for writes in ("trace", "timeline")
        for reads in (
            "--load-cache-state {s}",
            "--tools {s}",
            "--documents {s}",
            "--chat-template {s}",
            "--predictor recorded:{s}",
            "--cache {s}:Mine",
            "--device paced:{s}",
            "--profile {s}",
        )
    ),
    "trace import {t} {t}",
    "trace export {t} {t} --to csv",
    "generate --prompt x --trace {o} --timeline {o}",
    "generate --prompt x --model {m} --trace {t}",
)


@pytest.mark.parametrize("line", CLASHES)
def test_nothing_that_is_read_or_written_is_written_over(line, tmp_path):
    path, state = trace(tmp_path / "t.npz"), tmp_path / "s"
    state.write_text("mine")
    with pytest.raises(UserError, match=r"(one of the files to read|is written there, too)"):
        run(line.format(t=path, s=state, o=tmp_path / "o", m=tmp_path))
    assert state.read_text() == "mine"
    assert load_trace(path).facts.model_type == "toy" and sorted(os.listdir(tmp_path)) == ["s", "t.npz"]


def test_a_picture_of_no_kind_is_refused_before_the_machine_is_measured(tmp_path):
    with pytest.raises(UserError, match=r"--plot .*x.docx: no picture ends so; end its name in one of .*png"):
        run(f"calibrate --model gone --plot {tmp_path}/x.docx")


def test_what_a_trace_says_is_printed_as_text(tmp_path, capsys):
    """Also in a file of lines: a name there is not a line of its own."""
    path = trace(tmp_path / "a\x1b[2J.npz", model="x\n9,9,9,\x1b\ud800")
    run(f"trace info {path}")
    table, record = capsys.readouterr().out.rsplit("\n", 2)[:2]
    assert "\x1b" not in table and "a\\x1b[2J.npz" in table and json.loads(record)["file"] == str(path)
    run(f"trace export {path} {tmp_path}/r.csv --to route-csv")
    assert (tmp_path / "r.csv").read_text().split("\n")[1].startswith("# model=toy arch=toy")
    for name in ("evil\x1b]0;title\x07", "x" * 1_000_000, ""):
        with pytest.raises(UserError, match=r"model_type is .*; a name is needed") as refused:
            trace(tmp_path / "t.npz", name)
        assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    "line", [SIMULATE + " {pipe}", "trace check {pipe}", "generate --prompt x --load-cache-state {pipe}"]
)
def test_a_pipe_is_not_waited_for_where_a_file_is_read_in_parts(line, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: no plain file"):
        run(line.format(pipe=tmp_path / "pipe"))


def test_a_folder_of_weights_has_a_name_of_utf8(tmp_path):
    """TensorStore takes no other."""
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    os.mkdir(path)
    (pathlib.Path(path) / "manifest.json").write_text("{}")
    for line in (f"convert gone {path}/out", f"generate --prompt x --model {path}"):
        with pytest.raises(UserError, match=r"caf\\udce9.*: not UTF-8 text"):
            run(line)


HOSTILE = "\x1b[2J\u202e" + "x" * 1_000_000


@pytest.mark.parametrize("value", [HOSTILE, [HOSTILE] * 9, {HOSTILE: HOSTILE}], ids=["text", "list", "object"])
def test_what_a_config_says_is_quoted_short_printable_and_with_its_key(value):
    refused = 0
    for key in (*CONFIG, "rope_scaling", "layer_types", "quantization_config", "eos_token_id"):
        try:
            parse_config({**CONFIG, key: value})
        except UserError as error:
            message, refused = str(error), refused + 1
            assert key in message and len(message) < 800 and message.isprintable(), message[:2000]
    assert refused > 10


def test_names_of_an_index_are_quoted_short_and_printable(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for names in ({"w": HOSTILE}, {"w": HOSTILE + ".safetensors"}, {"w": "a\0.safetensors"}):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        with pytest.raises(UserError) as refused:
            run(f"convert {tmp_path} {tmp_path}/out")
        assert len(str(refused.value)) < 600 and str(refused.value).isprintable()
