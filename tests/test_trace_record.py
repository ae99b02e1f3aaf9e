"""`trace record`: a sequence a prompt, those of a batch marked, and the run repeatable from what is written."""

from __future__ import annotations

import json

import golden
import numpy as np
import pytest
import tiny_checkpoint

from hybrimoe_jax.__main__ import command_main
from hybrimoe_jax.engine.engine import Engine
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.trace.importers import open_trace
from hybrimoe_jax.trace.info import lacks

PROMPTS = ("the man and", "he sang", "other things")
QUICK = ("--profile", "a6000-paper", "--start-cache", "off", "--host-kernel", "reference")


def record(checkpoint, prompts, out, *flags) -> list[str]:
    return ["record", "--model", str(checkpoint), "--prompts", str(prompts), "--out", str(out), *QUICK, *flags]


def test_each_prompt_is_a_sequence_and_batches_are_marked(checkpoint, tmp_path, capsys):
    prompts, out = tmp_path / "p.txt", tmp_path / "t.npz"
    prompts.write_text("\n\n".join(PROMPTS) + "\n")
    flags = ("--batch", "2", "--max-tokens", "4", "--clock", "virtual")
    assert command_main("trace")(record(checkpoint, prompts, out, *flags)) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    golden.check(said)
    trace = open_trace(out)
    assert lacks(trace) == said["lacks"] == [] and sorted(trace.lookahead) == [1, 2]
    assert said["sequences"] == 3 and said["new_tokens"] == 12 and said["rows"] == len(trace)
    assert {(int(s), int(b)) for s, b in zip(trace.sequence, trace.batch)} == {(0, 0), (1, 0), (2, 1)}
    tokenizer = tiny_checkpoint.tokenizer()
    for number, prompt in enumerate(PROMPTS):
        mine = (trace.sequence == number) & (trace.layer == 0)
        first = mine & (trace.phase == 0)
        assert first.sum() == len(tokenizer.encode(prompt).ids) and mine.sum() == first.sum() + 3
        assert sorted(trace.position[mine].tolist()) == list(range(mine.sum()))
    assert command_main("simulate")(["--trace", str(out), "--as-recorded"]) == 0
    again = json.loads(capsys.readouterr().out)
    golden.check(again)
    assert (again["hits"], again["misses"]) == (said["hits"], said["misses"])


def test_a_prompt_alone_is_routed_as_in_a_batch(checkpoint, tmp_path):
    """What other prompts run beside it changes nothing of a sequence's routing."""
    lines = [json.dumps({"prompt": prompt, "more": 1}) for prompt in PROMPTS[:2]]
    routed = []
    for batch in ("1", "2"):
        (tmp_path / "p.jsonl").write_text("\n".join(lines))
        command_main("trace")(
            record(checkpoint, tmp_path / "p.jsonl", tmp_path / "t.npz", "--batch", batch, "--max-tokens", "4")
        )
        trace = open_trace(tmp_path / "t.npz")
        order = np.lexsort((trace.layer, trace.position, trace.sequence))
        routed.append((np.sort(trace.ids[order], axis=1), trace.scores[order]))
    assert np.array_equal(routed[0][0], routed[1][0])
    np.testing.assert_allclose(routed[0][1], routed[1][1], atol=1e-5)


def test_interrupted_it_keeps_the_batches_that_were_finished(checkpoint, tmp_path, monkeypatch, capsys):
    prompts, whole, part = tmp_path / "p.txt", tmp_path / "whole.npz", tmp_path / "part.npz"
    prompts.write_text("\n".join(PROMPTS[:2]))
    flags = ("--max-tokens", "4", "--clock", "virtual")
    assert command_main("trace")(record(checkpoint, prompts, whole, *flags)) == 0
    generate, steps = Engine._step, []

    def interrupted(engine, *args, **kwargs):
        steps.append(1)
        if len(steps) == 6:  # the second batch has begun
            raise KeyboardInterrupt
        return generate(engine, *args, **kwargs)

    monkeypatch.setattr(Engine, "_step", interrupted)
    assert command_main("trace")(record(checkpoint, prompts, part, *flags)) == 130
    out, err = capsys.readouterr()
    assert "interrupted after 1 of 2 batches" in err and json.loads(out.splitlines()[-1])["sequences"] == 1
    first, kept = open_trace(whole), open_trace(part)
    assert np.array_equal(kept.ids, first.ids[first.sequence == 0])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it holds no prompts"),
        ("\n  \n", "it holds no prompts"),
        ('{"prompt": "a"}\n{"text": "b"}\n', 'line 2: not a JSON object with a "prompt"'),
        ('{"prompt": []}', "line 1: its prompt is neither a text nor"),
        ('{"prompt": [1, 9999]}', "token id 9999 is outside the vocabulary"),
        ("a\n" + "b" * 5000 + "\n", "prompt 1: 5000 tokens and 64 new ones exceed max_context"),
    ],
)
def test_what_is_no_prompt_is_said_before_weights_are_read(text, said, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("hybrimoe_jax.engine.load.load", lambda *_: pytest.fail("weights were read"))
    (tmp_path / "p.txt").write_text(text)
    with pytest.raises(UserError, match=said):
        command_main("trace")(record(checkpoint, tmp_path / "p.txt", tmp_path / "t.npz"))
    assert not (tmp_path / "t.npz").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--batch", "0"), "--batch 0 must be at least 1"),
        (("--max-tokens", "0"), "--max-tokens 0 must be at least 1"),
        (("--executor", "dense"), "it gives no trace"),
        (("--temperature", "-1"), "temperature"),
    ],
)
def test_flags_that_cannot_be_are_refused(flags, said, tmp_path):
    with pytest.raises(UserError, match=said):
        command_main("trace")(record("nowhere", "nowhere.txt", tmp_path / "t.npz", *flags))
