"""Reads a model directory somebody else made: every file name and every header is checked first.

Files are plain names inside the directory. A symbolic link may not lead out of it, with one
exception: the Hugging Face cache keeps `<repo>/snapshots/<revision>/<name>` as a link to
`<repo>/blobs/<hash>`, and exactly that shape is followed. Nothing is unpickled or executed.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_JSON_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor's place and type, as the checked header of its file states them."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    """safetensors code: F32, BF16, ..."""


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


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint by name; opens all shards, reads headers only.

    Raises:
      FileNotFoundError: when there are no safetensors, or a shard is missing.
      ValueError: when a header is malformed, truncated or lying, or disagrees with the index.
    """
    if find(directory, SINGLE) is not None:
        return _read_header(directory, SINGLE)
    index = read_json(directory, INDEX)
    if index is None:
        raise FileNotFoundError(
            f"{directory}: has neither {SINGLE} nor {INDEX}; only safetensors are read, convert "
            "other formats (.bin, .pt, .gguf) first"
        )
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise ValueError(f"{directory / INDEX}: weight_map must map tensor names to file names")
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(weight_map.values())):
        shard = _read_header(directory, file)
        promised = {name for name, its_file in weight_map.items() if its_file == file}
        if differing := sorted(promised ^ shard.keys()):
            raise ValueError(
                f"{directory / file}: tensors differ from {INDEX}: {listing(differing)}; "
                "index and shards must come from one download"
            )
        tensors |= shard
    return tensors


def listing(names: list[str], shown: int = 5) -> str:
    """The first names and a count of the rest, for an error message."""
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest


def _read_header(directory: Path, name: str) -> dict[str, StoredTensor]:
    path = find(directory, name)
    if path is None:
        raise FileNotFoundError(f"{directory / name}: missing shard; download it again")
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {tensor: file.get_slice(tensor) for tensor in file.keys()}  # noqa: SIM118
            return {
                tensor: StoredTensor(path, tensor, tuple(s.get_shape()), s.get_dtype())
                for tensor, s in slices.items()
            }
    except SafetensorError as error:
        raise ValueError(
            f"{path}: not a complete safetensors file ({error}); download it again"
        ) from error
