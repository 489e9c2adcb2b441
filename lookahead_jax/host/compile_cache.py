"""Where commands keep compiled programs from one call to the next."""

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

MAX_BYTES = 2**30  # the least recently used programs make room
_LEAST_FREE = 2**28
_MINUTE = 60.0
_FOLDER = "JAX_COMPILATION_CACHE_DIR"
# JAX reads these when it is imported. Small programs are kept too: a call needs dozens of them.
_SETTINGS = {
    "JAX_COMPILATION_CACHE_MAX_SIZE": str(MAX_BYTES),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def keep_compiled_programs() -> str | None:
    """Lets JAX keep compiled programs in the user's cache folder; why it cannot, or None.

    To be called before JAX is imported. The user's own JAX_COMPILATION_CACHE_DIR stays in force. In
    JAX's key of a program are the program itself, its options, the version of jaxlib, and the
    instruction set of the processor.
    """
    if _FOLDER in os.environ or "jax" in sys.modules:
        return None
    base = os.environ.get("XDG_CACHE_HOME", "")
    base = base if os.path.isabs(base) else os.path.expanduser("~/.cache")
    folder = Path(base) / "lookahead_jax" / "compiled"
    if (problem := _problem(folder)) is not None:
        return f"compiled programs are not kept in {folder}: {problem}"
    os.environ[_FOLDER] = str(folder)
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    return None


def _problem(folder: Path) -> str | None:
    """Makes the folder ready; what keeps it from being used."""
    if not folder.is_absolute():
        return "there is no home folder; set XDG_CACHE_HOME"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid():  # programs are code, and run as it is stored
            return "it belongs to another user"
        with tempfile.TemporaryFile(dir=folder):
            pass
        if shutil.disk_usage(folder).free < _LEAST_FREE:
            return f"its disk has less than {_LEAST_FREE >> 20} MiB left"
        _remove_halves(folder)
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return None


def _remove_halves(folder: Path) -> None:
    """Removes what a killed process left of an entry: JAX writes its time of use last."""
    now = time.time()
    names = {file.name for file in folder.iterdir()}
    for suffix, other in (("-cache", "-atime"), ("-atime", "-cache")):
        for name in names:
            if name.endswith(suffix) and name.removesuffix(suffix) + other not in names:
                file = folder / name
                if now - file.stat().st_mtime > _MINUTE:  # else another process is writing it
                    file.unlink(missing_ok=True)
