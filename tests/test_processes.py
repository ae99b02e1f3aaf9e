"""What is decided once per process, so each case is one: how many executables serve all lengths, and one core for
everything.

As a program this file runs the case named on its command line and prints one JSON object.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHUNK, CONTEXT = 32, 512
BATCHES = (1, 3)
SWEEP = (1, 2, 5, 15, 16, 17, 31, 32, 33, 40, 64, 65, 100, 200, 255, 256, 300, 450)
OTHERS = (3, 9, 20, 29, 37, 70, 130, 257, 333, 470)


def run(case: str, *arguments: str, timeout: int = 300) -> dict:
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, __file__, case, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def most_executables() -> int:
    """The most that an engine of one layer kind may ever need, whatever the prompts' lengths.

    T, tokens a row in a call: 1 (decode), and the chunk or a power of two from 16 below it: 16, 32. With 2 batch
    sizes that makes 6 shapes. The cache holds 256 or 512 tokens and attention reads 256 or 512 of them, at most all:
    3 pairs. A front is compiled with and without lookahead. Then, per shape, the embedding, the shared experts and
    the logits. Device experts: up to 8 rows, 1 to 4 slots in a call; above, one expert on its tokens gathered into a
    power of two from 8, at most all rows. These twice: experts that are fetched for a step come as the host's arrays
    on XLA's CPU backend.
    """
    tokens = [1, 16, 32]
    rows = [batch * t for batch in BATCHES for t in tokens]
    fronts = len(rows) * 3 * 2
    few = [n for n in rows if n <= 8]
    gathered = sum(len({min(8 << i, n) for i in range(8)}) for n in rows if n > 8)
    return fronts + 3 * len(rows) + 2 * (4 * len(few) + gathered)


def count_executables() -> dict:
    import tiny

    engine = tiny.engine("qwen2_moe", cache_ratio=0.5, prefill_chunk=CHUNK, max_context=CONTEXT)

    def sweep(lengths) -> int:
        for length in lengths:
            new = min(8, CONTEXT - length)
            for batch in BATCHES:
                prompts = tiny.prompts(engine.config, (length, *(max(1, length // 3), length)[: batch - 1]))
                engine.generate(prompts, max_new_tokens=new)
        return tiny.executables()

    first = sweep(SWEEP)
    return {"first": first, "then": sweep(OTHERS)}


@pytest.mark.slow
def test_few_executables_serve_all_lengths():
    counted = run("executables")
    assert counted["first"] <= counted["then"] <= most_executables() == 36 + 18 + 2 * (8 + 14)
    assert counted["then"] - counted["first"] <= 6, "other lengths in the same buckets compile again"


def generate_on_one_core(executor: str) -> dict:
    core = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})  # what `taskset -c` does, before anything else is imported
    for variable in ("NPROC", "OMP_NUM_THREADS"):
        os.environ.pop(variable, None)

    from hybrimoe_jax.engine.config import EngineConfig
    from hybrimoe_jax.engine.load import load

    engine = load(sys.argv[3], EngineConfig(executor=executor, cache_ratio=0.25, prefill_chunk=512))
    ids = [(7 * i) % engine.config.vocab_size for i in range(400)]
    out = engine.generate([ids], max_new_tokens=16)
    stats = out.stats.summary()
    return {"token_ids": out.token_ids, "cores": stats["cores"], "mixed": stats["cpu_experts"] > 0}


@pytest.fixture(scope="module")
def wide_checkpoint(tmp_path_factory):
    """Wide enough that a chunk's activations, 400 x 256 floats, are what callbacks were seen to hang on with one
    core."""
    import tiny
    import tiny_checkpoint

    with pytest.MonkeyPatch.context() as patch:
        shape = {"hidden_size": 256, "num_hidden_layers": 2, "vocab_size": tiny_checkpoint.VOCAB}
        patch.setitem(tiny.CONFIGS, "bytes", {**tiny.CONFIGS["qwen2_moe"], **shape})
        tiny.weights.cache_clear()
        folder = tiny_checkpoint.converted(tmp_path_factory.mktemp("wide"))
    tiny.weights.cache_clear()
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be taken away on this system")
def test_one_core_is_enough_for_every_executor(wide_checkpoint):
    answers = [run("one-core", executor, str(wide_checkpoint), timeout=120) for executor in ("overlapped", "callback")]
    for answer in answers:
        assert answer["token_ids"] == answers[0]["token_ids"]
        assert answer["cores"] == {"total": 1, "device": 1, "host": 1, "fixed": True}
        assert answer["mixed"], "no expert ran on the host"


if __name__ == "__main__":
    case = sys.argv[1]
    print(json.dumps(count_executables() if case == "executables" else generate_on_one_core(sys.argv[2])))
