"""The acceptance head of SpecDec++ (Huang et al. 2024, arXiv:2405.19715), and its files.

A few residual blocks x + SiLU(W x + b) and a linear map to two classes, on a draft model's last
hidden state after it has read a token: was that token rejected or accepted? Names of tensors and
their orientation are those of the published heads.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from lookahead_jax.model.params import Params
from lookahead_jax.modules.head_files import HeadKind, checked_weights, read_head, write_head

_KIND = HeadKind(
    name="acceptance head", key="acceptance_head", format=1, model="draft model",
    command="lookahead train specdec",
)  # fmt: skip


@struct.dataclass
class AcceptanceHead:
    """The weights, float32."""

    blocks: jax.Array  # [n, D, D] x W
    block_biases: jax.Array  # [n, D]
    out: jax.Array  # [D, 2] rejected, accepted
    out_bias: jax.Array  # [2]


def init_acceptance_head(key: jax.Array, hidden_size: int, layers: int) -> AcceptanceHead:
    """A random head, drawn as torch draws linear layers. ValueError for less than one block."""
    if layers < 1:
        raise ValueError(f"layers={layers} must be at least 1")
    bound = hidden_size**-0.5

    def draw(key: jax.Array, *shape: int) -> jax.Array:
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

    a, b, c, d = jax.random.split(key, 4)
    return AcceptanceHead(
        draw(a, layers, hidden_size, hidden_size), draw(b, layers, hidden_size),
        draw(c, hidden_size, 2), draw(d, 2),
    )  # fmt: skip


def acceptance_logits(head: AcceptanceHead, hidden: Float[Array, "*B D"]) -> Float[Array, "*B 2"]:
    """Float32 logits that the token last read is rejected, and that it is accepted."""
    x = hidden.astype(jnp.float32).reshape(-1, hidden.shape[-1])
    for weight, bias in zip(head.blocks, head.block_biases, strict=True):
        x = x + jax.nn.silu(x @ weight + bias[None])
    return (x @ head.out + head.out_bias[None]).reshape(*hidden.shape[:-1], 2)


def save_acceptance_head(path: str | os.PathLike, head: AcceptanceHead, *, params: Params) -> None:
    """Writes the head for the draft model `params`, atomically."""
    head, tensors = jax.tree.map(np.asarray, head), {}
    for i, (weight, bias) in enumerate(zip(head.blocks, head.block_biases, strict=True)):
        tensors[f"model.{i}.linear.weight"] = weight.T
        tensors[f"model.{i}.linear.bias"] = bias
    tensors[f"model.{len(head.blocks)}.weight"] = head.out.T
    tensors[f"model.{len(head.blocks)}.bias"] = head.out_bias
    write_head(path, _KIND, tensors, params=params, sizes={"layers": len(head.blocks)})


def load_acceptance_head(path: str | os.PathLike, *, params: Params) -> AcceptanceHead:
    """The head in a file, for the draft model `params`.

    Raises FileNotFoundError without the file, ValueError if it was written for another model, is
    damaged, or holds values that are NaN or infinite.
    """
    _, tensors = read_head(path, _KIND, params=params)
    layers, width = max((len(tensors) - 2) // 2, 1), params["final_norm"].shape[0]
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(layers):
        shapes[f"model.{i}.linear.weight"] = (width, width)
        shapes[f"model.{i}.linear.bias"] = (width,)
    shapes |= {f"model.{layers}.weight": (2, width), f"model.{layers}.bias": (2,)}
    weights = checked_weights(path, _KIND, tensors, shapes, np.float32)

    def stack(part: str) -> jax.Array:
        return jnp.asarray(np.stack([weights[f"model.{i}.linear.{part}"].T for i in range(layers)]))

    return AcceptanceHead(
        stack("weight"), stack("bias"), jnp.asarray(weights[f"model.{layers}.weight"].T),
        jnp.asarray(weights[f"model.{layers}.bias"]),
    )  # fmt: skip
