"""Where results are written: whatever else than a plain file a path can be."""

from __future__ import annotations

import os
import pathlib
import stat
import subprocess
import sys
import threading

import pytest

from hybrimoe_jax import files
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.files import check_folder_to_be, check_outputs, check_writable, replacing

BEYOND_A_PIPE = "x" * 300_000


def write(path, text="new"):
    check_writable(path, "--out")
    with replacing(path) as file:
        file.write(text)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE_S", 0.2)
    monkeypatch.setattr(files, "STUCK_S", 0.2)
    yield tmp_path
    assert not list(tmp_path.rglob("*.part"))


def test_a_link_stays_and_its_file_is_replaced(folder):
    (folder / "real").mkdir()
    os.symlink(folder / "real", folder / "linked")
    os.symlink("../real/a.txt", folder / "real" / "b.txt")
    write(folder / "linked" / "b.txt")  # which was not there
    write(folder / "linked" / "b.txt", "newer")
    assert (folder / "real" / "b.txt").is_symlink()
    assert (folder / "real" / "a.txt").read_text() == "newer"


def test_a_file_keeps_its_permissions_and_a_new_one_has_the_usual(folder):
    (folder / "secret").write_text("old")
    os.chmod(folder / "secret", 0o640)
    write(folder / "secret")
    write(folder / "fresh")
    assert [stat.S_IMODE(os.stat(folder / name).st_mode) for name in ("secret", "fresh")] == [0o640, 0o644]


@pytest.mark.parametrize("mode", ["w", "wb"])
def test_a_pipe_is_written_into_as_a_whole(mode, folder):
    os.mkfifo(folder / "pipe")
    got = []
    reader = threading.Thread(target=lambda: got.append((folder / "pipe").read_text()))
    reader.start()
    check_writable(folder / "pipe", "--out")
    with replacing(folder / "pipe", mode) as file:
        file.write(BEYOND_A_PIPE if mode == "w" else BEYOND_A_PIPE.encode())
    reader.join()
    assert got == [BEYOND_A_PIPE] and stat.S_ISFIFO(os.stat(folder / "pipe").st_mode)


def test_a_pipe_gets_nothing_of_what_failed(folder):
    os.mkfifo(folder / "pipe")
    reader = os.open(folder / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(ZeroDivisionError), replacing(folder / "pipe") as file:
        file.write(f"half {1 // 0}")
    assert os.read(reader, 9) == b""
    os.close(reader)


def test_a_pipe_that_nobody_reads_is_an_error(folder):
    os.mkfifo(folder / "pipe")
    with pytest.raises(UserError, match="nobody has opened this pipe"):
        write(folder / "pipe")
    reader = os.open(folder / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(UserError, match="nobody has read what is in this pipe"):
        write(folder / "pipe", BEYOND_A_PIPE)
    os.close(reader)


def test_a_device_is_written_into(folder):
    write("/dev/null")
    assert stat.S_ISCHR(os.lstat("/dev/null").st_mode)
    with pytest.raises(UserError, match=r"/dev/full: cannot be written .No space"):
        write("/dev/full")


@pytest.mark.parametrize(
    ("target", "out"),
    [("/dev/stdout", "before\nnew\nafter\n"), ("/proc/self/fd/1", "before\nnew\nafter\n"), ("/dev/stderr", None)],
)
@pytest.mark.parametrize("into", ["file", "pipe"])
def test_the_programs_own_output_is_written_into_in_order(target, out, into, folder):
    program = f"from hybrimoe_jax.files import *\nprint('before')\ncheck_writable({target!r}, '')\n"
    program += f"with replacing({target!r}) as file: file.write('new\\n')\nprint('after')\n"
    with open(folder / "out", "w") as file:
        where = file if into == "file" else subprocess.PIPE
        done = subprocess.run([sys.executable, "-c", program], stdout=where, stderr=subprocess.PIPE, text=True)
    got = done.stdout if into == "pipe" else (folder / "out").read_text()
    assert (got, done.stderr) == ((out, "") if out else ("before\nafter\n", "new\n"))


def test_what_takes_no_result_is_refused_before_the_work(folder):
    import socket

    (folder / "folder").mkdir()
    (folder / "file").write_text("")
    os.symlink(folder / "turn", folder / "turn")
    os.symlink(folder / "gone" / "x", folder / "astray")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(folder / "socket"))
    for name, said in {
        "folder": "it is a folder; give a file",
        "socket": "it is a socket; give a file",
        "file/x": "cannot be written",
        "gone/x": "there is no folder",
        "astray": "there is no folder",
        "turn": "Too many levels of symbolic links",
        "y" * 256: "File name too long",
        "new/": "is no name of a file",
    }.items():
        with pytest.raises(UserError, match=f"--out.*{said}"):
            check_writable(f"{folder}/{name}", "--out")
        with pytest.raises(UserError), replacing(f"{folder}/{name}"):
            pass
    server.close()
    for odd in ("", "a\0b", 5, None):
        with pytest.raises(UserError, match=r"--out: .* is no "):
            check_writable(odd, "--out")  # pyright: ignore[reportArgumentType]
        with pytest.raises(UserError, match="is no "), replacing(odd):  # pyright: ignore[reportArgumentType, reportCallIssue]
            pass


def test_a_block_device_is_refused(folder, monkeypatch):
    monkeypatch.setattr(files.stat, "S_ISBLK", stat.S_ISREG)
    monkeypatch.setitem(files.KINDS, stat.S_ISREG, "a block device")
    (folder / "disk").write_text("all that I have")
    for run in (lambda: check_writable(folder / "disk", "--out"), lambda: write(folder / "disk")):
        with pytest.raises(UserError, match="it is a block device"):
            run()
    assert (folder / "disk").read_text() == "all that I have"


@pytest.fixture
def as_nobody():
    """Root may write everywhere."""
    if os.geteuid():
        yield
        return
    os.setegid(65534)
    os.seteuid(65534)
    yield
    os.seteuid(0)
    os.setegid(0)


@pytest.fixture
def locked(folder):
    for above in (folder, *folder.parents):
        if above.stat().st_uid == os.getuid() and above != pathlib.Path("/"):
            os.chmod(above, above.stat().st_mode | 0o755)
    inner = folder / "locked"
    inner.mkdir()
    for name, mode in (("open", 0o666), ("kept", 0o444)):
        (inner / name).write_text("old, and longer")
        os.chmod(inner / name, mode)
    os.chmod(inner, 0o555)
    yield inner
    os.chmod(inner, 0o755)


def test_in_a_read_only_folder_what_is_writable_is_written(locked, as_nobody):
    write(locked / "open")
    assert (locked / "open").read_text() == "new"
    for name, said in (("fresh", "Permission denied"), ("kept", "it is write-protected")):
        for run in (lambda name=name: check_writable(locked / name, "--out"), lambda name=name: write(locked / name)):
            with pytest.raises(UserError, match=f"{name}: cannot be written .*{said}"):
                run()
    with pytest.raises(UserError, match=r"--run .*cannot be written"):
        check_folder_to_be(locked / "run", "--run")


def test_a_file_that_is_mounted_by_itself_is_written_in_place(folder, monkeypatch):
    import errno

    def busy(*_):
        raise OSError(errno.EBUSY, "busy")

    (folder / "file").write_text("old")
    monkeypatch.setattr(files.os, "replace", busy)
    write(folder / "file")
    assert (folder / "file").read_text() == "new"


def test_a_full_disk_is_one_error_and_the_old_file_stays(folder):
    import resource

    (folder / "file").write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot be written .File too large"):
            write(folder / "file", "x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (folder / "file").read_text() == "old"


def test_what_is_read_is_not_written_over_and_two_results_are_two_files(folder):
    (folder / "model").mkdir()
    for name in ("in", "model/config.json"):
        (folder / name).write_text("mine")
    os.symlink(folder / "in", folder / "alias")
    for name, given in (("in", "in"), ("alias", "in"), ("model/config.json", "model")):
        with pytest.raises(UserError, match=r"--out .*: it is one of the files to read"):
            check_outputs({"--out": folder / name}, [None, "laptop-8gb", folder / given])
    check_outputs({"--out": folder / "model" / "new.npz", "--more": None}, [folder / "model"])
    check_outputs({"--a": "/dev/null", "--b": "/dev/null"}, ["/dev/null"])
    with pytest.raises(UserError, match=r"--b .*: --a is written there, too"):
        check_outputs({"--a": folder / "x", "--b": f"{folder}/model/../x"})


def test_a_folder_to_be_is_where_its_links_lead(folder):
    (folder / "a" / "b").mkdir(parents=True)
    os.symlink(folder / "a" / "b", folder / "link")
    check_folder_to_be(folder / "link" / ".." / "new" / "newer", "--run")
    for name, said in (("", "the name is empty"), ("a\0b", "null (byte|character)"), ("y" * 300, "too long")):
        with pytest.raises(UserError, match=f"--run.*{said}"):
            check_folder_to_be(name, "--run")
