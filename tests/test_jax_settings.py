"""What users choose for programs of their own, jax's settings and NumPy's, changes no answer; and what a fork gets."""

from __future__ import annotations

import contextlib
import os
import signal

import jax
import numpy as np
import pytest
import tiny

from hybrimoe_jax.engine.lanes import threads
from hybrimoe_jax.engine.load import load
from hybrimoe_jax.errors import UserError

SETTINGS = {
    "64 bits": lambda: jax.enable_x64(True),
    "no broadcasting": lambda: jax.numpy_rank_promotion("raise"),
    "no transfers": lambda: jax.transfer_guard("disallow"),
    "no underflow": lambda: np.errstate(all="raise"),
}


@contextlib.contextmanager
def for_all_threads(name: str, value):
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)


SETTINGS["64 bits everywhere"] = lambda: for_all_threads("jax_enable_x64", True)


@pytest.mark.parametrize("executor", ["overlapped", "dense", "callback"])
def test_settings_of_others_change_no_answer(executor):
    def answers(engine):
        prompts = tiny.prompts(engine.config, (9, 21))
        drawn = engine.generate(prompts, max_new_tokens=6, temperature=0.01).token_ids
        logits = engine.logits(prompts[0])
        np.testing.assert_allclose(logits, reference, rtol=0, atol=2e-5 * np.abs(reference).max())
        return engine.generate(prompts, max_new_tokens=6).token_ids, drawn

    with tiny.engine(executor="dense") as engine:
        reference = engine.logits(tiny.prompts(engine.config, (9,))[0])
    options = {} if executor == "dense" else {"cache_ratio": 0.5}
    with tiny.engine(executor=executor, **options) as engine:
        wanted = answers(engine)
        for name, setting in SETTINGS.items():
            with setting():
                assert answers(engine) == wanted, name
                with tiny.engine(executor=executor, **options) as made_there:
                    assert answers(made_there) == wanted, name
        assert answers(engine) == wanted


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:")
def test_a_fork_is_told_that_an_engine_is_not_there():
    """It would wait for ever for threads that it does not have."""
    with tiny.engine(cache_ratio=0.5) as engine:
        wanted = engine.generate([[1, 2, 3]], max_new_tokens=4).token_ids
        child = os.fork()
        if not child:
            signal.alarm(20)
            refused = 0
            for call in (lambda: engine.generate([[1, 2, 3]], max_new_tokens=4), load):
                with contextlib.suppress(UserError):
                    call()
                    os._exit(50)
                refused += 1
            os._exit(refused)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
        assert engine.generate([[1, 2, 3]], max_new_tokens=4).token_ids == wanted
    assert not threads._forked
