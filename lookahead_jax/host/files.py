"""Atomic file writing: a reader, or a crash, never sees a partial file.

A regular file is replaced in one step: through symbolic links, keeping its mode. Anything else
(a device, a FIFO, an open descriptor such as /dev/stdout) is opened and written. `-` is standard
output.
"""

import contextlib
import os
import re
import secrets
import shutil
import signal
import stat
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

_UMASK = os.umask(0)  # it can only be read by setting it
os.umask(_UMASK)
_MODE = 0o666 & ~_UMASK
_FATAL = (signal.SIGTERM, signal.SIGHUP)  # these end a process without its `finally` blocks
_DESCRIPTOR = re.compile(r"/(?:dev|proc/self)/fd/(\d+)")


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path; what the body leaves there becomes the content of `path`.

    The body writes a file or makes a directory. An exception, SIGTERM, or a body that writes
    nothing leaves `path` as it was, and no temporary file. A file replaces an existing one, a
    directory only an empty one (else OSError). The temporary name keeps the suffix, on which
    writers like `numpy.savez` depend.
    """
    target = _regular(path)
    if target is None:
        with tempfile.TemporaryDirectory() as folder, _cleanup_on_signals():
            temporary = Path(folder) / f"content{Path(path).suffix}"
            yield temporary
            with open(temporary, "rb") as content, _open_stream(path) as stream:
                shutil.copyfileobj(content, stream)
        return
    _check_parent(path, target)
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(4)}{target.suffix}")
    with _cleanup_on_signals():
        try:
            yield temporary
            _replace(temporary, target)
        finally:
            if temporary.is_dir():
                shutil.rmtree(temporary)
            else:
                temporary.unlink(missing_ok=True)


def atomic_write(path: str | os.PathLike, content: str | bytes) -> None:
    """Makes `content` (text as UTF-8) the whole content of `path`, or leaves `path` as it was."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def save_arrays(path: str | os.PathLike, **arrays: np.ndarray) -> None:
    """Writes named arrays as the .npz archive `path`, whatever its suffix, atomically."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def load_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads what `save_arrays` wrote; ValueError if the file is damaged or of another kind."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise ValueError("one array, not an archive")
        with loaded:
            return dict(loaded)
    # zipfile raises RuntimeError and NotImplementedError for header flags we never set.
    except (ValueError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a readable .npz archive: {error}") from error


def check_output(path: str | os.PathLike) -> None:
    """Raises OSError if a file cannot be written to `path`; call it before long work."""
    descriptor = _descriptor(path)
    if descriptor is not None:
        if not is_stdout(path):
            os.fstat(descriptor)
        return
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"cannot write {path}: it is a folder; name a file")
    if stat.S_ISSOCK(mode):
        raise OSError(f"cannot write {path}: it is a socket; name a file")
    if os.path.exists(path) and not os.access(path, os.W_OK):
        raise PermissionError(f"cannot write {path}: permission denied")
    if stat.S_ISREG(mode):
        parent = _check_parent(path, Path(os.path.realpath(path)))
        _probe(path, parent)


def make_folder(path: str | os.PathLike) -> Path:
    """Makes an output folder and its parents; OSError if files cannot be written into it."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(f"cannot write into {path}: {error.filename} is a file") from error
    _probe(path, path)
    return path


def is_stdout(path: str | os.PathLike) -> bool:
    """Whether `path` is standard output: `-`, /dev/stdout, /dev/fd/1 or a link to one of them."""
    return _descriptor(path) == 1


def _descriptor(path: str | os.PathLike) -> int | None:
    """The open descriptor that a path stands for. Opening it anew would truncate a file."""
    name = os.fspath(path)
    if name == "-":
        return 1
    name = os.path.abspath(name)
    for _ in range(40):  # as many links as the kernel follows
        if match := _DESCRIPTOR.fullmatch(name):
            return int(match[1])
        if not os.path.islink(name):
            return None
        name = os.path.normpath(os.path.join(os.path.dirname(name), os.readlink(name)))
    return None


def _regular(path: str | os.PathLike) -> Path | None:
    """The file or folder behind all links that `path` names or will name; None for a stream."""
    if _descriptor(path) is not None:
        return None
    with contextlib.suppress(FileNotFoundError):
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            return None
    return Path(os.path.realpath(path))


@contextlib.contextmanager
def _open_stream(path: str | os.PathLike) -> Iterator[BinaryIO | Any]:
    """A writable stream on what is not a regular file, which is neither created nor truncated."""
    if is_stdout(path):
        sys.stdout.flush()
        yield sys.stdout.buffer
        sys.stdout.flush()
        return
    descriptor = _descriptor(path)
    opened = os.open(path, os.O_WRONLY) if descriptor is None else os.dup(descriptor)
    with open(opened, "wb") as stream:
        yield stream


def _replace(temporary: Path, target: Path) -> None:
    """Puts a written file or folder in the place of `target`, on the disk when this returns."""
    if temporary.is_dir():
        for file in temporary.rglob("*"):
            _sync(file)
    _sync(temporary)
    if temporary.is_file():
        mode = _MODE  # some writers make their files private
        if target.is_file():
            before = target.stat()
            mode = stat.S_IMODE(before.st_mode)
            with contextlib.suppress(PermissionError):
                os.chown(temporary, before.st_uid, before.st_gid)
        temporary.chmod(mode)
    os.replace(temporary, target)
    _sync(target.parent)


@contextlib.contextmanager
def _cleanup_on_signals() -> Iterator[None]:
    """Lets `finally` blocks run before a signal ends the process; keeps handlers of others."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def unwind(number: int, frame: object) -> None:
        received.append(number)
        raise SystemExit(128 + number)

    caught = [number for number in _FATAL if signal.getsignal(number) == signal.SIG_DFL]
    for number in caught:
        signal.signal(number, unwind)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)
        if received:
            os.kill(os.getpid(), received[0])


def _check_parent(path: str | os.PathLike, target: Path) -> Path:
    """The folder in which `target` will be written."""
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {target.parent}")
    return target.parent


def _probe(path: str | os.PathLike, folder: Path) -> None:
    """Makes a nameless file in `folder`: permissions alone do not tell what root may do."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise type(error)(f"cannot write {path}: {reason} in folder {folder}") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
