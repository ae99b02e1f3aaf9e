"""What fails once in the PyTorch engine ends one call, and the next answers are exact; on a paced device, too."""

from __future__ import annotations

import threading

import pytest
import tiny

pytest.importorskip("torch", reason="the PyTorch baseline needs torch")

from grids import each_once
from test_faults import fail_once, kill  # noqa: F401  a fixture
from test_finite import DAMAGES, damage
from torch_models import offload

from hybrimoe_jax.baselines import torch_link
from hybrimoe_jax.baselines.torch_experts import Experts
from hybrimoe_jax.baselines.torch_link import ThreadLink
from hybrimoe_jax.baselines.torch_model import TorchModel
from hybrimoe_jax.decide.planner import Planner
from hybrimoe_jax.decide.residency.residency import Residency
from hybrimoe_jax.errors import DeviceError, UserError

PLACES = {
    "a program of the device": (TorchModel, "front", 3),
    "a copy": (ThreadLink, "_copy", 3),
    "experts": (Experts, "__call__", 4),
    "a layer is planned": (Planner, "plan", 8),
    "a prefetch gets a slot": (Residency, "admit_landed", 1),
}


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A profile of the invented machine, for a paced device."""
    path = tmp_path_factory.mktemp("machine") / "machine.json"
    tiny.costs(tiny.weights("qwen2_moe")[0]).save(path)
    return f"paced:{path}:2"


@pytest.fixture(scope="module")
def wanted():
    engine = tiny.engine(executor="dense")
    yield answer(engine)
    engine.close()


def answer(engine) -> list[list[int]]:
    return engine.generate(tiny.prompts(engine.config, (21, 9)), max_new_tokens=8).token_ids


@pytest.fixture(params=["cpu", "paced"])
def engine(request, machine):
    """Copies go by the link's thread on both."""
    given = {"device": machine} if request.param == "paced" else {}
    with offload("qwen2_moe", mode="lru", cache_ratio=0.5, debug=True, **given) as made:
        made._parts.link.inline_s = 0.0
        yield made


@pytest.mark.parametrize(("place", "raised"), each_once(PLACES, (RuntimeError, KeyboardInterrupt)))
def test_what_fails_once_ends_one_call(engine, place, raised, wanted, monkeypatch):
    owner, name, call = PLACES[place]
    with monkeypatch.context() as patch:
        fail_once(patch, owner, name, call, raised)
        with pytest.raises(raised, match="it failed once"):
            for _ in range(50):
                answer(engine)
    assert answer(engine) == answer(engine) == wanted


@pytest.mark.parametrize("thread", ["torch-link", "torch-device"])
def test_a_thread_that_dies_ends_one_call(engine, thread, wanted, kill):  # noqa: F811
    if thread not in {running.name for running in threading.enumerate()}:
        pytest.skip("this device has no such thread")
    assert answer(engine) == wanted
    kill(thread)
    with pytest.raises(DeviceError, match=f"the thread {thread} has died .SystemExit"):
        answer(engine)
    assert answer(engine) == answer(engine) == wanted


def test_a_copy_that_hangs_ends_one_call_and_is_not_made_later(engine, wanted, monkeypatch):
    link, released, calls = engine._parts.link, threading.Event(), []

    def hanging(self, transfer):
        calls.append(transfer)
        if len(calls) == 3:
            released.wait()
        copy(self, transfer)

    copy = torch_link.ThreadLink._copy
    with monkeypatch.context() as patch:
        patch.setattr(torch_link.ThreadLink, "_copy", hanging)
        patch.setattr(link, "patience_s", 0.4)
        with pytest.raises(DeviceError, match=r"has not reached the device in 0\.4 s"):
            answer(engine)
    assert answer(engine) == wanted, "while the first thread still hangs"
    released.set()
    assert answer(engine) == wanted, "and after it came back"


def test_a_prefetch_that_nobody_moves_ends_one_call(engine, wanted, monkeypatch):
    link = engine._parts.link

    def nobody(self, transfer):
        transfer.link = self
        self._in_flight[transfer.layer, transfer.expert] = transfer

    with monkeypatch.context() as patch:
        patch.setattr(link, "patience_s", 0.4)
        patch.setattr(ThreadLink, "prefetch", nobody)
        with pytest.raises(DeviceError, match=r"has not reached the device in 0\.4 s"):
            for _ in range(50):
                answer(engine)
    assert answer(engine) == answer(engine) == wanted


@pytest.mark.parametrize(("tensor", "row", "value", "where"), DAMAGES)
def test_numbers_that_are_none_are_found(monkeypatch, tensor, row, value, where):
    damage(monkeypatch, tensor, row, value)
    with offload("qwen2_moe", mode="lru") as broken:
        for sampling in ({}, {"temperature": 0.7}):
            with pytest.raises(UserError, match=f"NaN or infinite at step 0: a second pass .* first in {where}"):
                broken.generate([[1, 2, 3, 7], [4, 5]], max_new_tokens=4, **sampling)
        with pytest.raises(UserError, match=f"NaN or infinite at step 0: a second pass .* first in {where}"):
            broken.logits([1, 2, 3, 7])
