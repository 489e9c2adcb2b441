"""The tensors of a model directory; every header is checked before a value is read."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from lookahead_jax.checkpoints.hf_files import find, listing, read_json
from lookahead_jax.checkpoints.source import StoredTensor, TensorReader, Tensors
from lookahead_jax.checkpoints.stored_layout import Index

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def safetensors_of(directory: Path, ignored: Callable[[str], bool]) -> Tensors:
    """The tensors of a directory: one safetensors file, or shards with an index.

    Opens all files and reads their headers. Index and shards may differ in `ignored` names.

    Raises:
      FileNotFoundError: when there are no safetensors, or a shard is missing.
      ValueError: when a header is malformed, truncated or lying, or disagrees with the index.
    """
    stored = _stored_tensors(directory, ignored)

    @contextlib.contextmanager
    def open_files() -> Iterator[TensorReader]:
        with contextlib.ExitStack() as stack:
            files = {
                file: stack.enter_context(safe_open(file, framework="numpy"))
                for file in sorted({tensor.file for tensor in stored.values()})
            }

            def read(tensor: StoredTensor, index: Index) -> np.ndarray:
                return files[tensor.file].get_slice(tensor.name)[index]

            yield read

    return Tensors(where=str(directory), stored=stored, open=open_files)


def weight_files(directory: Path) -> list[str]:
    """Names of the files that hold a directory's weights, by its index if it has one.

    Raises:
      ValueError: when the index is malformed.
    """
    weight_map = _weight_map(directory)
    return [SINGLE] if weight_map is None else sorted(set(weight_map.values()))


def _weight_map(directory: Path) -> dict[str, str] | None:
    """File name by tensor name, as the index says; None if there is no index."""
    index = read_json(directory, INDEX)
    if index is None:
        return None
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise ValueError(f"{directory / INDEX}: weight_map must map tensor names to file names")
    return weight_map


def _stored_tensors(directory: Path, ignored: Callable[[str], bool]) -> dict[str, StoredTensor]:
    if find(directory, SINGLE) is not None:
        return _read_header(directory, SINGLE)
    weight_map = _weight_map(directory)
    if weight_map is None:
        raise FileNotFoundError(
            f"{directory}: has neither {SINGLE} nor {INDEX}; only safetensors are read from "
            "a folder: convert .bin and .pt files first, and give the path of a .gguf file itself"
        )
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(weight_map.values())):
        shard = _read_header(directory, file)
        promised = {name for name, its_file in weight_map.items() if its_file == file}
        differing = sorted(name for name in promised ^ shard.keys() if not ignored(name))
        if differing:
            raise ValueError(
                f"{directory / file}: tensors differ from {INDEX}: {listing(differing)}; "
                "index and shards must come from one download"
            )
        tensors |= shard
    return tensors


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
