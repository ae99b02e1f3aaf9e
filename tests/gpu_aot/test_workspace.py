"""The workspace that a budget reserves is what the compiler says of the programs at published sizes, within 5 %."""

from __future__ import annotations

import warnings

import pytest
import topology
from published import PUBLISHED
from step_programs import CONTEXT, LOOKAHEAD, device_model, expert

if (reason := topology.missing()) is not None:
    pytest.skip(reason, allow_module_level=True)

import jax

from hybrimoe_jax.engine.workspace import StepPrograms, StepShape, program_bytes
from hybrimoe_jax.models.registry import parse_config
from hybrimoe_jax.models.target import traced_for

MOST = 800
"""Megabytes, of the steps that the default options allow."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_workspace_is_the_compilers_figure(name):
    config = parse_config(PUBLISHED[name])
    steps = StepPrograms(device_model(config), expert(config, "int4-g64"))
    stated = compiled = 0  # the latter with the step's own arrays among a program's arguments
    with warnings.catch_warnings(), traced_for("gpu"):
        warnings.simplefilter("ignore")  # donated arguments without a place
        for shape in (StepShape(1, 512, CONTEXT, LOOKAHEAD), StepShape(1, 1, CONTEXT, LOOKAHEAD)):
            for program in steps.of(shape):
                made = program.compile("cuda")
                need = program_bytes(made)
                line = shape.rows * config.hidden_size
                arrays = [leaf for leaf in jax.tree.leaves(program.arguments) if hasattr(leaf, "size")]
                own = sum(4 * array.size for array in arrays if array.size == line and array.dtype == "float32")
                print(f"{shape.tokens:4} {program.part:16} {need / 1e6:8.1f} MB, {own / 1e6:.1f} of its arguments")
                stated, compiled = max(stated, need + program.beside), max(compiled, need + own)
    assert compiled <= stated <= 1.05 * compiled
    assert stated <= MOST * 1e6
