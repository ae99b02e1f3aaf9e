"""What `bench engine` asks of the engine beside tokens: the time of each device program."""

import pytest
import tiny

from hybrimoe_jax.bench.contenders import device_kernel_seconds


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral"])
def test_every_program_of_a_decode_step_is_timed(family):
    engine = tiny.engine(family, cache_ratio=0.5, system="ktransformers")
    seconds = device_kernel_seconds(engine, repeats=2)
    assert set(seconds) == {"front", "shared", "expert", "head"}
    assert all(seconds[name] > 0 for name in ("front", "expert", "head"))
    assert (seconds["shared"] > 0) == (family == "qwen2_moe")
