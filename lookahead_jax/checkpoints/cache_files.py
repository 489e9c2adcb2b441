"""A cache on disk: one safetensors file, so that a long document is read and compressed once."""

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lookahead_jax.host.files import atomic_path
from lookahead_jax.host.warn import warn
from lookahead_jax.model.cache import KVCache
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.fingerprint import fingerprint as fingerprint_of
from lookahead_jax.model.jit import check_not_donated
from lookahead_jax.model.params import Params

_FORMAT = "lookahead_jax.kv_cache.2"
_WITHOUT_CHECKSUM = "lookahead_jax.kv_cache.1"
_SCALES = ("k_scale", "v_scale")  # of int8 caches
_FIELDS = tuple(f.name for f in dataclasses.fields(KVCache) if f.name not in (*_SCALES, "shared"))
_DTYPES = (jnp.float32, jnp.float16, jnp.bfloat16)


def save_cache(
    path: str | os.PathLike,
    cache: KVCache,
    *,
    fingerprint: str | None = None,
    params: Params | None = None,
) -> None:
    """Writes a cache to one file, whole or not at all.

    Keys and values mean nothing to another model, so the file names the one it was made with: by
    its `fingerprint` (model/fingerprint.py), or its `params`. Raises ValueError for a cache
    that was donated to another call, that has lost entries because its slots were full, or that
    branches from another.
    """
    check_not_donated("save_cache", cache)
    if cache.shared is not None:
        raise ValueError("save_cache: this cache branches from another one: save that one")
    if (lost := np.flatnonzero(np.asarray(cache.overflowed))).size:
        raise ValueError(
            f"save_cache: row {int(lost[0])} has lost entries because its {cache.slots} slots were "
            "full; read the prompt again with a larger slots or new_tokens"
        )
    fields = _FIELDS if cache.k_scale is None else (*_FIELDS, *_SCALES)
    arrays = {name: np.asarray(getattr(cache, name)) for name in fields}
    model = _fingerprint(fingerprint, params)
    metadata = {"format": _FORMAT, "model": model, "sha256": _digest(arrays, model)}
    with atomic_path(Path(path)) as temporary:
        save_file(arrays, temporary, metadata=metadata)


def load_cache(
    path: str | os.PathLike,
    *,
    fingerprint: str | None = None,
    params: Params | None = None,
    config: ModelConfig | None = None,
) -> KVCache:
    """Reads a cache written by `save_cache` for the same model.

    Args:
      path: the file.
      fingerprint: of the model (model/fingerprint.py); may be left out if params are given.
      params: of the model; the cache must have their dtype, or be int8.
      config: of the model; the cache must have its layers, KV heads and head size.

    Raises:
      ValueError: when the file is damaged, inconsistent, or made with another model. Files of
        version 1 have no checksum: they load with a warning.
    """
    expected = _fingerprint(fingerprint, params)
    metadata, arrays = _read(path)
    if metadata.get("model") != expected:
        raise ValueError(f"{path} was made with another model; read the prompt again")
    if metadata["format"] == _FORMAT:
        if metadata.get("sha256") != _digest(arrays, expected):
            raise ValueError(
                f"{path} is damaged: its checksum does not match; read the prompt again"
            )
    else:
        warn(
            f"{path} was written by an older version and has no checksum: damage goes unnoticed. "
            "Save it again with save_cache"
        )
    _check(path, arrays)
    _check_model(path, arrays["k"], params, config)
    fields: dict[str, Any] = {name: jnp.asarray(a) for name, a in arrays.items()}
    return KVCache(**fields)


def _fingerprint(fingerprint: str | None, params: Params | None) -> str:
    if fingerprint is None and params is None:
        raise ValueError("a cache belongs to a model: give fingerprint= or params=")
    own = fingerprint if params is None else fingerprint_of(params)
    if fingerprint not in (None, own):
        raise ValueError(f"fingerprint {fingerprint!r} is not that of params ({own!r})")
    return str(own)


def _read(path: str | os.PathLike) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Metadata and arrays of a cache file of a known format."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            known = metadata.get("format") == _FORMAT or (
                metadata.get("format") == _WITHOUT_CHECKSUM and "sha256" not in metadata
            )
            names = set(file.keys())
            if not known or names not in (set(_FIELDS), {*_FIELDS, *_SCALES}):
                raise ValueError(f"{path} is not a cache written by this library, or is damaged")
            return metadata, {name: file.get_tensor(name) for name in names}
    except (SafetensorError, TypeError, AttributeError) as error:  # unknown types of values
        raise ValueError(f"{path} is damaged: {error}") from error


def _digest(arrays: dict[str, np.ndarray], model: str) -> str:
    """SHA-256 of everything a cache file says."""
    digest = hashlib.sha256(model.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f" {name} {array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _check(path: str | os.PathLike, arrays: dict[str, np.ndarray]) -> None:
    """Raises ValueError unless shapes, types and counts fit together."""
    k, v, pos, length = (arrays[name] for name in ("k", "v", "pos", "length"))
    fits = k.ndim == 5 and v.shape == k.shape and v.dtype == k.dtype and pos.shape == k.shape[:4]
    fits = fits and length.shape == k.shape[:3]
    scales = [arrays[name] for name in _SCALES if name in arrays]
    fits = fits and (k.dtype == np.int8 if scales else k.dtype in _DTYPES)
    fits = fits and all(a.shape == pos.shape and a.dtype == np.float32 for a in scales)
    fits = fits and all(arrays[name].shape == k.shape[1:2] for name in ("next_pos", "rope_span"))
    counts = ("pos", "length", "next_pos", "rope_span")
    fits = fits and all(arrays[name].dtype == np.int32 for name in counts)
    if not fits:
        raise ValueError(f"{path} is damaged: its arrays do not fit together")
    filled = np.arange(k.shape[3]) < length[..., None]
    known = (pos >= 0) & (pos < arrays["next_pos"][:, None, None])
    within = (length >= 0) & (length <= k.shape[3])
    if not (within.all() and (np.where(filled, known, pos == -1)).all()):
        raise ValueError(f"{path} is damaged: its positions contradict its lengths")


def _check_model(
    path: str | os.PathLike, k: np.ndarray, params: Params | None, config: ModelConfig | None
) -> None:
    """Raises ValueError if the cache is not one of the model's."""
    if config is not None:
        layers, _, heads, _, size = k.shape
        expected = (config.num_layers, config.num_kv_heads, config.head_dim)
        if (layers, heads, size) != expected:
            raise ValueError(
                f"{path} has {layers} layers, {heads} KV heads of {size}, the model has "
                "{} layers, {} KV heads of {}; read the prompt again".format(*expected)
            )
    if params is not None and k.dtype not in (np.int8, params["embed"].dtype):
        raise ValueError(
            f"{path} holds {k.dtype}, the model {params['embed'].dtype}; load the model with "
            f"dtype={str(k.dtype)!r} or read the prompt again"
        )
