"""What `bench engine` asks of the engine beside tokens: the time of each device program."""

import json

import pytest
import tiny

from hybrimoe_jax.bench import __main__ as bench
from hybrimoe_jax.bench.contenders import device_kernel_seconds
from hybrimoe_jax.bench.engine import MEASURES, SYSTEMS, processor


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral"])
def test_every_program_of_a_decode_step_is_timed(family):
    engine = tiny.engine(family, cache_ratio=0.5, system="ktransformers")
    seconds = device_kernel_seconds(engine, repeats=2)
    assert set(seconds) == {"front", "shared", "expert", "head"}
    assert all(seconds[name] > 0 for name in ("front", "expert", "head"))
    assert (seconds["shared"] > 0) == (family == "qwen2_moe")


def test_the_processor_is_named(tmp_path):
    """A cloud's virtual machines call several generations by one name."""

    def named(*lines: str) -> str:
        (tmp_path / "cpuinfo").write_text(
            "\n".join(["processor\t: 0", *lines, "", "processor\t: 1", "model name\t: another"])
        )
        return processor(str(tmp_path / "cpuinfo"))

    older = ("cpu family\t: 25", "model\t\t: 1", "model name\t: Some CPU @ 2.00GHz", "stepping\t: 1")
    newer = ("cpu family\t: 26", *older[1:])
    assert named(*older) == "Some CPU @ 2.00GHz cpu family 25 model 1 stepping 1" != named(*newer)
    assert named("model name\t: Some CPU") == "Some CPU"
    assert processor(str(tmp_path / "absent"))  # what Python knows


@pytest.mark.slow
def test_every_contender_answers_alike_and_is_timed(checkpoint, tmp_path, in_process):
    """The whole command on a tiny model, beside transformers."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    flags = ("--rounds", "1", "--new", "4", "--threads", "1", "--cache-ratio", "0.5", "--workdir", tmp_path)
    done = in_process(bench.main, "engine", "--models", checkpoint, *flags)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.strip().splitlines()
    (result,) = json.loads(last)["results"]
    medians = result["medians"]
    peers = set(medians) - set(SYSTEMS)
    assert peers and all(name.startswith("transformers") for name in peers) and set(SYSTEMS) < set(medians)
    assert set(result["same_tokens"].values()) == {True}
    whole = [name for name in medians if len(medians[name]) == len(MEASURES)]
    assert set(SYSTEMS) < set(whole) and set(whole) & peers
    for measure, ratio in result["ratios"].items():
        best = min(medians[name][f"{measure}_ms"] for name in peers if f"{measure}_ms" in medians[name])
        assert ratio == pytest.approx(best / medians["hybrimoe"][f"{measure}_ms"])
    assert sum(name in line for name in medians for line in lines if line.endswith("yes")) >= len(medians)
