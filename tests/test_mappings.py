"""A process that makes many engines does not end for want of memory mappings."""

from __future__ import annotations

import jax
import pytest
import tiny

from hybrimoe_jax.engine import mappings


def held() -> int:
    with mappings.HELD.open("rb") as lines:
        return sum(1 for _ in lines)


@pytest.mark.skipif(not mappings.LIMIT.exists(), reason="the limit is Linux's")
def test_many_programs_are_let_go_when_another_engine_is_made(monkeypatch, tmp_path):
    """An engine that was there before answers as before."""
    first = tiny.engine("qwen2_moe", cache_ratio=0.5)
    prompts = tiny.prompts(first.config, (5, 37))
    want = first.generate(prompts, max_new_tokens=4).token_ids
    before = held()
    assert not mappings.spare(), "a few programs are kept"
    (tmp_path / "limit").write_text(str(before))  # more than half of it is held
    monkeypatch.setattr(mappings, "LIMIT", tmp_path / "limit")
    cleared, clear = [], jax.clear_caches
    monkeypatch.setattr(jax, "clear_caches", lambda: (clear(), cleared.append(held())))
    with tiny.engine("mixtral", cache_ratio=0.5) as second:
        assert len(cleared) == 1 and cleared[0] < before
        assert len(second.generate(tiny.prompts(second.config, (5,)), max_new_tokens=4).token_ids[0]) == 4
    assert first.generate(prompts, max_new_tokens=4).token_ids == want
    first.close()


def test_where_the_system_tells_no_limit_nothing_is_let_go(monkeypatch, tmp_path):
    monkeypatch.setattr(mappings, "LIMIT", tmp_path / "absent")
    monkeypatch.setattr(jax, "clear_caches", lambda: pytest.fail("programs were dropped"))
    assert not mappings.spare()
