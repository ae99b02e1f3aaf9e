"""Command lines: flags and values, sound and not, one or several at once.

A command ends with 0, or with 2 and one line on stderr and nothing on stdout. What `generate` says is what it says
without the flags, where they only place experts; what is printed for programs is JSON. A file that is written is whole,
a pipe stays one.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import random
import stat
import sys
import threading
from pathlib import Path

import tiny_checkpoint
from fuzz.mutate import brief
from fuzz.trace_files import small
from fuzz.worker import Case, Wrong, check_message

BAD = ("", " ", "x", "\x1b[31mred", "\udcff", "a" * 100_000, "../..", "-", "--", "\u202e", "1\n2", "é")
INTS = ("0", "-1", "1", "3", "2.5", "nan", "9" * 5000, str(2**63), "\uff11\uff12", "1_000", " 5 ", "0x10", "+4", *BAD)
FLOATS = ("0", "0.5", "1", "0.9", "-0.1", "2", "nan", "inf", "-inf", "1e308", "1e-310", "0,5", *BAD)
SYSTEMS = (
    "hybrimoe",
    "ktransformers",
    "fiddler",
    "llamacpp",
    "on-demand",
    "device-only",
    "cpu-only",
    "freetoken",
    *BAD,
)
CACHES = (
    "lru",
    "mrs",
    "lfu",
    "mrs:alpha=0.3",
    "mrs:alpha=nan",
    "mrs:alpha=",
    "mrs:x=1",
    "json:JSONDecoder",
    "a:b:c",
    *BAD,
)
SIZES = ("auto", "1GiB", "0", "-1", "1e9", "10KB", "1 GiB", "nan", "99999999999999GiB", *BAD)
OUTPUTS = ("<out>/t", "<out>/no/t", "<pipe>", "<out>", "<trace>/t", "", "<out>/" + "n" * 300)
PLACING = {
    "--system": SYSTEMS,
    "--cache-ratio": FLOATS,
    "--vram-budget": SIZES,
    "--cache": CACHES,
    "--cache-scope": ("pooled", "layer", *BAD),
    "--scheduler": ("hybrid", "greedy", "hybrimoe", "optimal", *CACHES),
    "--prefetch": ("impact", "next-layer", "none", *BAD),
    "--lookahead": ("adaptive", *INTS),
    "--predictor": ("co-activation", "previous", "recorded:<trace>", "recorded:", *BAD),
    "--executor": ("overlapped", "callback", "dense", *BAD),
    "--prefill-chunk": INTS,
    "--max-context": ("64", "4096", *INTS),
    "--max-batch": INTS,
    "--slots": ("separate", "stacked", *BAD),
    "--clock": ("wall", "virtual", *BAD),
    "--device": ("auto", "paced:laptop-8gb:nan", "paced:", "paced:x:2", *BAD),
    "--cost-shape": ("bundled", "mixtral-8x7b:int4-g64", "x:y", *BAD),
    "--profile": ("laptop-8gb", "<trace>", *(one for one in OUTPUTS if one != "<pipe>")),  # into which nobody writes
    "--seed": INTS,
    "--threads": ("1", "100000", *INTS),
    "--trace": OUTPUTS,
    "--timeline": OUTPUTS,
    "--save-cache-state": OUTPUTS,
    "--load-cache-state": ("<trace>", "<out>/none", *BAD),
}
DRAWING = {
    "--temperature": FLOATS,
    "--top-p": FLOATS,
    "--top-k": INTS,
    "--max-tokens": INTS,
    "--stop": (" ", "e", *BAD),
    "--prompt": BAD,
    "--prompt-ids": ("1,2", "1,,2", "-1", "99999", "1.5", "1;2", "9" * 5000, *BAD),
    "--model": ("<trace>", "<out>", "<hf>", *BAD),
    "--stats": ("text", "none", *BAD),
}
SIMULATING = {
    "--systems": ("hybrimoe", "on-demand,hybrimoe", ",", "oracle", "belady", *SYSTEMS),
    "--cache-ratios": ("0.25,0.5", *FLOATS),
    "--profile": ("a6000-engineered", "<trace>", *BAD),
    "--format": ("int4", "int4-g64", "bf16", "int3", *BAD),
    "--steps": INTS,
    "--prompt-lengths": ("1,2", *INTS),
    "--prompts": INTS,
    "--jobs": ("1", "0", "-1", *BAD),
    "--lookahead": ("adaptive", *INTS),
    "--cache": CACHES,
    "--predictor": ("co-activation", *BAD),
    "--scheduler": CACHES,
    "--starts": ("cold", "warm,cold", *BAD),
    "--shape": ("bundled", "mixtral-8x7b", *BAD),
    "--trace": ("synthetic:mixtral-8x7b", "synthetic:", "synthetic:bundled:tokens=nan", "<out>", "<hf>", *BAD),
    "--out": OUTPUTS,
    "--timeline": OUTPUTS,
}
CONVERTING = {
    "--format": ("int4-g64", "int8-g8", "bf16", "f32", "f16", "int4-g0", "int4-g999999999999", *BAD),
    "--dense-format": ("int8-g8", "bf16", *BAD),
    "--calibrate": ("<trace>", "<out>", *BAD),
    "--zip": (None,),
    "--random": (None,),
    "--export-hf": (None,),
    "--seed": INTS,
}
ALONE = ("<trace>", "<hf>", "<out>", "<out>/none", *BAD)


class Kind:
    """Commands of which a run takes little time."""

    def __init__(self, base: Path):
        from hybrimoe_jax.trace.file import save_trace

        self.places = {"<hf>": str(base / "hf"), "<trace>": str(base / "trace.npz")}
        checkpoint = tiny_checkpoint.converted(base / "model")
        (base / "model" / "hf").rename(base / "hf")
        save_trace(small(6, 32, 4), base / "trace.npz")
        costs = base / "costs.json"
        generate = [
            "generate",
            "--model",
            str(checkpoint),
            "--prompt",
            "the and",
            "--max-tokens",
            "6",
            "--stats",
            "json",
        ]
        generate += ["--threads", "1", "--host-kernel", "reference", "--start-cache", "off", "--profile", str(costs)]
        simulate = ["simulate", "--trace", "<trace>", "--shape", "bundled", "--steps", "2", "--systems", "on-demand"]
        self.commands = (
            (generate, PLACING),
            (generate, PLACING),
            (generate, DRAWING),
            ([*simulate, "--cache-ratios", "0.5", "--profile", "laptop-8gb"], SIMULATING),
            (["convert", "<hf>", "<out>/made"], CONVERTING),
            (["trace", "info", "<trace>"], {}),
            (["trace", "check", "<trace>"], {}),
            (["trace", "import", "<trace>", "<out>/t.npz"], {}),
            (["trace", "export", "<trace>", "<out>/t.csv"], {"--to": ("csv", "jsonl", "esft", "parquet", *BAD)}),
        )
        self.reference = None
        self.reference = self.said(generate, 0)["token_ids"]

    def case(self, rng: random.Random, folder: Path) -> Case:
        base, options = rng.choice(self.commands)
        line, added = list(base), []
        if not options or rng.random() < 0.1:
            words = ("--no-such-flag", "--help=", "-x", "--model")
            added = [rng.choice(words if line[1] in ("import", "export") else (*BAD, *words))]
            if not options and rng.random() < 0.7:
                line[2:3] = added = [rng.choice(ALONE)]
                added = []
        else:
            for flag in rng.sample(list(options), min(len(options), rng.choice((1, 1, 2, 3)))):
                value = rng.choice(options[flag])
                added += [flag] if value is None else rng.choice(([flag, value], [f"{flag}={value}"]))
        places = self.places | {"<out>": str(folder / "out"), "<pipe>": str(folder / "out" / "pipe")}
        whole = [*line, *added]
        for name, place in places.items():
            whole = [word.replace(name, place) for word in whole]
        placing = base[0] == "generate" and options is PLACING
        return Case(
            f"{line[0]}: {brief(whole[1:]) if not added else brief(added)}", lambda: self.run(whole, folder, placing)
        )

    def run(self, line: list[str], folder: Path, placing: bool) -> None:
        pipe = folder / "out" / "pipe"
        if str(pipe) in " ".join(line):
            os.mkfifo(pipe)
            threading.Thread(target=pipe.read_bytes, daemon=True).start()
        try:
            found = self.said(line, None)
        finally:
            if pipe.exists():
                if not stat.S_ISFIFO(os.lstat(pipe).st_mode):
                    raise Wrong("a pipe is replaced by a file")
                with contextlib.suppress(OSError):
                    os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))  # lets go who still reads
        parts = [p for p in folder.rglob("*.part")]
        if parts:
            raise Wrong(f"{parts[0].name} is left behind")
        ids = found.get("token_ids")
        if placing and ids is not None and self.reference is not None and ids != self.reference[: len(ids)]:
            raise Wrong(f"tokens {ids}, without the flags {self.reference}")

    def said(self, line: list[str], want: int | None) -> dict:
        """The last line of JSON that a command prints; UserError for what it refuses as a command must."""
        from hybrimoe_jax import cli
        from hybrimoe_jax.__main__ import main
        from hybrimoe_jax.errors import UserError

        out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
        streams, freeze, gc.freeze = (sys.stdin, sys.stdout, sys.stderr), gc.freeze, lambda: None
        sys.stdin, sys.stdout, sys.stderr = io.TextIOWrapper(io.BytesIO(b"the \xff\xe9"), "utf-8"), out, err
        code: object = None
        try:
            cli.run(lambda: main(line))
        except SystemExit as end:
            code = end.code
        finally:
            (sys.stdin, sys.stdout, sys.stderr), gc.freeze = streams, freeze
        text, lines = out.buffer.getvalue().decode(), err.buffer.getvalue().decode(errors="replace").splitlines()
        errors = [one for one in lines if not one.startswith("warning: ")]
        if code == 2:
            if len(errors) != 1 or not errors[0].startswith("error: ") or text:
                raise Wrong(f"exit code 2 with {brief(text)} on stdout and {brief(errors)} on stderr")
            check_message(errors[0], ())
            raise UserError(errors[0])
        if code != 0 or any("Traceback" in one for one in errors):
            raise Wrong(f"exit code {code}, {brief(errors[-3:])}")
        last = text.strip().splitlines()[-1:] or [""]
        assert want in (None, 0)
        return json.loads(last[0], parse_constant=refuse_constant) if last[0].startswith("{") else {}


def refuse_constant(name: str) -> None:
    raise Wrong(f"{name} in what is to be JSON")
