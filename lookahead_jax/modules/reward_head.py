"""The reward head: is the text so far right? Read from the model's own hidden state; its files.

One linear map, or two with a ReLU between them, and a sigmoid, on the last hidden state of the
text's last token (Zhang et al. 2025, arXiv:2504.05419, who find that the linear map suffices for
most models). D model, W width of the inner layer.
"""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from lookahead_jax.checkpoints.load import Model
from lookahead_jax.model.params import Params
from lookahead_jax.modules.head_files import (
    HEAD_FILE,
    HeadKind,
    beside,
    checked_weights,
    read_head,
    write_head,
)

_KIND = HeadKind(
    name="reward head", key="reward_head", format=1, model="model",
    command="lookahead train reward",
)  # fmt: skip


@struct.dataclass
class RewardHead:
    """The weights, float32. Without an inner layer, `out` reads the hidden state."""

    inner: jax.Array | None  # [D, W]
    inner_bias: jax.Array | None  # [W]
    out: jax.Array  # [W], or [D]
    out_bias: jax.Array  # [1]

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states that it reads."""
        return len(self.out if self.inner is None else self.inner)


def init_reward_head(key: jax.Array, hidden_size: int, width: int) -> RewardHead:
    """A head that says 1/2 to everything; `width` 0 leaves the inner layer out."""
    bias = jnp.zeros(1)
    if width == 0:
        return RewardHead(None, None, jnp.zeros(hidden_size), bias)
    bound = hidden_size**-0.5
    inner = jax.random.uniform(key, (hidden_size, width), minval=-bound, maxval=bound)
    return RewardHead(inner, jnp.zeros(width), jnp.zeros(width), bias)


def reward_logits(head: RewardHead, hidden: Float[Array, "*B D"]) -> Float[Array, "*B"]:
    """Float32 log-odds that the texts are right whose last token has this hidden state."""
    x = hidden.astype(jnp.float32).reshape(-1, hidden.shape[-1])
    if head.inner is not None and head.inner_bias is not None:
        x = jax.nn.relu(x @ head.inner + head.inner_bias[None])
    return (x @ head.out + head.out_bias).reshape(hidden.shape[:-1])


def reward_head(path: str | os.PathLike, model: Model) -> RewardHead:
    """The reward head of `model` in a file, or in the folder of its run, for `lk.search(reward=)`.

    `lookahead train reward` writes one. Raises FileNotFoundError without the file, and ValueError
    if it was trained for another model, is damaged, or holds values that are NaN or infinite.
    """
    path = Path(path)
    path = path / HEAD_FILE if path.is_dir() else path
    return beside(load_reward_head(path, params=model.params), model.params)


def save_reward_head(path: str | os.PathLike, head: RewardHead, *, params: Params) -> None:
    """Writes the head for the model `params`, atomically."""
    tensors = {name: np.asarray(a) for name, a in vars(head).items() if a is not None}
    width = 0 if head.inner is None else head.inner.shape[1]
    write_head(path, _KIND, tensors, params=params, sizes={"width": width})


def load_reward_head(path: str | os.PathLike, *, params: Params) -> RewardHead:
    """The head in a file, for the model `params`; errors as those of `reward_head`."""
    about, tensors = read_head(path, _KIND, params=params)
    width, hidden_size = about.get("width"), params["final_norm"].shape[0]
    if not isinstance(width, int) or width < 0:
        raise ValueError(f"{path}: width {width!r} is no size; {_KIND.remedy}")
    like = jax.eval_shape(lambda: init_reward_head(jax.random.key(0), hidden_size, width))
    shapes = {name: a.shape for name, a in vars(like).items() if a is not None}
    weights = checked_weights(path, _KIND, tensors, shapes, np.float32)
    arrays = {name: jnp.asarray(a) for name, a in weights.items()}
    return RewardHead(
        arrays.get("inner"), arrays.get("inner_bias"), arrays["out"], arrays["out_bias"]
    )
