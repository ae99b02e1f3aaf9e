"""The fuzz campaign: whatever files and arguments are made into, an answer is right, or refused in one line.

What was tried is printed at the end of the tests. `python tests/fuzz KIND SEED` repeats a case.
"""

from __future__ import annotations

import time

import pytest
from fuzz import campaign
from fuzz.kinds import KINDS
from fuzz.planted import FAULTS

MOST = 40
"""Cases of a kind in `make test`, so that fast machines and slow ones try the same."""


def test_no_input_breaks_the_promise(pytestconfig, record_property):
    nightly = pytestconfig.getoption("nightly")
    asked = pytestconfig.getoption("fuzz_seconds")
    seconds, most = asked or (1200 if nightly else 60), None if asked or nightly else MOST
    first = int(time.time()) % 10**6 * 1000 if nightly else 0
    run = campaign.run(seconds, first=first, most=most)
    record_property("fuzz", f"{run.table()}\nseeds from {first}, {seconds:g} s at most")
    assert not run.found, "\n".join(map(str, run.found))
    assert all(count.answered + count.refused for count in run.counts.values()), run.table()


@pytest.mark.slow
def test_a_fault_of_each_kind_is_found_within_a_minute():
    assert FAULTS.keys() == KINDS.keys()
    run = campaign.run(60, planted=True, until_found=True)
    assert {finding.kind for finding in run.found} == set(KINDS), run.table()
    whys = {finding.kind: finding.why for finding in run.found}
    for kind, why in {"template": "no end within", "profile": "much memory", "gguf": "the process ended"}.items():
        assert why in whys[kind]
    assert "outside the destination" in whys["trace"]
