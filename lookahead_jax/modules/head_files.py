"""Files of drafters' heads: one safetensors file each, which describes the head and its model."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from lookahead_jax.host.files import atomic_write
from lookahead_jax.model.fingerprint import fingerprint
from lookahead_jax.model.params import Params
from lookahead_jax.model.sharding import mesh_of

HEAD_FILE = "head.safetensors"
"""In the folder of the run that trains a head."""
Head = TypeVar("Head")
_PRINT = "base_fingerprint"
_PRINT_FLOAT16 = "base_fingerprint_float16"  # of the model as float16


class HeadKind(NamedTuple):
    """How the files of one kind of head are told from others."""

    name: str  # such as "acceptance head"
    key: str  # of the metadata
    format: int
    model: str  # which it reads, such as "draft model"
    command: str  # that trains one

    @property
    def remedy(self) -> str:
        """What to do about a file that cannot be used."""
        return f"write one with {self.command}"


def write_head(
    path: str | os.PathLike,
    kind: HeadKind,
    tensors: Mapping[str, np.ndarray],
    *,
    params: Params,
    sizes: Mapping[str, Any],
) -> None:
    """Writes a head that reads the model `params`, atomically; equal heads make equal files.

    The metadata hold its `sizes`, which are JSON, and the fingerprints of the model.
    """
    about = {
        "format": kind.format,
        **sizes,
        _PRINT: fingerprint(params),
        _PRINT_FLOAT16: fingerprint(params, through=np.float16),
    }
    contiguous = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    # One entry: safetensors writes those of several in a random order.
    atomic_write(path, safetensors.numpy.save(contiguous, {kind.key: json.dumps(about)}))


def read_head(
    path: str | os.PathLike, kind: HeadKind, *, params: Params
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The description and the tensors in a file, which are still to be checked.

    Raises FileNotFoundError without the file, and ValueError if it holds no head of this kind, or
    one of another model.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist: {kind.remedy}")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            about = json.loads((file.metadata() or {}).get(kind.key, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    prints = (_PRINT, _PRINT_FLOAT16)
    if not isinstance(about, dict) or not all(isinstance(about.get(n), str) for n in prints):
        raise ValueError(f"{path} describes no {kind.name}: {kind.remedy}")
    if about.get("format") != kind.format:
        raise ValueError(f"{path}: format {about.get('format')!r} is unknown; known: {kind.format}")
    half, own = params["final_norm"].dtype == jnp.float16, fingerprint(params)
    if (base := about[_PRINT_FLOAT16 if half else _PRINT]) != own:
        raise ValueError(
            f"{path}: this {kind.name} was trained for another {kind.model} ({base[:12]}, this one "
            f"is {own[:12]}); {kind.remedy}"
        )
    return about, tensors


def checked_weights(
    path: str | os.PathLike,
    kind: HeadKind,
    tensors: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: DTypeLike,
) -> dict[str, np.ndarray]:
    """The tensors in `dtype`, in the order of `shapes`.

    Raises ValueError unless they are exactly those of `shapes`, and finite in `dtype`.
    """
    found = {name: a.shape for name, a in tensors.items() if a.dtype.kind == "f"}
    wrong = [name for name in {*shapes, *tensors} if found.get(name) != shapes.get(name)]
    if wrong:
        raise ValueError(
            f"{path}: {min(wrong)} is missing, unexpected or of another shape than in the "
            f"{kind.name} of this {kind.model}; {kind.remedy}"
        )
    cast = {}
    for name in shapes:
        with np.errstate(over="ignore"):
            cast[name] = tensors[name].astype(dtype)
        if not np.isfinite(cast[name]).all():
            raise ValueError(
                f"{path}: {name} holds values that are NaN, infinite or too large for "
                f"{jnp.dtype(dtype)}; {kind.remedy}"
            )
    return cast


def beside(head: Head, params: Params) -> Head:
    """The head, whole on every device of the mesh of the model `params`, if that has one."""
    mesh = mesh_of(params)
    return head if mesh is None else jax.device_put(head, NamedSharding(mesh, PartitionSpec()))
