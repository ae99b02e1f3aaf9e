"""`python -m hybrimoe_jax.convert` on bad input: exit code 2, one line on stderr that names the file, and nothing
left behind."""

from __future__ import annotations

import functools
import importlib
import json
import os
import struct
import subprocess
import sys

import checkpoint_folders as folders
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hybrimoe_jax import cli
from hybrimoe_jax.checkpoint.convert import convert
from hybrimoe_jax.checkpoint.hugging_face import open_hf
from hybrimoe_jax.checkpoint.reader import open_checkpoint
from hybrimoe_jax.errors import UserError

command = importlib.import_module("hybrimoe_jax.convert")


def rewrite(folder, change) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def cut(folder) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def break_header(folder) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:8] + b"!" + data[9:])


def claim_a_huge_header(folder) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 40) + path.read_bytes()[8:])


def lose_a_tensor(folder) -> None:
    rewrite(folder, lambda w: w.pop("model.norm.weight"))


def several_faults(folder) -> None:
    def change(w):
        del w["model.norm.weight"], w[folders.expert(1, 2, "up")]
        w["model.layers.0.mlp.gate.bias"] = np.zeros(4, np.float32)
        w["lm_head.weight"] = w["lm_head.weight"][:, :9].copy()

    rewrite(folder, change)


def another_model(folder) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))


def pickles(folder) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def foreign_file(folder) -> None:
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")


def no_config(folder) -> None:
    (folder / "config.json").unlink()


def bad_json(folder) -> None:
    (folder / "config.json").write_text('{"model_type": "qwen2_moe",')


def nested_json(folder) -> None:
    (folder / "config.json").write_text("[" * 100_000 + "]" * 100_000)


def config_is_a_list(folder) -> None:
    (folder / "config.json").write_text("[]")


def quantised(folder) -> None:
    rewrite(folder, lambda w: w.update({folders.expert(0, 0, "down"): np.zeros((16, 8), np.int8)}))


def prediction_layer(folder) -> None:
    rewrite(folder, lambda w: w.update({"model.layers.2.eh_proj.weight": np.zeros((16, 32), np.float32)}))


def adapter(folder) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


FAULTS = [
    (adapter, ["adapter_config.json: an adapter (PEFT) lies beside the weights", "merge it"]),
    (cut, ["model.safetensors: it should have", "truncated or corrupt"]),
    (break_header, ["model.safetensors: its header is not JSON"]),
    (claim_a_huge_header, ["its header claims 1099511627776 bytes"]),
    (lose_a_tensor, ["1 missing: model.norm.weight"]),
    (
        several_faults,
        [
            "2 missing: model.norm.weight, model.layers.1.mlp.experts.2.up_proj.weight;",
            "1 of another shape: lm_head.weight is [24, 9], not [24, 16];",
            "1 unexpected: model.layers.0.mlp.gate.bias",
        ],
    ),
    (another_model, ["model_type 'llama' is not supported"]),
    (pickles, ["weights are pickles (pytorch_model.bin)", "save_pretrained"]),
    (foreign_file, ["neither model.safetensors nor", "(found consolidated.safetensors)"]),
    (no_config, ["no config.json"]),
    (bad_json, ["config.json: not valid JSON"]),
    (nested_json, ["config.json: not valid JSON"]),
    (config_is_a_list, ["config.json: not a JSON object"]),
    (quantised, ["model.layers.0.mlp.experts.0.down_proj.weight is stored as I8"]),
    (prediction_layer, ["layer 2 beyond num_hidden_layers 2: multi-token-prediction"]),
]
AS_A_COMMAND = {cut, lose_a_tensor, another_model, pickles}


def process(*args) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "hybrimoe_jax.convert", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def run(monkeypatch, in_process):
    """run(*arguments): the command in this process."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(command, "return_freed_memory", lambda: None)  # it would slow every later test of this process
    return functools.partial(in_process, command.main)


def assert_one_line(done: subprocess.CompletedProcess, *parts: str) -> None:
    assert done.returncode == 2, done
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert not done.stdout
    for part in parts:
        assert part in lines[0]


@pytest.mark.parametrize(("fault", "parts"), FAULTS, ids=lambda v: getattr(v, "__name__", ""))
def test_a_bad_source_is_one_error_and_leaves_nothing(tmp_path, fault, parts, run):
    src = folders.write_hf(tmp_path / "hf", folders.tensors())
    fault(src)
    if fault is several_faults:
        assert_one_line(process(src, tmp_path / "ckpt"), *parts)
    elif fault in AS_A_COMMAND:
        assert_one_line(run(src, tmp_path / "ckpt"), *parts)
    else:
        with pytest.raises(UserError) as caught:
            convert(src, tmp_path / "ckpt")
        assert "\n" not in str(caught.value)
        for part in parts:
            assert part in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_wrong_places(tmp_path, run):
    src = folders.write_hf(tmp_path / "hf", folders.tensors())
    assert_one_line(run("no/such/folder", tmp_path / "ckpt"), "no/such/folder: no such folder")
    done = run(src, tmp_path / "ckpt")
    assert done.returncode == 0 and done.stdout.startswith(f"{tmp_path / 'ckpt'}: ") and not done.stderr, done
    assert_one_line(run(src, tmp_path / "ckpt"), "already exists")
    for source, why in ((tmp_path / "ckpt", "already a converted checkpoint"), (src / "config.json", "is a file")):
        with pytest.raises(UserError, match=why):
            convert(source, tmp_path / "other")
    (tmp_path / "ckpt" / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json is missing from this converted checkpoint"):
        convert(tmp_path / "ckpt", tmp_path / "other")


def test_export_command(tmp_path, run, plain_model):
    weights, ckpt = folders.tensors(), plain_model()
    unconverted = folders.write_hf(tmp_path / "hf", weights)
    assert_one_line(run(unconverted, tmp_path / "back", "--export-hf"), "not converted yet")
    done = run(ckpt, tmp_path / "back", "--export-hf")
    assert done.returncode == 0, done.stderr
    assert all(np.array_equal(weights[n], a) for n, a in load_file(tmp_path / "back" / "model.safetensors").items())
    done = run(ckpt, tmp_path / "back2", "--export-hf", "--format", "bf16")
    assert done.returncode == 2 and "--format bf16 does not go with --export-hf" in done.stderr


def sharded(tmp_path):
    src = folders.write_hf(tmp_path / "hf", folders.tensors(), shards=3)
    return src, json.loads((src / "model.safetensors.index.json").read_text())["weight_map"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda src, where: (src / "model-00002-of-00003.safetensors").unlink(),
            "1 of 3 shards are missing: model-00002-of-00003",
        ),
        (
            lambda src, where: where.update({"model.norm.weight": "../secret.safetensors"}),
            r"names \.\./secret\.safetensors",
        ),
        (lambda src, where: where.update({"model.norm.weight": "model.bin"}), "shards must be .safetensors files"),
        (lambda src, where: where.clear(), "no weight_map"),
        (
            lambda src, where: where.update({"ghost.weight": where["model.norm.weight"]}),
            r"places ghost\.weight in shards",
        ),
    ],
)
def test_a_bad_index(tmp_path, change, message):
    src, where = sharded(tmp_path)
    change(src, where)
    (src / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(UserError, match=message):
        convert(src, tmp_path / "ckpt")


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    src, where = sharded(tmp_path)
    first, last = sorted(set(where.values()))[::2]
    save_file(load_file(src / last) | {k: v + 1 for k, v in load_file(src / first).items()}, src / last)
    with pytest.raises(UserError, match=f"is in {first} and in {last}"):
        convert(src, tmp_path / "ckpt")


@pytest.mark.parametrize("shards_there", [True, False])
def test_an_index_left_over_from_earlier_weights_is_not_read(tmp_path, shards_there):
    """transformers reads the single file, too, where both are there."""
    src, where = sharded(tmp_path)
    new = {name: array + 1 for name, array in folders.tensors().items()}
    save_file(new, src / "model.safetensors")
    for name in () if shards_there else set(where.values()):
        (src / name).unlink()
    out = open_checkpoint(convert(src, tmp_path / "ckpt"))
    np.testing.assert_array_equal(out.dense(["model.norm.weight"])["model.norm.weight"], new["model.norm.weight"])


def test_a_long_list_of_names_is_cut_with_its_count(tmp_path):
    weights = {n: a for n, a in folders.tensors().items() if ".experts." not in n}
    with pytest.raises(UserError, match=r"24 missing: (model\S+ ){19}model\S+ and 4 more$"):
        convert(folders.write_hf(tmp_path / "hf", weights), tmp_path / "ckpt")


def exit_of(main, capsys) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        cli.run(main)
    return caught.value.code, capsys.readouterr().err


def test_exit_codes(capsys, tmp_path):
    def bad():
        raise UserError("first\n  second")

    assert exit_of(lambda: None, capsys) == (0, "")
    assert exit_of(bad, capsys) == (2, "error: first second\n")
    assert exit_of(lambda: open(tmp_path / "absent"), capsys) == (
        2,
        f"error: {tmp_path / 'absent'}: No such file or directory\n",
    )


def test_a_closed_pipe_is_quiet():
    code = "from hybrimoe_jax import cli\ncli.run(lambda: [print('x' * 1000) for _ in range(2000)] and 0)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.close()
    assert child.stderr.read() == b"" and child.wait(60) == 141
    child.stderr.close()


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_only_on_a_terminal(terminal):
    code = "from hybrimoe_jax import cli, progress\nprogress.SOON_S = progress.EVERY_S = 0\n"
    code += "print(list(cli.progress(range(5), 5, 'working')))"
    leader, follower = os.openpty()
    stderr = follower if terminal else subprocess.PIPE
    environment = os.environ | {"TERM": "xterm"}
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=stderr, env=environment)
    out = child.communicate(timeout=60)
    os.close(follower)
    shown = os.read(leader, 10000) if terminal else out[1]
    os.close(leader)
    assert out[0] == b"[0, 1, 2, 3, 4]\n"
    assert (b"working" in shown) == terminal and (terminal or shown == b"")


def test_two_names_of_one_tensor_are_refused(tmp_path):
    """transformers writes Mixtral's routers and experts under two names, by version."""
    kept = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_experts_per_tok")
    base = {key: folders.CONFIG[key] for key in kept} | {"model_type": "mixtral", "num_local_experts": 2}
    base |= {"intermediate_size": 8, "num_key_value_heads": 1}
    names = ("block_sparse_moe.gate.weight", "mlp.gate.weight")
    tensors = {f"model.layers.0.{name}": np.zeros((2, folders.WIDTH), np.float32) for name in names}
    folders.write_hf(tmp_path / "hf", folders.tensors() | tensors, base=base)
    with pytest.raises(UserError, match=r"block_sparse_moe\.gate\.weight .* are both model"):
        open_hf(tmp_path / "hf")
