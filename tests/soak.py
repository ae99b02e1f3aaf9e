"""A long run over systems, cache ratios, batches and samplings: memory, threads, files and arrays stay flat.

    python tests/soak.py [--tokens 50000] [--seed 0]

Engines come and go, in passes over all cases; each answers batches greedily, draws others, leaves a stream where it is
and runs two in turns. Greedy answers are the dense model's, also the last ones. One JSON object on stdout; exit code 1,
and a line for each, where something grows or differs. Growth is what is held in the last third of the run against the
middle one. A first pass, which compiles, does not count.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ["HYBRIMOE_START_CACHE"] = "off"

import jax
import tiny
from test_fused_decode import all_on_cpu_costs

from hybrimoe_jax.checkpoint.convert import return_freed_memory
from hybrimoe_jax.decide.systems import SYSTEMS
from hybrimoe_jax.host_kernels.native import ffi

RATIOS = (0.25, 0.5, 0.75)
LENGTHS = ((20,), (20, 9, 14))
SAMPLINGS: tuple[dict[str, Any], ...] = ({}, {"temperature": 0.8, "top_p": 0.9}, {"temperature": 1.2, "top_k": 5})
NEW = 12
WAYS = ({"slots": "stacked"}, {"clock": "virtual"}, {"format": "int4-g32"})


def cases() -> list[dict]:
    """Every system at every ratio, two of them in every way: after one pass nothing is compiled any more."""
    found: list[dict[str, Any]] = [
        {"system": system, "cache_ratio": ratio}
        for system in SYSTEMS
        if system != "oracle"
        for ratio in ((0.0,) if system == "cpu-only" else RATIOS)
    ]
    others: list[dict[str, Any]] = [{"system": system, **way} for system in ("hybrimoe", "adapmoe") for way in WAYS]
    if ffi.available():
        others.append({"system": "hybrimoe", "host_kernel": "native", "profile": all_on_cpu_costs(CONFIG)})
    return found + [{**case, "cache_ratio": ratio} for case, ratio in zip(others, itertools.cycle(RATIOS))]


CONFIG = tiny.weights("qwen2_moe")[0]
CASES = cases()
TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)
MEMORY = PROGRAM = 1 << 22
"""Bytes that memory may differ by between two thirds of a run, since what the allocator keeps comes and goes; and those
of a program that was compiled meanwhile: drawn tokens come to shapes of their own, of which there are few."""


def status() -> dict[str, int]:
    """What the process holds between two engines, without what the allocator keeps for later."""
    gc.collect()
    if TRIM is not None:
        TRIM(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "memory": pages * os.sysconf("SC_PAGE_SIZE"),
        "threads": len(os.listdir("/proc/self/task")),
        "files": len(os.listdir("/proc/self/fd")),
        "arrays": len(jax.live_arrays()),
        "programs": tiny.executables(),
    }


class Soak:
    def __init__(self, seed: int):
        self.rng, self.made, self.answers = random.Random(seed), 0, 0
        self.prompts = {lengths: tiny.prompts(CONFIG, lengths) for lengths in LENGTHS}
        self.wanted: dict = {}
        for format in ("f32", "int4-g32"):
            dense = tiny.engine(executor="dense", format=format)
            for lengths, prompts in self.prompts.items():
                self.wanted[format, lengths] = dense.generate(prompts, max_new_tokens=NEW).token_ids
            dense.close()

    def run(self, case: dict) -> list[str]:
        """One engine's life -> what was wrong."""
        wrong, format = [], case.get("format", "f32")
        with tiny.engine(**case) as engine:
            for lengths, sampling in itertools.product(LENGTHS, SAMPLINGS):
                got = engine.generate(self.prompts[lengths], max_new_tokens=NEW, seed=self.made, **sampling).token_ids
                self.made += sum(map(len, got))
                self.answers += len(got)
                if not sampling and got != self.wanted[format, lengths]:
                    wrong.append(f"{case}: {got} are not the dense model's {self.wanted[format, lengths]}")
            self._streams(engine)
        return wrong

    def _streams(self, engine) -> None:
        """One is left where it is, two run in turns."""
        (prompt,) = self.prompts[LENGTHS[0]]
        left = engine.steps([prompt], max_new_tokens=NEW)
        self.made += sum(len(emitted.tokens) for emitted in itertools.islice(left, 5))
        turns = [engine.steps([prompt], max_new_tokens=8, temperature=0.7, seed=seed) for seed in range(2)]
        for emitted in itertools.chain.from_iterable(zip(*turns, strict=True)):
            self.made += len(emitted.tokens)


def grown(samples: list[dict[str, int]]) -> list[str]:
    """What is held more of in the last third than in the middle one."""
    third, found = len(samples) // 3, []
    if third < 2:
        return ["too short to tell whether anything grows"]
    for what in samples[0]:
        middle, last = [s[what] for s in samples[third : 2 * third]], [s[what] for s in samples[2 * third :]]
        more = statistics.median(last) - statistics.median(middle)
        if what == "memory":
            compiled = samples[-1]["programs"] - samples[third]["programs"]
            if more > MEMORY + compiled * PROGRAM:
                found.append(
                    f"memory grows: {more / 1e6:.1f} MB from the middle third of the run to the last, in which "
                    f"{compiled} programs were compiled"
                )
        elif what != "programs" and max(last) > max(middle):
            found.append(f"{what} grow: at most {max(middle)} in the middle third of the run, {max(last)} in the last")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=50_000, help="at least so many, in whole passes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    return_freed_memory()  # else each new thread may keep 1.6 MB of an allocator's arena of its own, up to 8 a core
    soak, samples, began = Soak(args.seed), [], time.monotonic()
    wrong = [what for case in CASES for what in soak.run(case)]  # which compiles
    warm = soak.made
    while soak.made < warm + args.tokens:
        for case in soak.rng.sample(CASES, len(CASES)):
            wrong += soak.run(case)
            samples.append(status())
            print(f"\r{soak.made - warm:,} tokens, {samples[-1]}", end="", file=sys.stderr)
    # The last pass is a whole one: every system's last answers have been compared.
    wrong += grown(samples)
    told = {"tokens": soak.made - warm, "answers": soak.answers, "engines": len(samples)}
    told |= {"seconds": round(time.monotonic() - began), "first": samples[0], "last": samples[-1]}
    told |= {f"most {what}": max(sample[what] for sample in samples) for what in samples[0]}
    print(json.dumps({**told, "wrong": wrong}))
    print("", *wrong, sep="\n", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
