"""The rows of a run: one JSON object per example, appended so that a kill loses at most a batch."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROWS = "rows.jsonl"
VIEWS = "views.jsonl"


class GridCell(NamedTuple):
    """One point of the grid; with an example's id it names a row."""

    model: str
    policy: str
    budget: int  # 0: everything is kept
    task: str
    length: int
    drafter: str
    protocol: str  # "seen" or "hidden": whether the question is part of the compressed prompt
    strategy: str = "none"  # rows of runs without strategies have no such field


Key = tuple[GridCell, str]
"""A cell and an example's id."""


Fields = Mapping[str, tuple[type, ...]]
"""The fields that a reader needs of a row, with the types that they may have."""
_NUMBER = (int, float)
_NONE = type(None)
_KEY: Fields = {name: (kind,) for name, kind in GridCell.__annotations__.items()} | {"id": (str,)}
ANSWERED: Fields = _KEY | {"predicted_answer": (str,)}
"""Fields that resuming a run needs."""
MEASURED: Fields = ANSWERED | {
    "score": (*_NUMBER, _NONE), "binary": (bool,), "answer": (list,), "question": (str,),
    "prompt_tokens": (int,), "new_tokens": (int,), "first_of_batch": (str,),
    "ttft_s": (*_NUMBER, _NONE),
    "peak_bytes": (int, _NONE), "peak_is_bound": (bool,), "cache_bytes": (int,),
    "draft_lengths": (list,),
}  # fmt: skip
"""Fields that the report needs."""
VIEWED: Fields = ANSWERED | {"pieces": (list,), "kept": (list,), "answer": (list,)}
"""Fields of a view: the kept tokens of one example."""


def key_of(row: Mapping[str, Any]) -> Key:
    """Which example of which cell a row is."""
    return GridCell(**{name: row[name] for name in GridCell._fields if name in row}), row["id"]


def read_rows(path: Path, fields: Fields = ANSWERED) -> Iterator[dict[str, Any]]:
    """The rows of a file without a torn last line; each has at least `fields`.

    Raises ValueError, naming the line and the field, for anything else.
    """
    if not path.is_file():
        return
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):  # what follows the last line break is torn
        if not line:
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        if (problem := _misfit(row, fields)) is not None:
            raise ValueError(f"{path}, line {number}: not a row of an evaluation ({problem})")
        yield row


def _misfit(row: Any, fields: Fields) -> str | None:
    if not isinstance(row, dict):
        return f"expected a JSON object, got {type(row).__name__}"
    for name, kinds in fields.items():
        if name not in row:
            if name in GridCell._field_defaults:
                continue
            return f"it has no field {name!r}"
        if type(row[name]) not in kinds:
            names = " or ".join("null" if kind is _NONE else kind.__name__ for kind in kinds)
            return f"{name!r} must be {names}, got {json.dumps(row[name])[:40]}"
    return None


class RowFile:
    """A file of rows, open for appending; a torn last line is cut off first.

    No other process may write it meanwhile: the run locks its folder.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab+")
        self._file.seek(0)
        content = self._file.read()
        self._file.truncate(content.rfind(b"\n") + 1)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes all rows at once; they are on the disk when this returns."""
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        self._file.write(text.encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
