"""Reads files of a model directory that may be hostile: their names are checked first.

Files have plain names inside the directory. A symbolic link may not lead out of it, with one
exception: the Hugging Face cache keeps `<repo>/snapshots/<revision>/<name>` as a link to
`<repo>/blobs/<hash>`, and exactly that shape is followed. Nothing is unpickled or executed.
"""

import json
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 64 * 2**20


def find(directory: Path, name: str, *, limit: int | None = None) -> Path | None:
    """The file `name` of the directory, or None if there is none.

    Raises:
      ValueError: when the name or the link behind it leaves the directory, when it is not a
        regular file, or when it holds more than `limit` bytes.
    """
    if name in ("", "..") or name != Path(name).name or "\0" in name or "\\" in name:
        raise ValueError(f"{directory}: refused file name {name!r}, it is not a plain name")
    path = directory / name
    if not path.exists():
        if path.is_symlink():
            raise ValueError(f"{path}: broken link; download the file again")
        return None
    base, target = directory.resolve(), path.resolve()
    in_cache = base.parent.name == "snapshots" and target.parent == base.parents[1] / "blobs"
    if target.parent != base and not in_cache:
        raise ValueError(f"{path}: refused, the link leads out of the directory to {target}")
    if not path.is_file():
        raise ValueError(f"{path}: not a regular file")
    if limit is not None and path.stat().st_size > limit:
        raise ValueError(f"{path}: refused, larger than {limit} bytes")
    return path


def read_json(directory: Path, name: str) -> dict[str, Any] | None:
    """The object in a JSON file of the directory, or None if there is no such file.

    Raises:
      ValueError: as `find`, and when the content is not one JSON object.
    """
    path = find(directory, name, limit=MAX_JSON_BYTES)
    if path is None:
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def listing(names: list[str], shown: int = 5) -> str:
    """The first names and a count of the rest, for an error message."""
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest
