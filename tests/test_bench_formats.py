"""`bench formats`: on a tiny checkpoint with a text of its own."""

import json

import golden
import pytest

from hybrimoe_jax.bench import __main__ as bench
from hybrimoe_jax.bench import formats
from hybrimoe_jax.errors import UserError


@pytest.mark.slow
def test_a_table_and_one_json_line(checkpoint, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the other and the father, hither and thither. " * 10)
    options = ["--model", str(checkpoint), "--text", str(text), "--calibrate", str(text)]
    names = "f32,bf16,int8-g32,int4-g32,int8-g32-a8"
    assert bench.main(["formats", "--formats", names, *options]) == 0
    *lines, last = capsys.readouterr().out.strip().splitlines()
    record = json.loads(last)
    golden.check(record)
    rows = {(row["format"], row["calibrated"]): row for row in record["formats"]}
    assert list(rows) == [(name, False) for name in names.split(",")] + [("int4-g32", True)]
    assert len(lines) == len(rows) + 3 and lines[-1].startswith("bars: int8 within 0.1 % ")
    plain = rows["f32", False]
    assert plain["logits_rms"] == plain["change"] == plain["kl"] == 0 and plain["bits_per_weight"] == 32
    assert rows["bf16", False]["logits_rms"] < 0.02 and rows["bf16", False]["bits_per_weight"] == 16
    coarse, fine = rows["int4-g32", False], rows["int8-g32", False]
    assert 0 < fine["logits_rms"] < coarse["logits_rms"] and fine["expert_bytes"] > coarse["expert_bytes"]
    assert rows["int8-g32-a8", False]["logits_rms"] != fine["logits_rms"]
    assert rows["int4-g32", True]["kl"] < coarse["kl"]


def test_the_shipped_texts_are_apart():
    """Calibration scenes come from works that were trained on, the others from works that were not; both are long
    enough."""
    held_out, own = (formats.read_text(formats.TEXTS / name) for name in ("held-out.txt", "calibration.txt"))
    lines = {line for line in own.splitlines() if len(line) > 40}
    assert len(lines) > 300 and not lines & set(held_out.splitlines())
    assert "MACBETH." in held_out and "MACBETH." not in own and len(held_out) > 90_000


@pytest.mark.parametrize(
    "options, message",
    [
        (["--formats", "int5"], "is not known"),
        (["--text", "nowhere.txt"], "no such file"),
        (["--calibrate", "a", "--no-calibrate"], "does not go with"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        bench.main(["formats", *options])


def test_a_text_too_short_is_refused(checkpoint, tmp_path):
    (tmp_path / "short.txt").write_text("the other")
    with pytest.raises(UserError, match="give one of at least 257"):
        bench.main(["formats", "--model", str(checkpoint), "--text", str(tmp_path / "short.txt")])
