"""Files of the denoiser's head (modules/head_files.py)."""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lookahead_jax.model.params import Params
from lookahead_jax.modules.denoiser import (
    DenoiserHead,
    DenoiserHeadConfig,
    init_denoiser_head,
)
from lookahead_jax.modules.head_files import HeadKind, checked_weights, read_head, write_head

_KIND = HeadKind(
    name="head of the denoiser", key="denoiser", format=1, model="base model",
    command="lookahead train denoiser",
)  # fmt: skip
_VOCABULARY = "vocabulary"


def save_denoiser_head(path: str | os.PathLike, head: DenoiserHead, *, params: Params) -> None:
    """Writes the head for the base model `params` as float32, atomically."""
    tensors = {name: np.asarray(a, np.float32) for name, a in _named(head.params).items()}
    if head.vocabulary is not None:
        tensors[_VOCABULARY] = np.asarray(head.vocabulary)
    write_head(path, _KIND, tensors, params=params, sizes=dataclasses.asdict(head.config))


def load_denoiser_head(path: str | os.PathLike, *, params: Params) -> DenoiserHead:
    """The head in a file, for the base model `params`, in its type.

    Raises FileNotFoundError without the file, and ValueError if it holds no head, one of another
    base model, a vocabulary that is not one, or values that are NaN or infinite in that type.
    """
    about, tensors = read_head(path, _KIND, params=params)
    sizes: dict[str, Any] = {
        field.name: about.get(field.name) for field in dataclasses.fields(DenoiserHeadConfig)
    }
    try:
        config = DenoiserHeadConfig(**sizes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    ids = tensors.pop(_VOCABULARY, None)
    like = jax.eval_shape(
        lambda: init_denoiser_head(jax.random.key(0), config, params["final_norm"].shape[0])
    )
    shapes = {name: a.shape for name, a in _named(like).items()}
    weights = checked_weights(path, _KIND, tensors, shapes, params["final_norm"].dtype)
    leaves = [jnp.asarray(a) for a in weights.values()]
    if (ids is None) != (config.vocabulary is None):
        raise ValueError(f"{path}: its vocabulary is missing or unexpected; {_KIND.remedy}")
    if ids is not None:
        _check_vocabulary(path, ids, config.vocabulary, params["embed"].shape[0])
    return DenoiserHead(
        params=jax.tree.unflatten(jax.tree.structure(like), leaves),
        vocabulary=None if ids is None else jnp.asarray(ids, jnp.int32),
        config=config,
    )


def _check_vocabulary(
    path: str | os.PathLike, ids: np.ndarray, count: int | None, vocab_size: int
) -> None:
    """Raises ValueError unless these are `count` ascending tokens of the model."""
    known = ids.dtype.kind == "i" and ids.shape == (count,)
    if not known or not (np.diff(ids) > 0).all() or ids[0] < 0 or ids[-1] >= vocab_size:
        raise ValueError(
            f"{path}: its vocabulary is not {count} ascending token ids below {vocab_size}; "
            f"{_KIND.remedy}"
        )


def _named(params: Params) -> dict[str, Any]:
    """The leaves by name, such as layers.q, in the order of the tree."""
    return {
        ".".join(entry.key for entry in path): leaf
        for path, leaf in jax.tree.leaves_with_path(params)
    }
