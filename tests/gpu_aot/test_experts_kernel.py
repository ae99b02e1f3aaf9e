"""Quantised experts at 1 to 8 rows, compiled for an H100: our kernels' machine code, and that no form writes a matrix.

The kernels are opaque to XLA. What they compute and read is tested on a CPU (tests/test_packed_cuda.py).
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
import topology
from hlo import Module
from published import PUBLISHED

if (reason := topology.missing()) is not None:
    pytest.skip(reason, allow_module_level=True)

import jax
from topology import compile_for_gpu, struct

from hybrimoe_jax.engine.lanes.stacked import block_program
from hybrimoe_jax.engine.programs import Routed
from hybrimoe_jax.formats.packing import ExpertLayout, Format, PackedExpert
from hybrimoe_jax.models import packed_cuda
from hybrimoe_jax.models.packed import packed_forward
from hybrimoe_jax.models.parameters import split
from hybrimoe_jax.models.pooled import routed_experts
from hybrimoe_jax.models.registry import build_model, parse_config
from hybrimoe_jax.models.target import traced_for

ROOT = Path(__file__).parents[2]
LOADS = (1, 2, 4, 8)
SLOTS = 32
SMALL = 64 * 1024
VARIANTS = ("int4-1", "int4-8", "int8-1", "int8-8")

spec = importlib.util.spec_from_file_location("make_ptx", ROOT / "scripts" / "make_ptx.py")
make_ptx = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_ptx)


def tool(name: str) -> Path:
    path = topology.wheels() / "bin" / name
    if not path.exists():
        pytest.skip(f"the wheels have no {name}")
    return path


def pool(config, format: str) -> PackedExpert:
    layout = ExpertLayout(Format.parse(format), config.hidden_size, config.moe_width)
    return PackedExpert(struct((SLOTS, layout.nbytes), "uint8"), layout)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("model", PUBLISHED)
def test_a_layer_s_experts_are_two_launches_and_write_no_matrix(model, load):
    config = parse_config(PUBLISHED[model])
    x = struct((load, config.hidden_size))
    pairs = (load, config.num_experts_per_tok)
    for format, kernels in (("int4-g64", 2), ("int8-g32-a8", 6)):
        arguments = (x, x, struct(pairs, "int32"), struct(pairs), pool(config, format))
        compiled = compile_for_gpu(jax.jit(packed_cuda.routed), *arguments)
        module = Module(compiled.as_text())
        inner = 4 * load * config.num_experts_per_tok * config.moe_width
        assert len(module.kernels) <= kernels
        assert module.float_bytes() <= max(inner, 4 * load * config.hidden_size)
        assert compiled.memory_analysis().temp_size_in_bytes <= 2 * inner + 8 * load * config.hidden_size + SMALL


@pytest.mark.parametrize("load", (1, 8))
@pytest.mark.parametrize("model", PUBLISHED)
def test_xla_s_form_of_a_layer_writes_no_float_matrix(model, load):
    config = parse_config(PUBLISHED[model])
    x, pairs = struct((load, config.hidden_size)), (load, config.num_experts_per_tok)
    arguments = (x, x, struct(pairs, "int32"), struct(pairs), pool(config, "int4-g64"))
    compiled = compile_for_gpu(jax.jit(routed_experts), *arguments)
    module, matrix = Module(compiled.as_text()), 4 * config.hidden_size * config.moe_width
    assert len(module.kernels) <= 12
    assert module.float_bytes() <= load * config.num_experts_per_tok * matrix // 16  # scales, not matrices


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("model", PUBLISHED)
def test_xla_s_form_of_an_expert_writes_no_float_matrix(model, load):
    config = parse_config(PUBLISHED[model])
    layout = pool(config, "int4-g64").layout
    expert = PackedExpert(struct((layout.nbytes,), "uint8"), layout)
    compiled = compile_for_gpu(jax.jit(packed_forward), expert, struct((load, config.hidden_size)))
    module = Module(compiled.as_text())
    assert len(module.kernels) <= 12
    assert module.float_bytes() <= 4 * config.hidden_size * config.moe_width // 16  # scales, not the matrix
    assert compiled.memory_analysis().temp_size_in_bytes <= 1.1 * layout.nbytes + SMALL


@pytest.mark.parametrize("load", (1, 8))
@pytest.mark.parametrize("model", PUBLISHED)
def test_a_layer_s_second_program_is_few_launches(model, load):
    """Shared experts, and the residents that the device's table finds."""
    config = parse_config(PUBLISHED[model])
    layer = next(layer for layer in build_model(config).model.layers if layer.is_moe)
    graphdef, abstract = split(layer)
    parameters = {name: struct(array.shape, "bfloat16") for name, array in abstract.items()}
    pairs = (load, config.num_experts_per_tok)
    routed = Routed(struct((load, config.hidden_size)), struct(pairs, "int32"), struct(pairs))
    table = struct((config.num_hidden_layers, config.num_experts), "int32")
    run = block_program(graphdef, any("shared" in name for name in parameters), "cuda")
    with traced_for("gpu"):
        compiled = compile_for_gpu(run, parameters, routed, table, struct((), "int32"), (), pool(config, "int4-g64"))
    assert len(Module(compiled.as_text()).kernels) <= 9
    assert compiled.memory_analysis().temp_size_in_bytes <= 1.2e6


@pytest.mark.parametrize("target", ["sm_75", "sm_86", "sm_90"])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_machine_code_spills_nothing_and_loads_16_bytes_at_a_time(name, target, tmp_path):
    code = tmp_path / "code"
    said = make_ptx.assembled(tool("ptxas"), make_ptx.SOURCE.with_name(f"{name}.ptx"), target, code)
    assert said.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == 2, said
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", said)]
    assert len(registers) == 2 and max(registers) <= (64 if name.endswith("-1") else 128), said
    text = subprocess.run([tool("nvdisasm"), "-c", code], check=True, capture_output=True, text=True).stdout
    for kernel in text.split(".section\t.text.")[1:]:
        loads = re.findall(r"\bLDG\.E(?:\.(?!CONSTANT|SYS)(\w+))?", kernel)
        assert "128" in loads, kernel[:80]
        assert not set(loads) - {"", "64", "128"}, "a load of less than 4 bytes"
        assert not re.search(r"\b(LDL|STL)\b", kernel)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_source_compiles_to_the_ptx_of_the_package(name):
    """Where the compiler is the one that made it; by another one its machine code is still without spills."""
    text = make_ptx.compiled(tool("nvcc"), *make_ptx.VARIANTS[name])
    kept = packed_cuda.ptx(name)
    if text.partition("\n")[0] != kept.partition("\n")[0]:
        pytest.skip(f"{text.partition(' from ')[0]}; the package's: {kept.partition(' from ')[0]}")
    assert text == kept
