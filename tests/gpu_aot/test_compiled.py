"""What a step's programs are once they are compiled for an H100: upper bounds, for all families at published sizes.

Bounds, not values: another version of XLA fuses a little differently. The values stand in docs/gpu.md.
"""

from __future__ import annotations

import measure
import pytest
import topology
from published import PUBLISHED

if (reason := topology.missing()) is not None:
    pytest.skip(reason, allow_module_level=True)

from step_programs import CONTEXT, STEPS, step_programs

MB = 1e6
CASES = [(model, step) for model in PUBLISHED for step in STEPS]
NAMES = [f"{model}-{step}".replace(" ", "-") for model, step in CASES]

BOUNDS = {
    "decode 1": {
        "embed": (1, 0.1),
        "front": (25, 2),
        "dense layer": (25, 2),
        "shared experts": (6, 0.2),
        "4 experts int4-g64": (10, 0.2),
        "4 experts bf16": (12, 1),
        "last logits": (4, 0.2),
    },
    "decode 8": {
        "embed": (1, 0.1),
        "front": (36, 14),
        "dense layer": (36, 100),
        "shared experts": (6, 1.2),
        "4 experts int4-g64": (16, 1),
        "4 experts bf16": (15, 6),
        "last logits": (4, 0.3),
    },
    "prefill 512": {
        "embed": (1, 0.1),
        "front": (30, 560),
        "dense layer": (30, 460),
        "shared experts": (6, 40),
        "an expert int4-g64": (15, 280),
        "an expert bf16": (8, 50),
        "last logits": (4, 0.2),
    },
}
"""Most kernels and most temporary megabytes of a program, by step and part."""


@pytest.mark.parametrize(("model", "step"), CASES, ids=NAMES)
def test_a_step_s_programs_compile_within_bounds(model, step):
    measured = [measure.measure(program) for program in step_programs(model, step)]
    measure.save(model, step, measured)
    for program in measured:
        kernels, megabytes = BOUNDS[str(step)][program.part]
        assert program.kernels <= kernels, program
        assert program.temporary <= megabytes * MB, program
        if step.tokens == 1:
            assert program.copies == 0, program  # attention reads its cache where it lies


@pytest.mark.parametrize("model", ["DeepSeek-V2-Lite", "Mixtral-8x7B"])
def test_a_quarter_of_the_cache_is_not_copied_either(model):
    (front,) = (p for p in step_programs(model, STEPS[0], CONTEXT // 4) if p.part == "front")
    measured = measure.measure(front)
    assert measured.copies == 0 and measured.temporary <= 0.6 * MB
