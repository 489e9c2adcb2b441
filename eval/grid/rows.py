"""The rows of a run: one JSON object per example, appended so that a kill costs at most a batch."""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROWS = "rows.jsonl"
VIEWS = "views.jsonl"


class Cell(NamedTuple):
    """One point of the grid; with an example's id it names a row."""

    model: str
    policy: str
    budget: int  # 0: everything is kept
    task: str
    length: int
    drafter: str
    protocol: str  # "seen" or "hidden": whether the question is there while the prompt is cut


Key = tuple[Cell, str]
"""A cell and an example's id."""


def key_of(row: Mapping[str, Any]) -> Key:
    """Which example of which cell a row is."""
    return Cell(*(row[name] for name in Cell._fields)), row["id"]


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, a torn last line left out.

    Raises ValueError for a line that is broken anywhere else.
    """
    if not path.is_file():
        return
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):  # what follows the last line break is torn
        if line:
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None


class RowFile:
    """A file of rows, open for appending; a torn last line is cut off first.

    Raises BlockingIOError if another process has it open.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise BlockingIOError(f"{path} is being written by another run") from None
        self._file.seek(0)
        content = self._file.read()
        self._file.truncate(content.rfind(b"\n") + 1)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """All rows in one write, on the disk when this returns."""
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        self._file.write(text.encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Nothing more will come."""
        self._file.close()
