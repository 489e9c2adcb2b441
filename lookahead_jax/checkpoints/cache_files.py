"""A cache on disk: one safetensors file, so that a long document is read and compressed once."""

import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lookahead_jax.host.files import atomic_path
from lookahead_jax.model.cache import KVCache

_FORMAT = "lookahead_jax.kv_cache.1"
_FIELDS = ("k", "v", "pos", "length", "next_pos", "rope_span")


def save_cache(path: str | os.PathLike, cache: KVCache, *, fingerprint: str) -> None:
    """Writes a cache to one file, whole or not at all.

    `fingerprint` names the model it was made with (`params.fingerprint`); keys and values mean
    nothing to another one.
    """
    arrays = {name: np.asarray(getattr(cache, name)) for name in _FIELDS}
    with atomic_path(Path(path)) as temporary:
        save_file(arrays, temporary, metadata={"format": _FORMAT, "model": fingerprint})


def load_cache(path: str | os.PathLike, *, fingerprint: str) -> KVCache:
    """Reads a cache written by `save_cache` for the same model.

    Raises ValueError for a file that is damaged, inconsistent, or made with another model.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT or set(file.keys()) != set(_FIELDS):
                raise ValueError(f"{path} is not a cache written by this library")
            if metadata.get("model") != fingerprint:
                raise ValueError(f"{path} was made with another model; read the prompt again")
            arrays = {name: file.get_tensor(name) for name in _FIELDS}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    _check(path, arrays)
    return KVCache(**{name: jnp.asarray(a) for name, a in arrays.items()})


def _check(path: str | os.PathLike, arrays: dict[str, np.ndarray]) -> None:
    """Raises ValueError unless shapes, types and counts fit together."""
    k, v, pos, length = (arrays[name] for name in ("k", "v", "pos", "length"))
    fits = k.ndim == 5 and v.shape == k.shape and v.dtype == k.dtype and pos.shape == k.shape[:4]
    fits = fits and length.shape == k.shape[:3]
    fits = fits and all(arrays[name].shape == k.shape[1:2] for name in ("next_pos", "rope_span"))
    fits = fits and all(arrays[name].dtype == np.int32 for name in _FIELDS[2:])
    if not fits:
        raise ValueError(f"{path} is damaged: its arrays do not fit together")
    filled = np.arange(k.shape[3]) < length[..., None]
    known = (pos >= 0) & (pos < arrays["next_pos"][:, None, None])
    within = (length >= 0) & (length <= k.shape[3])
    if not (within.all() and (np.where(filled, known, pos == -1)).all()):
        raise ValueError(f"{path} is damaged: its positions contradict its lengths")
