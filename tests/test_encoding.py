"""Text that comes in is UTF-8 or refused by name; text that goes out gets out whatever the stream's encoding is."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from hybrimoe_jax import encoding, generate
from hybrimoe_jax.encoding import argument, decode, for_stream, read_stdin, read_text
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.files import LONGEST_JSON, read_json
from hybrimoe_jax.record import read_prompts
from hybrimoe_jax.records import read_records

BAD = {
    b"caf\xe9 x": r"byte 3 \(0xe9\) is not UTF-8 text; save it as UTF-8",
    b"cut \xf0\x9f\x99": r"byte 4 \(0xf0\) is not UTF-8 text",
    b"\xed\xa0\x80": r"byte 0 \(0xed\) is not UTF-8 text",  # a surrogate, encoded as if it were a character
    "x".encode("utf-16"): "it is UTF-16 text; save it as UTF-8",
    b"x\0y\0": "character 1 is NUL",
}


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("naïve 日本 🙂 \u2028 \ufffd".encode(), "naïve 日本 🙂 \u2028 \ufffd"),
        (b"\xef\xbb\xbfone\r\ntwo\rthree\x1b", "one\ntwo\nthree\x1b"),
        (b"", ""),
    ],
)
def test_what_is_utf8_is_taken(data, text, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(data)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "ascii"))
    assert decode(data, "x") == read_text(tmp_path / "file") == read_stdin() == text


@pytest.mark.parametrize(("data", "said"), BAD.items(), ids=repr)
def test_what_is_not_is_named_wherever_it_comes_from(data, said, tmp_path, monkeypatch):
    (tmp_path / "t.json").write_bytes(data)
    where = str(tmp_path / "t.json")
    for read in (read_text, read_json, read_prompts, read_records):
        with pytest.raises(UserError, match=f"t.json: {said}"):
            read(tmp_path / "t.json")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))
    with pytest.raises(UserError, match=f"standard input: {said}"):
        generate.main(["--prompt", "-", "--model", where])
    if b"\0" not in data:  # which no argument can hold
        for flags in (("--prompt", os.fsdecode(data)), ("--prompt", "x", "--stop", os.fsdecode(data))):
            with pytest.raises(UserError, match=f"{flags[-2]}: byte "):
                generate.main([*flags, "--model", where])


def test_an_argument_is_utf8_in_any_locale_and_kept_as_it_is(monkeypatch):
    assert argument("\ufeffé\r\n", "--stop") == "\ufeffé\r\n"
    monkeypatch.setattr(encoding.os, "fsencode", lambda text: text.encode("ascii", "surrogateescape"))
    assert argument("é".encode().decode("ascii", "surrogateescape"), "--prompt") == "é"  # as LC_ALL=C gives it
    with pytest.raises(UserError, match=r"--prompt: character 1 \('\\ud83d'\) is half a surrogate pair"):
        argument("x\ud83d", "--prompt")


def test_half_a_surrogate_pair_in_a_prompt_of_json_is_named(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "x\\ud83d"}\n')
    with pytest.raises(UserError, match=r"p.jsonl, line 2: its prompt: character 1 .*half a surrogate"):
        read_prompts(tmp_path / "p.jsonl")


def test_only_a_line_feed_ends_a_prompt(tmp_path):
    (tmp_path / "p.txt").write_text("one\u2028and\x0bmore\r\ntwo\n")
    assert read_prompts(tmp_path / "p.txt") == ["one\u2028and\x0bmore", "two"]


def test_what_is_no_file_of_text_is_one_error(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "LONGEST_TEXT", 1000)
    monkeypatch.setattr(encoding, "PATIENCE_S", 0.1)
    os.mkfifo(tmp_path / "pipe")
    places = {
        "/dev/zero": "it is longer than",
        tmp_path / "pipe": "a pipe into which nobody has written",
        tmp_path: "Is a directory",
        tmp_path / "gone": "no such file",
        "a\0b": "null byte",
    }
    for path, said in places.items():
        with pytest.raises(UserError, match=said):
            read_text(path)
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("é",))
    writer.start()
    assert read_text(tmp_path / "pipe") == "é"
    writer.join()


def test_a_json_file_longer_than_any_that_is_needed_is_not_parsed(tmp_path):
    (tmp_path / "long.json").touch()
    os.truncate(tmp_path / "long.json", LONGEST_JSON + 1)
    with pytest.raises(UserError, match=r"long\.json: it is longer than 64 MiB, the most that is read"):
        read_json(tmp_path / "long.json")


def test_a_standard_input_that_does_not_wait_is_read_to_its_end(tmp_path):
    reads, writes = os.pipe()
    os.set_blocking(reads, False)  # as a parent that is node or asyncio leaves it
    code = "from hybrimoe_jax.encoding import *; prepare_streams(); print('ready', flush=True); print(read_stdin())"
    with subprocess.Popen([sys.executable, "-c", code], stdin=reads, stdout=subprocess.PIPE, text=True) as process:
        os.close(reads)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(0.2)
        os.write(writes, b"My lord, ")
        time.sleep(0.2)
        os.write(writes, b"the rest")
        os.close(writes)
        assert process.stdout.read() == "My lord, the rest\n"


def test_a_standard_input_that_cannot_be_read_is_one_error(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="standard input: it is closed"):
        read_stdin()
    with open(tmp_path / "x", "w") as write_only:
        monkeypatch.setattr(sys, "stdin", write_only)
        with pytest.raises(UserError, match="standard input: cannot be read"):
            read_stdin()


SPEAKS = """
import json, os, sys
from hybrimoe_jax import cli
from hybrimoe_jax.errors import UserError
def main():
    print("caf\u00e9 \\ud83d \\udce9", flush=True)
    print(json.dumps({"text": "caf\u00e9 \\ud83d"}))
    own = os.open(os.devnull, os.O_RDONLY)
    print(own, flush=True)
    raise UserError("\u00e9 \\x1b[2J\\u202e" + "x" * 100_000)
cli.run(main)
"""


@pytest.mark.parametrize("name", ["ascii", "latin-1", "utf-16", "utf-8:strict", "ascii:replace"])
def test_any_text_gets_out_in_any_encoding(name):
    environment = {**os.environ, "PYTHONIOENCODING": name}
    done = subprocess.run([sys.executable, "-c", SPEAKS], capture_output=True, env=environment, timeout=60)
    out, said = (text.decode(name.partition(":")[0]) for text in (done.stdout, done.stderr))
    assert done.returncode == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert len(said) < 8000 and not {"\x1b", "\u202e"} & set(said) and "Traceback" not in said
    assert json.loads(out.splitlines()[1]) == {"text": "café \ud83d"}
    assert out.startswith({"ascii": r"caf\xe9 \ud83d", "ascii:replace": "caf? ?"}.get(name, r"café \ud83d"))


def test_without_standard_error_and_input_no_file_takes_their_place():
    done = subprocess.run(["/bin/sh", "-c", 'exec "$0" "$@" <&- 2>&-', sys.executable, "-c", SPEAKS],
                          stdout=subprocess.PIPE, text=True, timeout=60)  # fmt: skip
    assert done.returncode == 2
    assert int(done.stdout.splitlines()[2]) > 2 and len(done.stdout.splitlines()) == 3


def test_a_terminal_gets_no_control_characters_of_a_models_text():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    text = "a\x1b[2J\x9b\r\n\tb 👩\u200d🚀"
    assert for_stream(text, io.StringIO()) == text
    assert for_stream(text, Terminal()) == "a\\x1b[2J\\x9b\\r\n\tb 👩\u200d🚀"
