"""Writing files so that a reader, or a crash, never meets half of one."""

import contextlib
import os
import secrets
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_UMASK = os.umask(0)  # it can only be read by setting it
os.umask(_UMASK)
_MODE = 0o666 & ~_UMASK


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what the body leaves there becomes `path`.

    The body writes a file or makes a directory. An exception, or a body that writes nothing,
    leaves `path` as it was. A file replaces an existing one, a directory only an empty one (else
    OSError). The temporary name keeps the suffix, on which writers like `numpy.savez` depend.
    """
    path = Path(path)
    check_parent(path)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        if temporary.is_file():
            temporary.chmod(_MODE)  # some writers make their files private
        if temporary.is_dir():
            for file in temporary.rglob("*"):
                _sync(file)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
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
    """What `save_arrays` wrote; ValueError if the file is damaged or anything else."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise ValueError("not a .npz archive")
        with loaded:
            return dict(loaded)
    # RuntimeError is what zipfile has for flags that no archive of ours sets.
    except (ValueError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} holds no arrays: {error}") from error


def check_parent(path: str | os.PathLike) -> None:
    """Raises FileNotFoundError before long work whose result could not be stored at `path`."""
    parent = Path(path).resolve().parent
    if not parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {parent}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
