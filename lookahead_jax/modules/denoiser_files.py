"""Files of the denoiser's head: one safetensors file, whose metadata describe it."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec

from lookahead_jax.host.files import atomic_write
from lookahead_jax.model.fingerprint import fingerprint
from lookahead_jax.model.params import Params
from lookahead_jax.model.sharding import mesh_of
from lookahead_jax.modules.denoiser import DenoiserHead, HeadConfig, init_head

_KEY = "denoiser"  # of the metadata
_VOCABULARY = "vocabulary"
_FORMAT = 1
_WRITE = "write one with lookahead train denoiser"


def save_head(path: str | os.PathLike, head: DenoiserHead, *, params: Params) -> None:
    """Writes the head for the base model `params` as float32, atomically.

    The metadata hold its sizes and the fingerprints of the base model.
    """
    about = {
        "format": _FORMAT,
        **dataclasses.asdict(head.config),
        "base_fingerprint": fingerprint(params),
        "base_fingerprint_float16": fingerprint(params, through=np.float16),
    }
    tensors = {name: np.asarray(a, np.float32) for name, a in _named(head.params).items()}
    if head.vocabulary is not None:
        tensors[_VOCABULARY] = np.asarray(head.vocabulary)
    # One entry: those of several are written in a random order, and the file should not differ.
    atomic_write(path, safetensors.numpy.save(tensors, {_KEY: json.dumps(about)}))


def load_head(path: str | os.PathLike, *, params: Params) -> DenoiserHead:
    """The head in a file, for the base model `params`, in its type and on its devices.

    Raises FileNotFoundError without the file, and ValueError if it holds no head, or one of
    another base model, or values that are NaN or infinite.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist: {_WRITE}")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            about = json.loads((file.metadata() or {}).get(_KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    config = _config(path, about)
    dtype = params["final_norm"].dtype
    base = about[f"base_fingerprint{'_float16' if dtype == jnp.float16 else ''}"]
    if base != fingerprint(params):
        raise ValueError(
            f"{path}: this head was trained for another base model ({base[:12]}, this one is "
            f"{fingerprint(params)[:12]}); {_WRITE}"
        )
    like = jax.eval_shape(
        lambda: init_head(jax.random.key(0), config, params["final_norm"].shape[0])
    )
    expected = _named(like)
    shapes = {name: a.shape for name, a in expected.items()}
    if config.vocabulary is not None:
        shapes[_VOCABULARY] = (config.vocabulary,)
    if {name: a.shape for name, a in tensors.items()} != shapes:
        raise ValueError(f"{path}: its tensors are not those of a head of {config}")
    for name, values in tensors.items():
        if not np.isfinite(values).all():
            raise ValueError(f"{path}: {name} holds values that are NaN or infinite; {_WRITE}")
    leaves = [jnp.asarray(tensors[name], dtype) for name in expected]
    ids = tensors.get(_VOCABULARY)
    head = DenoiserHead(
        params=jax.tree.unflatten(jax.tree.structure(like), leaves),
        vocabulary=None if ids is None else jnp.asarray(ids, jnp.int32),
        config=config,
    )
    mesh = mesh_of(params)
    return head if mesh is None else jax.device_put(head, NamedSharding(mesh, PartitionSpec()))


def _named(params: Params) -> dict[str, Any]:
    """The leaves by name, such as layers.q, in the order of the tree."""
    return {
        ".".join(entry.key for entry in path): leaf
        for path, leaf in jax.tree.leaves_with_path(params)
    }


def _config(path: str | os.PathLike, about: Any) -> HeadConfig:
    """The checked sizes in the metadata."""
    names = [field.name for field in dataclasses.fields(HeadConfig)]
    prints = ("base_fingerprint", "base_fingerprint_float16")
    if not isinstance(about, dict) or not all(isinstance(about.get(n), str) for n in prints):
        raise ValueError(f"{path} does not describe the head of a denoiser: {_WRITE}")
    if about.get("format") != _FORMAT:
        raise ValueError(f"{path}: format {about.get('format')!r} is unknown; known: {_FORMAT}")
    sizes: dict[str, Any] = {name: about.get(name) for name in names}
    try:
        return HeadConfig(**sizes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
