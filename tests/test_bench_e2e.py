"""`bench e2e`: what it makes of contenders' answers. They are made up but in the test marked slow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import golden
import pytest

from hybrimoe_jax.bench import __main__ as bench
from hybrimoe_jax.bench.e2e import bars, command, grid, parts, rounds, table
from hybrimoe_jax.bench.e2e.floor import work_floor
from hybrimoe_jax.bench.e2e.grid import Entry, Files, Options
from hybrimoe_jax.errors import UserError

SIZES = {"expert_bytes": 100, "dense_bytes": 1000, "cache_bytes_per_token": 2, "bytes_per_token": 4096}
SIZES |= {"expert_operations": 50, "dense_operations": 500, "head_operations": 60}
FILES = Files("mid", "f32", Path("mid"), Path("mid-hf"))


def phase(steps: int, loads: int, seconds: float) -> dict:
    busy = {"cpu": seconds / 2, "device": seconds / 4, "link": 0.0}
    work = {"experts": {"cpu": 4 * steps, "device": 0}, "loads": {"cpu": loads, "device": 0}}
    return {"steps": steps, "seconds": seconds, "busy_s": busy, "bytes_h2d": 8, **work}


class Fake:
    """A contender that takes as long as `speeds` has for its name, in seconds a token."""

    speeds: ClassVar[dict[str, float]]
    asked: ClassVar[list[tuple[str, str]]]
    refuses: ClassVar[str | None]

    def __init__(self, kind: str, **options):
        self.kind, self.ended, self.about = kind, False, {"names": []}

    def ask(self, run: str, name: str = "", ids: list[int] | None = None, new: int = 0, options: dict | None = None):
        if run == "open" and name == self.refuses:
            raise UserError("not this one")
        if run == "sizes":
            return SIZES
        if run != "generate":
            return {}
        self.asked.append((name, str(len(ids or ()))))
        speed = self.speeds[name]
        tokens = [7] * new + [8 if name == "transformers" else 7]
        made = {"ttft_s": 10 * speed, "decode_s": new * speed, "tbt_s": [speed] * new, "token_ids": tokens}
        made |= {"cpu_s": 30 * speed, "process_peak_bytes": 5}
        if self.kind == "transformers":
            return made
        phases = {"prefill": phase(1, 4 * len(ids or ()), 10 * speed), "decode": phase(new, 4 * new, new * speed)}
        counted = {"hits": 3, "misses": 1, "bytes_h2d": 8, "compile_s": 0.0, "host_bytes": 7, "device": "cpu"}
        counted["peak_device_bytes"] = 60 if self.kind == "torch" else 50
        return {**made, **counted, "phases": phases, "slots": [2]}

    def close(self) -> None:
        self.ended = True


@pytest.fixture
def fakes(monkeypatch):
    made: list[Fake] = []

    def start(kind: str, **options) -> Fake:
        made.append(Fake(kind, **options))
        return made[-1]

    monkeypatch.setattr(Fake, "asked", [], raising=False)
    monkeypatch.setattr(Fake, "refuses", None, raising=False)
    speeds = {"hybrimoe": 0.01, "on-demand": 0.04, "transformers": 0.03}
    speeds |= {f"torch {mode}": 0.02 for mode in grid.TORCH_MODES}
    monkeypatch.setattr(Fake, "speeds", speeds, raising=False)
    monkeypatch.setattr(rounds, "Contender", start)
    monkeypatch.setattr(rounds, "SETTLE_S", 0)
    monkeypatch.setattr(rounds, "prompt_maker", lambda files: (lambda tokens, turn: [turn] * tokens, 100))
    monkeypatch.setattr(rounds, "machine_figures", lambda nbytes: {"bandwidth": 1e6, "peak": 1e9})
    monkeypatch.setattr(grid, "absent", lambda peer: None if peer in ("torch", "transformers") else "not here")
    return made


def options(**given) -> Options:
    usual = {"ratios": (0.25, 0.5), "prompts": (4, 99), "systems": ("hybrimoe", "on-demand"), "rounds": 2, "new": 4}
    return Options(**{**usual, **given})


def measured(**given) -> dict:
    return rounds.measure(FILES, options(**given), lambda text: None)


def test_every_cell_has_a_row_of_each_contender_and_those_without_slots_run_once(fakes):
    made = measured()
    rows = {(row["contender"], row["cache_ratio"]): row for row in made["rows"]}
    ours = {(name, ratio) for name in ("hybrimoe", "on-demand", *Fake.speeds) for ratio in (0.25, 0.5)}
    ours -= {("transformers", ratio) for ratio in (0.25, 0.5)}
    assert set(rows) == ours | {("transformers", None)} and len(rows) == len(made["rows"])
    row = rows["hybrimoe", 0.25]
    assert row["ttft_ms"] == pytest.approx(100) and row["tbt_ms"]["p99"] == pytest.approx(10)
    assert row["tokens_s"] == pytest.approx(100) and row["hit_rate"] == 0.75
    assert row["lanes"]["decode"] == pytest.approx({"cpu": 0.5, "device": 0.25, "link": 0})
    assert rows["transformers", None]["token_differences"] == 2 and row["token_differences"] == 0
    assert made["left_out"]["a prompt of 99, mid"] == "the model takes 100 tokens in all"
    assert made["left_out"]["llama.cpp, mid f32"] == "not here" and all(fake.ended for fake in fakes)


def test_turns_rotate_and_one_round_counts_for_nothing(fakes):
    measured(ratios=(0.5,), peers=())
    names = [name for name, _ in Fake.asked]
    assert names == ["hybrimoe", "on-demand", "on-demand", "hybrimoe", "hybrimoe", "on-demand"]


def test_who_uses_more_cores_than_it_was_given_is_marked(fakes):
    one, three = measured(threads=1)["rows"], measured(threads=3)["rows"]
    assert not one[0]["threads_kept"] and three[0]["threads_kept"]
    assert "threads: hybrimoe, mid f32, prompt of 4: 2.1 cores were used" in table.doubts(one)
    said = table.doubts(three)  # all keep to their threads, but torch has more device bytes
    assert len(said) == 8 and "device bytes: torch lru, mid f32, prompt of 4: 1.20 of the first one's" in said


def test_a_contender_that_cannot_be_opened_is_left_out_and_the_others_run(fakes, monkeypatch):
    monkeypatch.setattr(Fake, "refuses", "torch static")
    made = measured(ratios=(0.5,))
    names = {row["contender"] for row in made["rows"]}
    assert made["left_out"]["torch static, mid f32"] == "not this one" and "torch static" not in names
    assert {"hybrimoe", "torch lru"} <= names


def test_the_floor_is_the_slower_of_reading_and_computing():
    figures = {"bandwidth": 1e3, "peak": 1e2}
    decode = work_floor(SIZES, phase(2, 8, 1.0), True, 10, figures)
    assert decode == (8 * 50 + 2 * (500 + 60)) / 1e2  # operations: 8 experts with a token each, two steps
    assert work_floor(SIZES, phase(2, 8, 1.0), True, 10, {"bandwidth": 1e3}) == (8 * 100 + 2 * (1000 + 10 * 2)) / 1e3
    prefill = work_floor(SIZES, phase(1, 40, 1.0), False, 10, figures)
    assert prefill == (40 * 50 + 10 * 500 + 60) / 1e2  # the head is for the last token alone


def test_bars_are_the_median_of_the_rounds_and_say_what_was_not_met(fakes):
    rows = measured()["rows"]
    found = {bar["bar"]: bar for bar in bars.bars(rows)}
    decode = found["CPU only, mid, f32, decode: hybrimoe over the best torch mode, at least 1.5x"]
    assert decode["value"] == pytest.approx(2) and decode["met"] is True
    assert all(bar["met"] is None for name, bar in found.items() if "f32" not in name or "int4" in name)
    slow = [{**row, "rounds": {key: [5.0, 5.0] for key in row["rounds"]}} for row in rows]
    lines = [table.bar_line(bar) for bar in bars.bars(slow)]
    assert "NOT MET (1.00)" in lines[0] and "not measured" in lines[-1]


def paced(name: str, wall: float, virtual: float) -> dict:
    row = {"contender": name, "model": "m", "format": "f32", "device": "paced:p:8", "cache_ratio": 0.25}
    row |= {"prompt_tokens": 4, "rounds": {"tbt_ms": [wall], "ttft_ms": [wall]}, "computed": {"tbt_ms": virtual}}
    return row


@pytest.mark.parametrize(("wall", "virtual", "met"), [(2.0, 2.1, True), (2.0, 3.0, False)])
def test_paced_ratios_are_held_against_the_virtual_clock_s(wall, virtual, met):
    rows = [paced("hybrimoe", 1.0, 1.0), paced("torch static", wall, virtual), paced("torch hybrid", 1.04, 1.0)]
    above, same, simulated = list(bars.paced_bars(rows))
    assert above["met"] and above["value"] == 2 and same["met"] and same["value"] == pytest.approx(0.04)
    assert simulated["met"] is met


def test_the_same_policies_in_both_engines_separate_policy_from_engine():
    """Torch takes 20 ms, ours with torch's policies 12, ours 10; the busiest lanes 10, 6 and 8 of them."""

    def row(name: str, ms: float, busiest: float) -> dict:
        lanes = {"cpu": busiest / ms, "device": 0.1, "link": 0.0}
        about = {"contender": name, "model": "mid", "format": "f32", "device": "auto", "cache_ratio": 0.25}
        return {**about, "prompt_tokens": 4, "rounds": {"tbt_ms": [ms], "ttft_ms": [ms]}, "lanes": {"decode": lanes}}

    rows = [row("torch static", 20, 10), row("torch lru", 30, 10), row("ktransformers", 12, 6), row("hybrimoe", 10, 8)]
    rows = [{**row, "lanes": {**row["lanes"], "prefill": row["lanes"]["decode"]}} for row in rows]
    found = {part["phase"]: part for part in parts.parts(rows)}["decode"]
    assert (found["mode"], found["same_system"]) == ("static", "ktransformers")
    saved = found["kernels_ms"], found["dispatch_ms"], found["policy_ms"]
    assert saved == pytest.approx((4, 4, 2)) and sum(saved) == pytest.approx(found["torch_ms"] - found["hybrimoe_ms"])
    assert found["overlap"]["torch"] == pytest.approx(0.6)
    assert parts.line(found)[:3] == ["mid f32: a token after 4", "static", "20.00"]


def test_the_table_has_what_was_left_out_and_every_bar(fakes):
    made = measured(ratios=(0.25,))
    shown = table.text({**made, "bars": bars.bars(made["rows"]), "parts": list(parts.parts(made["rows"]))})
    assert "mid f32, prompt of 4" in shown and "hybrimoe, 25 %" in shown and "2 of 10" in shown
    assert "left out: llama.cpp, mid f32: not here" in shown and shown.count("bar: ") >= 7


def test_a_paced_part_asks_the_virtual_clock_the_same_and_shows_the_machine_s_times(fakes):
    speeds = {**Fake.speeds, "hybrimoe virtual": 0.001, "on-demand virtual": 0.005}
    Fake.speeds.update(speeds)
    rows = {row["contender"]: row for row in measured(device="paced:a6000-paper:10", ratios=(0.25,))["rows"]}
    assert rows["hybrimoe"]["ttft_ms"] == pytest.approx(10)  # a tenth of the wall's
    assert rows["hybrimoe"]["computed"]["tbt_ms"] == pytest.approx(1)
    assert rows["torch on-demand"]["computed"]["tbt_ms"] == pytest.approx(5)  # it decides as ours of that name
    assert "transformers" not in rows and {row["device"] for row in rows.values()} == {"paced:a6000-paper:10"}


def flags(**given) -> dict:
    names = ("models", "formats", "ratios", "prompts", "systems", "peers", "threads", "rounds", "new", "device")
    return {**dict.fromkeys((*names, *grid.PARTS)), "quick": False, "workdir": None, **given}


def test_quick_measures_less_and_adds_a_paced_part():
    (whole,) = command.parts_of(flags())
    small, mid, on_paced = command.parts_of(flags(quick=True, new=4))
    assert whole == Options() and small.ratios == mid.ratios == (0.25,) and small.new == mid.new == on_paced.new == 4
    assert (small.models, mid.models) == (("bundled",), ("mid",)) and {*small.formats} < {*mid.formats}
    assert on_paced.device.startswith("paced:") and on_paced.models == ("bundled",)
    assert [part.device for part in command.parts_of(flags(quick=True, device="auto"))] == ["auto", "auto"]
    quick, on_paced = command.parts_of(flags(quick=True, models="mid"))
    assert quick.models == ("mid",) and quick.formats == mid.formats and on_paced.models == ("bundled",)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--models nowhere", "--models 'nowhere': neither bundled, mid nor a folder"),
        ("--formats int3", "int3"),
        ("--systems nope", "nope"),
        ("--cache nope", "'nope' is unknown"),
        ("--scheduler wrong_rules:Nothing", "module wrong_rules has no Nothing"),
        ("--peers vllm", "--peers 'vllm' is not known"),
        ("--ratios 0.25,much", "--ratios '0.25,much': write numbers"),
        ("--ratios 2", "a ratio is from 0 to 1"),
        ("--prompts 0", "--prompts must be at least 1"),
        ("--new 1", "--new must be at least 2"),
        ("--device cuda", "device 'cuda' is unknown"),
        ("--workdir /proc/x", "--workdir /proc/x: cannot be written"),
    ],
)
def test_bad_options_are_one_line(line, said):
    with pytest.raises(UserError) as refused:
        bench.main(["e2e", *line.split()])
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_peer_that_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(grid, "found", lambda module: module != "accelerate")
    assert grid.absent("accelerate") == "accelerate is not installed: pip install accelerate"
    assert grid.absent("transformers") is None


def test_slots_of_peers_follow_the_ratio_and_others_are_measured_once(monkeypatch):
    monkeypatch.setattr(grid, "absent", lambda peer: None)
    left: dict[str, str] = {}
    quarter = grid.entries(options(), FILES, 0.25, 64, left)
    half = grid.entries(options(), Files("mid", "int4-g64", Path("m"), None), 0.5, 64, left)
    assert Entry("transformers", "transformers", {}, cached=False) in quarter
    assert {entry.kind for entry in half} == {"engine", "torch"}
    assert left["transformers, mid int4-g64"] == "has no kernel for these weights"
    assert {entry.options["cache_ratio"] for entry in half} == {0.5}


def test_rules_of_one_s_own_are_a_contender_of_either_engine(monkeypatch):
    monkeypatch.setattr(grid, "absent", lambda peer: None)
    rules = {"cache": "own_rules:Fading", "predictor": "own_rules:Popular"}
    (asked,) = command.parts_of(flags(**rules))
    entries = {entry.name: entry for entry in grid.entries(asked, FILES, 0.25, 64, {})}
    ours, theirs = entries["own rules"], entries["torch own rules"]
    assert (ours.kind, theirs.kind) == ("engine", "torch")
    assert ours.options == {"system": "hybrimoe", **rules, "cache_ratio": 0.25, "max_context": 64}
    assert theirs.options == {"mode": "hybrimoe", **rules, "cache_ratio": 0.25, "max_context": 64}
    rows = [paced(name, 1.0, 1.0) for name in ("hybrimoe", "torch own rules")]
    assert next(bar["value"] for bar in bars.paced_bars(rows)) is None, "they are no mode that a bar is about"


@pytest.mark.slow
def test_a_whole_run_of_the_bundled_model(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent)  # where contenders find the rule
    chosen = "--models bundled --formats f32 --ratios 0.5 --prompts 8 --systems hybrimoe,on-demand"
    chosen += " --peers torch,transformers --cache own_rules:Fading:decay=0.5"
    assert bench.main(["e2e", *chosen.split(), "--rounds", "1", "--new", "3", "--workdir", str(tmp_path)]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    golden.check(record)
    ours = [row for row in record["rows"] if row["kind"] == "engine"]
    assert {row["contender"] for row in ours} == {"hybrimoe", "on-demand", "own rules"} and record["commit"]
    torch = {row["contender"]: row for row in record["rows"] if row["kind"] == "torch"}
    assert {"torch hybrid", "torch own rules"} <= set(torch) and not record["left_out"]
    assert all(row["token_differences"] == 0 for row in torch.values())
    for row in ours:
        assert row["token_differences"] == 0 and row["threads_kept"]
        assert row["times_floor"]["tbt"] > 1 and row["times_floor"]["ttft"] > 1
