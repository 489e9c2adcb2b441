"""Outputs: regular files are replaced whole, anything else is written to; checked beforehand."""

import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from lookahead_jax.host.files import (
    atomic_path,
    atomic_write,
    check_output,
    is_stdout,
    load_arrays,
    make_folder,
    save_arrays,
)

ROOT = Path(__file__).parent.parent


def python(code: str, *args: object, **options) -> subprocess.Popen:
    code = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}"
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], **options)


def test_a_file_is_replaced_through_links_and_keeps_its_mode(tmp_path):
    target, link = tmp_path / "data" / "target.txt", tmp_path / "link"
    target.parent.mkdir()
    target.write_text("old")
    target.chmod(0o600)
    link.symlink_to("data/target.txt")
    atomic_write(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o600
    dangling = tmp_path / "dangling"
    dangling.symlink_to("data/later.txt")
    check_output(dangling)
    atomic_write(dangling, "first")
    assert (tmp_path / "data" / "later.txt").read_text() == "first"
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "dangling", "data", "later.txt", "link", "target.txt",
    ]  # fmt: skip


def test_devices_are_written_and_stay_devices(tmp_path):
    null = Path("/dev/null")
    check_output(null)
    atomic_write(null, "gone")
    save_arrays(null, a=np.ones(2))
    assert null.is_char_device()
    link = tmp_path / "link"
    link.symlink_to(null)
    atomic_write(link, "gone")
    assert link.is_symlink()


def test_a_fifo_receives_the_content(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    check_output(fifo)
    received = []
    reader = threading.Thread(target=lambda: received.append(fifo.read_bytes()))
    reader.start()
    save_arrays(fifo, a=np.arange(3))
    reader.join()
    assert fifo.is_fifo()
    with np.load(io.BytesIO(received[0])) as arrays:
        np.testing.assert_array_equal(arrays["a"], [0, 1, 2])


@pytest.mark.parametrize("name", ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_standard_output_receives_the_content_behind_what_was_printed(name, kind, tmp_path):
    code = (
        "from lookahead_jax.host.files import *\n"
        "check_output(sys.argv[1]); assert is_stdout(sys.argv[1])\n"
        "print('before'); atomic_write(sys.argv[1], 'content\\n'); print('after')"
    )
    out = tmp_path / "out"
    with out.open("wb") as file:
        process = python(
            code, name, cwd=tmp_path, stdout=file if kind == "file" else subprocess.PIPE
        )
        printed, _ = process.communicate()
    assert process.returncode == 0
    assert (out.read_bytes() if kind == "file" else printed) == b"before\ncontent\nafter\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_open_descriptor_receives_the_content():
    readable, writable = os.pipe()
    try:
        name = f"/dev/fd/{writable}"  # what a shell gives for >(command)
        check_output(name)
        assert not is_stdout(name)
        atomic_write(name, "through the pipe")
        assert os.read(readable, 100) == b"through the pipe"
    finally:
        os.close(readable)
        os.close(writable)
    with pytest.raises(OSError, match="descriptor"):
        check_output(name)


def test_outputs_that_cannot_be_written_are_named_before_the_work(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for path, message in (
        (tmp_path, "it is a folder"),
        (tmp_path / "absent" / "x", "there is no folder"),
        (file / "x", "there is no folder|Not a directory"),
        (Path("/proc/x.json"), "in folder /proc"),  # nobody may write there, not even root
    ):
        with pytest.raises(OSError, match=message):
            check_output(path)
    for folder, message in ((file, "is a file"), (file / "x", "is a file"), ("/proc", "in folder")):
        with pytest.raises(OSError, match=message):
            make_folder(folder)
    assert make_folder(tmp_path / "a" / "b").is_dir()
    check_output(file)
    assert file.read_bytes() == b""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "file"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_no_temporary_file(number, tmp_path):
    path = tmp_path / "out.npz"
    path.write_bytes(b"old")
    code = (
        "import time\n"
        "from lookahead_jax.host.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as temporary:\n"
        "    temporary.write_bytes(b'half'); print('ready', flush=True); time.sleep(60)"
    )
    process = python(code, path, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    assert process.wait(timeout=30) == -number
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_handlers_of_others_are_kept(tmp_path):
    caught = []
    before = signal.signal(signal.SIGTERM, lambda *_: caught.append(True))
    try:
        with atomic_path(tmp_path / "file") as temporary:
            os.kill(os.getpid(), signal.SIGTERM)
            temporary.write_text("whole")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught
    assert (tmp_path / "file").read_text() == "whole"


def test_what_is_no_archive_is_said(tmp_path):
    np.save(tmp_path / "one.npy", np.ones(2))
    with pytest.raises(ValueError, match=r"one.npy is not a readable .npz archive"):
        load_arrays(tmp_path / "one.npy")
