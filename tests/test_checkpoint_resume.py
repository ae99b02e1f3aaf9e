"""Conversion is all or nothing: one that was killed, interrupted or refused by the disk goes on where it was."""

from __future__ import annotations

import errno
import fcntl
import importlib
import os
import shutil
import signal
import subprocess
import sys

import checkpoint_folders as folders
import pytest
from checkpoint_folders import assert_same, contents

from hybrimoe_jax.checkpoint import shards
from hybrimoe_jax.checkpoint import writer as checkpoint_writer
from hybrimoe_jax.checkpoint.convert import convert
from hybrimoe_jax.errors import UserError

try:
    import resource
except ImportError:
    resource = None


command = importlib.import_module("hybrimoe_jax.convert")


class Killed(Exception):
    pass


def stop_after(count: int):
    def progress(items, total, label):
        for i, item in enumerate(items):
            if i == count:
                raise Killed
            yield item

    return progress


def test_the_same_conversion_gives_the_same_bytes(tmp_path):
    """Also where it was killed and went on, and whatever the destination's name."""
    src = folders.write_hf(tmp_path / "hf", folders.tensors())
    first, second = convert(src, tmp_path / "first"), tmp_path / "second"
    with pytest.raises(Killed):
        convert(src, second, progress=stop_after(2))
    convert(src, second)
    files = [{p.relative_to(d): p.read_bytes() for p in d.rglob("*") if p.is_file()} for d in (first, second)]
    assert files[0] == files[1]


@pytest.fixture
def written(monkeypatch):
    """Names of the shards that a conversion writes."""
    names = []

    def spy(folder, shard, *args):
        names.append(shard.name)
        return shards.write_shard(folder, shard, *args)

    monkeypatch.setattr(checkpoint_writer, "write_shard", spy)
    return names


def test_resume_skips_finished_shards(tmp_path, written):
    weights = folders.tensors()
    src, dst = folders.write_hf(tmp_path / "hf", weights), tmp_path / "ckpt"
    with pytest.raises(Killed):
        convert(src, dst, progress=stop_after(2))
    assert written == ["outer", "layer_00000"] and not dst.exists()
    written.clear()
    convert(src, dst)
    assert written == ["layer_00001"]
    assert_same(contents(dst), weights)
    assert not (tmp_path / "ckpt.partial").exists()


def test_an_interrupted_command_says_how_to_go_on(tmp_path, written, monkeypatch, capsys):
    src, dst = folders.write_hf(tmp_path / "hf", folders.tensors()), tmp_path / "ckpt"

    def interrupted(items, total, label):
        yield from stop_after(1)(items, total, label)

    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(command, "return_freed_memory", lambda: None)  # it would slow every later test of this process
    monkeypatch.setattr(command.cli, "progress", interrupted)
    monkeypatch.setattr(sys.modules[__name__], "Killed", KeyboardInterrupt)
    assert command.main([str(src), str(dst)]) == 130
    assert capsys.readouterr().err == "interrupted; the same command goes on from here\n"
    assert written == ["outer"]
    convert(src, dst)
    assert written == ["outer", "layer_00000", "layer_00001"]


@pytest.mark.parametrize("damage", ["dense", "expert", "lost", "record"])
def test_resume_rewrites_a_finished_shard_that_was_damaged(tmp_path, written, damage):
    weights = folders.tensors()
    src, dst = folders.write_hf(tmp_path / "hf", weights), tmp_path / "ckpt"
    with pytest.raises(Killed):
        convert(src, dst, progress=stop_after(2))
    work = tmp_path / "ckpt.partial"
    victim = folders.expert_file(work / "out", 0, 1)
    if damage == "dense":
        folders.flip_byte(work / "out/pieces/layer_00000/state/model.layers.0.mlp.gate.weight/c/0/0")
    elif damage == "expert":
        folders.flip_byte(victim)
    elif damage == "lost":
        victim.unlink()
    else:
        (work / "done" / "layer_00000.json").write_text('{"name": "layer')
    written.clear()
    convert(src, dst)
    assert written == ["layer_00000", "layer_00001"]
    assert_same(contents(dst), weights)


def test_resume_starts_over_when_source_or_format_changed(tmp_path, written):
    src, dst = folders.write_hf(tmp_path / "hf", folders.tensors()), tmp_path / "ckpt"
    for change in ("format", "source"):
        with pytest.raises(Killed):
            convert(src, dst, progress=stop_after(2))
        written.clear()
        if change == "source":
            shutil.rmtree(src)
            folders.write_hf(src, folders.tensors(seed=1))
        convert(src, dst, "bf16" if change == "format" else None)
        assert written == ["outer", "layer_00000", "layer_00001"]
        if change == "format":
            shutil.rmtree(dst)
    assert_same(contents(dst), folders.tensors(seed=1))


KILL_IN_A_LAYER = """
import os, signal, sys
from hybrimoe_jax.checkpoint import shards
from hybrimoe_jax.checkpoint.convert import convert
reads, read = 0, shards.ExpertRows.read
def deadly(self, start, stop):
    global reads
    reads += 1
    if reads == 7:  # the third expert of the second layer
        os.kill(os.getpid(), signal.SIGKILL)
    return read(self, start, stop)
shards.ExpertRows.read = deadly
convert(sys.argv[1], sys.argv[2])
"""


def test_killed_in_the_middle_of_a_layer(tmp_path, written):
    weights = folders.tensors()
    src, dst = folders.write_hf(tmp_path / "hf", weights), tmp_path / "ckpt"
    done = subprocess.run([sys.executable, "-c", KILL_IN_A_LAYER, src, dst], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not dst.exists()
    assert (tmp_path / "ckpt.partial" / "out" / "pieces" / "layer_00001").exists(), "half a layer must be lying there"
    convert(src, dst)
    assert written == ["layer_00001"]
    assert_same(contents(dst), weights)


KILLS = """
import os, signal, sys
import orbax.checkpoint.experimental.v1  # once, for all of the processes
from hybrimoe_jax.checkpoint.convert import convert

def converted(src, dst, deadly=0):
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        told = os.read(reading, 9)  # nothing of one that was killed
        os.close(reading)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (0 if told else -signal.SIGKILL)
        return int(told or -1)
    count = 0
    def note(event, args):
        nonlocal count
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and dst in str(args):
            count += 1
            if count == deadly:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(note)
    convert(src, dst)
    os.write(writing, str(count).encode())
    os._exit(0)

src, whole, *others = sys.argv[1:]
events = converted(src, whole)
assert events > 24
for number, dst in enumerate(others):
    assert converted(src, dst, 1 + number * events // len(others)) == -1 and not os.path.exists(dst)
    assert converted(src, dst) > 0
"""


@pytest.mark.slow
def test_killed_at_twelve_moments_and_given_again(tmp_path):
    src = folders.write_hf(tmp_path / "hf", folders.tensors())
    places = [tmp_path / name for name in ("whole", *map(str, range(12)))]
    done = subprocess.run([sys.executable, "-c", KILLS, src, *places], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    files = [{p.relative_to(d): p.read_bytes() for p in d.rglob("*") if p.is_file()} for d in places]
    assert all(one == files[0] for one in files)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["hf", *(p.name for p in places)])


@pytest.mark.skipif(resource is None, reason="the system limits no file's size")
def test_a_write_that_the_system_refuses_is_one_clear_error(tmp_path, capfd):
    """As a full disk in the middle of the work; the same command goes on when there is room."""
    weights = folders.tensors()
    src, dst = folders.write_hf(tmp_path / "hf", weights), tmp_path / "ckpt"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # an expert has more bytes
    try:
        with pytest.raises(UserError, match=rf"cannot be written \({os.strerror(errno.EFBIG)}\)"):
            convert(src, dst)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert capfd.readouterr() == ("", "") and not dst.exists()
    convert(src, dst)
    assert_same(contents(dst), weights)


def test_destination_is_never_overwritten_nor_shared(tmp_path):
    src = folders.write_hf(tmp_path / "hf", folders.tensors())
    (tmp_path / "empty").mkdir()
    convert(src, tmp_path / "empty")
    with pytest.raises(UserError, match="already exists"):
        convert(src, tmp_path / "empty")
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="not made by one"):
        convert(src, tmp_path / "mine")
    assert (tmp_path / "mine.partial" / "thesis.txt").exists()
    (tmp_path / "busy.partial").mkdir()
    with open(tmp_path / "busy.partial" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another conversion"):
            convert(src, tmp_path / "busy")


def test_full_disk_is_noticed_before_the_work(tmp_path, monkeypatch):
    src = folders.write_hf(tmp_path / "hf", folders.tensors())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 100, 100))
    with pytest.raises(UserError, match=r"needs 0\.0 GB but the disk has 0\.0 GB"):
        convert(src, tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()
