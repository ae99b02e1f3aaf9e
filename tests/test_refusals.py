"""Whatever a refusal lists is accepted."""

from __future__ import annotations

import re

import pytest

from hybrimoe_jax.checkpoint.writer import check_formats
from hybrimoe_jax.engine.config import EngineConfig
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.layout import Format
from hybrimoe_jax.machine.profile import PROFILES, load_profile
from hybrimoe_jax.machine.shapes import SHAPES, expert_bytes, parse_cost_shape
from hybrimoe_jax.simulate.bound import knows_the_future
from hybrimoe_jax.simulate.cases import Case, system_of, tokens_of

VIRTUAL = {"clock": "virtual", "profile": "laptop-8gb"}
TOKENS = "synthetic:mixtral-8x7b"


def shape(name: str) -> None:
    EngineConfig(**VIRTUAL, cost_shape=name)


def simulated(name: str) -> None:
    assert knows_the_future(name) or system_of(Case(TOKENS, "laptop-8gb", name, 0.5), tokens_of(TOKENS))


def chosen(field: str):
    return lambda name: EngineConfig(**{**(VIRTUAL if name == "virtual" else {}), field: name})


FIELDS = ("system", "cache", "cache_scope", "scheduler", "prefetch", "predictor", "executor", "host_kernel", "clock")
TAKERS = {
    **{field: chosen(field) for field in (*FIELDS, "device_kernel", "host_memory")},
    "cost shape": shape,
    "cost shape's format": lambda name: parse_cost_shape(f"bundled:{name}"),
    "profile": load_profile,
    "simulated system": simulated,
    "format": lambda name: check_formats(name, None),
    "dense format": lambda name: check_formats(None, name),
    "quantised format": Format.parse,
    "simulated format": lambda name: expert_bytes(64, 32, name),
}
AT_LEAST = {"profile": len(PROFILES), "cost shape": len(SHAPES), "simulated system": 12, "simulated format": 8}


@pytest.mark.parametrize("what", TAKERS)
def test_every_name_of_the_list_is_accepted(what):
    with pytest.raises(UserError) as refused:
        TAKERS[what]("nope")
    text = str(refused.value)
    lists = re.findall(r"(?:known: |known one \(|one of |say |one: )([\w.:, -]+)", text.replace(" and the like", ""))
    names = [name for part in lists for name in re.findall(r"[\w.-]*\w", part.removesuffix("a quantised one"))]
    words = {"or", "a", "quantised", "one", "known", "int8 and int4", "package.module", "Class", "recorded", "TRACE"}
    listed = [name for name in names if name not in words]
    assert len(set(listed)) >= AT_LEAST.get(what, 2), text
    for name in listed:
        TAKERS[what](name)


@pytest.mark.parametrize("name", ["bf16", "f32"])
def test_a_plain_dense_format_is_refused_with_a_list_that_lacks_it(name):
    with pytest.raises(UserError) as refused:
        check_formats(None, name)
    assert "leave it out" in str(refused.value) and name not in str(refused.value).partition(";")[2]
