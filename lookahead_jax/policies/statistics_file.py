"""Safetensors files with arrays that a policy needs and a command computes for a model."""

import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy


@functools.cache
def load_statistics(
    file: str, command: str, optional: tuple[str, ...] = (), **letters: str
) -> dict[str, np.ndarray]:
    """The tensors called as the keywords, float32, each with one dimension per letter of its value.

    Those in `optional` are there together, or none of them is.

    Raises FileNotFoundError without the file, ValueError if it does not hold them; both name
    `command`, which writes such files.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file} does not exist: write it with {command}")
    try:
        tensors = safetensors.numpy.load_file(file)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file: {error}") from error
    found = {}
    some = any(name in tensors for name in optional)
    for name, dimensions in letters.items():
        if name in optional and not some:
            continue
        tensor = tensors.get(name)
        if (
            tensor is None
            or tensor.ndim != len(dimensions)
            or not jnp.issubdtype(tensor.dtype, jnp.floating)
        ):
            wanted = f"{name} [{', '.join(dimensions)}]"
            raise ValueError(f"{file} has no tensor {wanted}: write it with {command}")
        found[name] = tensor.astype(np.float32)
        if not np.isfinite(found[name]).all():
            raise ValueError(f"{file}: {name} holds values that are NaN or infinite")
    return found


def check_shape(file: str, command: str, name: str, found: np.ndarray, expected: tuple) -> None:
    """Raises ValueError if a tensor of `file` has not the shape that the model needs."""
    if found.shape != expected:
        raise ValueError(
            f"{file}: {name} of {found.shape} is for another model; this one has {expected}: "
            f"compute it with {command}"
        )
