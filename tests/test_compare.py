"""`compare`: our systems beside the PyTorch engine, in turns, with the same memory and prompts."""

from __future__ import annotations

import pytest
import tiny

import hybrimoe_jax
from hybrimoe_jax.errors import UserError


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"systems": "nonsense"}, "nonsense"),
        ({"against": "torch nonsense"}, "nonsense"),
        ({"against": "hybrimoe"}, "same name"),
        ({"budget": "4 parsecs"}, "no size|not a size"),
        ({"budget": "4GiB", "cache_ratio": 0.5}, "not both"),
        ({"against": [], "prompt_tokens": 100_000}, "exceed the model"),
        ({"rounds": 0}, "at least 1 round"),
        ({"against": {"clock": "virtual", "profile": "a6000-paper"}}, "the TorchOffload has clock='virtual', which"),
        ({"against": {"cache_ratio": 1.0}}, "the TorchOffload has cache_ratio=1.0, which the others lack"),
    ],
)
def test_what_cannot_be_is_refused_before_weights_are_read(given, said):
    if "torch" in str(given.get("against", "torch")):
        pytest.importorskip("torch")
    if isinstance(options := given.get("against"), dict):
        pytest.importorskip("torch")
        given = {"against": hybrimoe_jax.TorchOffload(mode="hybrid", **options)}
    with pytest.raises(UserError, match=said):
        hybrimoe_jax.compare(**given)


def test_a_comparison_is_a_table_beside_the_first():
    runs = {}
    for system in ("hybrimoe", "on-demand"):
        with tiny.engine(system=system, cache_ratio=0.5, clock="virtual") as engine:
            runs[system] = [engine.generate([1, 2, 3], max_new_tokens=4) for _ in range(3)]
    table = hybrimoe_jax.Comparison(runs).table()
    assert list(table["contender"]) == ["hybrimoe", "on-demand"]
    assert list(table["same_tokens"]) == [True, True] and list(table["rounds"]) == [3, 3]
    assert table["tbt_ratio"][0] == 1
    assert table["tbt_ratio"][1] == pytest.approx(table["tbt_ms"][1] / table["tbt_ms"][0])
    assert all(clock.startswith("virtual clock") for clock in table["clock"])
    assert "2" not in repr(hybrimoe_jax.Comparison(runs)).split(":")[0]


@pytest.mark.slow
def test_the_pytorch_engine_takes_its_turn(monkeypatch):
    pytest.importorskip("torch")
    from hybrimoe_jax.baselines import torch_assembly

    held, host_banks = [], torch_assembly.host_banks
    monkeypatch.setattr(
        torch_assembly, "host_banks", lambda *args, **more: held.append(host_banks(*args, **more)) or held[-1]
    )
    described = hybrimoe_jax.TorchOffload(mode="hybrid", prefetch="none")
    found = hybrimoe_jax.compare(
        against=described,
        systems=["hybrimoe", "cpu-only"],
        rounds=1,
        prompt_tokens=8,
        max_new_tokens=3,
        cache_ratio=0.5,
        machine="a6000-paper",
    )
    table = found.table()
    assert list(table["contender"]) == ["hybrimoe", "cpu-only", "torch hybrid"]
    assert set(table["clock"]) == {"virtual clock, a6000-paper"}
    assert all(table["same_tokens"]) and table["slots"][0] == table["slots"][2] == 96
    assert found.runs["torch hybrid"][0].stats.prefetch.issued == 0
    assert len(held) == 2 and held[0] is held[1], "the experts are in host memory once"
