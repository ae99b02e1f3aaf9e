"""What a step's programs are once they are compiled for an H100: upper bounds, for all families at published sizes.

Bounds, not values: another version of XLA fuses a little differently. The values stand in docs/gpu.md.
"""

from __future__ import annotations

import re

import jax
import measure
import pytest
import topology
from published import PUBLISHED

if (reason := topology.missing()) is not None:
    pytest.skip(reason, allow_module_level=True)

from step_programs import CONTEXT, STEPS, step_programs

from hybrimoe_jax.models.products import product
from hybrimoe_jax.models.target import traced_for

MB = 1e6
CASES = [(model, step) for model in PUBLISHED for step in STEPS]
NAMES = [f"{model}-{step}".replace(" ", "-") for model, step in CASES]

COMMON = {
    "embed": (1, 0.1),
    "write int4-g64": (9, 0.1),
    "write bf16": (10, 0.1),
    "last logits": (4, 0.3),
    "last token": (8, 5),
}
BOUNDS = {
    "decode 1": COMMON
    | {
        "front": (26, 2),
        "dense layer": (25, 2),
        "block int4-g64": (10, 0.3),
        "block bf16": (12, 1),
        "an expert int4-g64": (4, 0.2),
        "an expert bf16": (6, 0.4),
    },
    "decode 8": COMMON
    | {
        "front": (38, 14),
        "dense layer": (32, 100),
        "block int4-g64": (11, 2),
        "block bf16": (12, 5),
        "an expert int4-g64": (4, 1.2),
        "an expert bf16": (9, 260),
    },
    "prefill 512": COMMON
    | {
        "front": (32, 560),
        "dense layer": (30, 460),
        "shared experts": (6, 40),
        "an expert int4-g64": (18, 360),
        "an expert bf16": (10, 330),
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
        else:
            # As accurate as float32, on tensor cores; a router of fewer than 16 experts is left as it is.
            assert set(program.products) <= {"bf16x6", "f32"} and program.products.get("f32", 0) <= 1, program


@pytest.mark.parametrize(("setting", "instructions"), [(None, 6), ("bfloat16", 1)])
def test_a_prompt_s_product_is_made_of_tensor_core_instructions(setting, instructions, tmp_path):
    """By its PTX: as many bfloat16 products as the split has, none on ordinary cores."""
    with traced_for("gpu"), jax.default_matmul_precision(setting):
        traced = jax.jit(product).trace(topology.struct((512, 2048)), topology.struct((1408, 2048), "bfloat16"))
        lowered = traced.lower(lowering_platforms=("cuda",))
    lowered.compile(compiler_options={"xla_dump_to": str(tmp_path)})
    code = "".join(path.read_text() for path in tmp_path.glob("*.ptx"))
    assert len(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync)[\w.]*\.bf16\.bf16", code)) % instructions == 0
    assert re.search(r"mma[\w.]*\.f32\.bf16\.bf16", code) and "fma.rn.f32" not in code


@pytest.mark.parametrize("model", ["DeepSeek-V2-Lite", "Mixtral-8x7B"])
def test_a_quarter_of_the_cache_is_not_copied_either(model):
    (front,) = (program for program in step_programs(model, STEPS[0]) if program.part == "front")
    measured = measure.measure(front.at(CONTEXT // 4))
    assert measured.copies == 0 and measured.temporary <= 0.6 * MB
