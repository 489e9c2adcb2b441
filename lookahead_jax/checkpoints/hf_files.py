"""Reads files of a model directory that may be hostile: their names are checked first.

Files have plain names inside the directory. A symbolic link may not lead out of it, with one
exception: the Hugging Face cache keeps `<repo>/snapshots/<revision>/<name>` as a link to
`<repo>/blobs/<hash>`, which may be a link to `blobs/<2 digits>/<hash>` beside the repositories.
Exactly these shapes are followed. Nothing is unpickled or executed.
"""

import json
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 64 * 2**20


def is_plain_name(name: str) -> bool:
    """Whether a text names a file inside a folder, whichever folder that is."""
    return name not in ("", "..") and name == Path(name).name and not {"\0", "\\"} & set(name)


def find(directory: Path, name: str, *, limit: int | None = None) -> Path | None:
    """The file `name` of the directory, or None if there is none.

    Raises:
      ValueError: when the name or the link behind it leaves the directory, when it is not a
        regular file, or when it holds more than `limit` bytes.
    """
    if not is_plain_name(name):
        raise ValueError(f"{directory}: refused file name {name!r}, it is not a plain name")
    path = directory / name
    if not path.exists():
        if path.is_symlink():
            raise ValueError(f"{path}: broken link; download the file again")
        return None
    base, target = directory.resolve(), path.resolve()
    snapshots = [root for root in (base, base.parent) if root.parent.name == "snapshots"]
    in_cache = any(
        target.parent == root.parents[1] / "blobs"
        or target.parent == root.parents[1].parent / "blobs" / target.name[:2]
        for root in snapshots
    )
    if target.parent != base and not in_cache:
        raise ValueError(f"{path}: refused, the link leads out of the directory to {target}")
    if not path.is_file():
        raise ValueError(f"{path}: not a regular file")
    if limit is not None and path.stat().st_size > limit:
        raise ValueError(f"{path}: refused, larger than {limit} bytes")
    return path


def files_of_folder(
    directory: Path, folder: str, *, suffix: str, limit: int | None = None
) -> list[Path]:
    """The files with a suffix in a folder of the directory; none if there is no such folder.

    Raises:
      ValueError: as `find`, and when the folder is a link.
    """
    path = directory / folder
    if path.is_symlink():
        raise ValueError(f"{path}: refused, the folder is a link")
    if not path.is_dir():
        return []
    names = sorted(file.name for file in path.iterdir() if file.name.endswith(suffix))
    return [file for name in names if (file := find(path, name, limit=limit)) is not None]


def read_text(path: Path) -> str:
    """The text of a file; ValueError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from error


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
