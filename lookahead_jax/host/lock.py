"""A lock on a run's folder: two processes never write the same run."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

LOCK = "lock"


@contextlib.contextmanager
def folder_lock(folder: Path, name: str = LOCK) -> Iterator[None]:
    """Holds the file `name` in an existing folder until the block ends, or the process dies.

    Raises BlockingIOError, naming the holder, if another process holds it. The file stays: deleting
    it would let a third process lock a file that nobody sees.
    """
    path = folder / name
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise BlockingIOError(
                f"{folder} is being written by {holder}: wait for it, stop it, or choose another "
                "folder"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
