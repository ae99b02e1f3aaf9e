"""`python -m hybrimoe_jax.demo`: a text, and three systems beside each other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny_checkpoint

from hybrimoe_jax import demo
from hybrimoe_jax.decide.systems import get_system
from hybrimoe_jax.errors import UserError

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint.converted(tmp_path_factory.mktemp("model"), eos_token_id=None)


def test_the_systems_stand_beside_each_other_and_keep_the_text(checkpoint, capsys):
    assert demo.main(["--model", str(checkpoint), "--prompt", "the and", "--max-tokens", "9"]) == 0
    out, error = capsys.readouterr()
    text, _, computed = out.partition("measured on this machine")
    assert text.strip() and "arning" not in error and all(line.startswith("*") for line in error.splitlines() if line)
    rows = computed.splitlines()[1:]
    assert (
        len(rows) < 24 and max(map(len, rows)) <= 80 and rows[-1].endswith("-m hybrimoe_jax.convert HF_FOLDER my-model")
    )
    assert "computed, not measured" in computed and "deepseek-v2-lite does in int4-g64" in computed
    wanted = int(re.search(r"(\d+) experts are wanted", computed)[1])
    lines = {row.split()[0]: row.split()[1:] for row in rows if row.startswith(demo.SYSTEMS)}
    assert list(lines) == list(demo.SYSTEMS)
    for system, (hits, fetches, prefetches, cpu, device, speed, same) in lines.items():
        assert int(cpu) + int(device) == wanted >= int(hits) and same == "yes" and float(speed) > 0
        assert (int(fetches) + int(prefetches) > 0) == get_system(system).fetches
    assert len({line[5] for line in lines.values()}) > 1


def test_what_a_demo_cannot_be_is_said_before_weights_are_read(checkpoint, tmp_path):
    for flags, named in ((["--max-tokens", "1"], "at least 2"), (["--model", str(tmp_path)], "manifest.json")):
        with pytest.raises(UserError, match=named):
            demo.main(flags)


@pytest.mark.slow
def test_the_readme_shows_what_it_prints(capsys):
    demo.main([])
    said = [line for line in capsys.readouterr().out.splitlines() if line and " ms each: " not in line]
    shown = re.search(r"<!-- demo -->\n```\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[1].splitlines()
    shown = [line for line in shown if line and " ms each: " not in line]
    assert said[:-1] == shown[:-1] and said[-1].split("-m")[1] == shown[-1].split("-m")[1]
