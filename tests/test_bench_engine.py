"""What `bench engine` asks of the engine beside tokens: the time of each device program."""

import pytest
import tiny

from hybrimoe_jax.bench.contenders import device_kernel_seconds
from hybrimoe_jax.bench.engine import processor


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
