"""The acceptance head of SpecDec++ (Huang et al. 2024, arXiv:2405.19715), and its files.

A few residual blocks x + SiLU(W x + b) and a linear map to two classes, on a draft model's last
hidden state after it has read a token: was that token rejected or accepted? Names of tensors and
their orientation are those of the published heads.
"""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import struct
from jaxtyping import Array, Float

from lookahead_jax.host.files import atomic_write
from lookahead_jax.model.fingerprint import fingerprint
from lookahead_jax.model.params import Params

_BASE = "draft_fingerprint"  # of the model whose hidden states the head reads
_BASE_FLOAT16 = "draft_fingerprint_float16"


@struct.dataclass
class AcceptanceHead:
    """The weights, float32."""

    blocks: jax.Array  # [n, D, D] x W
    block_biases: jax.Array  # [n, D]
    out: jax.Array  # [D, 2] rejected, accepted
    out_bias: jax.Array  # [2]


def init_head(key: jax.Array, hidden_size: int, layers: int) -> AcceptanceHead:
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


def save_head(path: str | os.PathLike, head: AcceptanceHead, *, params: Params) -> None:
    """Writes the head for the draft model `params`; the file is replaced atomically."""
    head, tensors = jax.tree.map(np.asarray, head), {}
    for i, (weight, bias) in enumerate(zip(head.blocks, head.block_biases, strict=True)):
        tensors[f"model.{i}.linear.weight"] = weight.T
        tensors[f"model.{i}.linear.bias"] = bias
    tensors[f"model.{len(head.blocks)}.weight"] = head.out.T
    tensors[f"model.{len(head.blocks)}.bias"] = head.out_bias
    contiguous = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    about = {
        "format": "pt",
        _BASE: fingerprint(params),
        _BASE_FLOAT16: fingerprint(params, through=np.float16),
    }
    atomic_write(path, safetensors.numpy.save(contiguous, about))


def load_head(path: str | os.PathLike, *, params: Params) -> AcceptanceHead:
    """The head in a file, for the draft model `params`.

    Raises FileNotFoundError without the file, ValueError if it was written for another model, is
    damaged, or holds values that are NaN or infinite.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist: write it with lookahead train specdec")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    half = params["embed"].dtype == jnp.float16
    base = about.get(_BASE_FLOAT16 if half else _BASE)
    if base is None:
        raise ValueError(f"{path} is no acceptance head of lookahead train specdec")
    if base != fingerprint(params):
        raise ValueError(
            f"{path}: this acceptance head was trained for another draft model ({base[:12]}, this "
            f"one is {fingerprint(params)[:12]})"
        )
    layers, width = (len(tensors) - 2) // 2, params["final_norm"].shape[0]
    shapes = {f"model.{layers}.weight": (2, width), f"model.{layers}.bias": (2,)}
    for i in range(layers):
        shapes[f"model.{i}.linear.weight"] = (width, width)
        shapes[f"model.{i}.linear.bias"] = (width,)
    if layers < 1 or {name: a.shape for name, a in tensors.items()} != shapes:
        raise ValueError(
            f"{path}: the tensors are not those of an acceptance head of width {width}"
        )
    if not all(np.isfinite(a).all() for a in tensors.values()):
        raise ValueError(f"{path} holds values that are NaN or infinite: train the head again")

    def stack(part: str) -> np.ndarray:
        return np.stack([tensors[f"model.{i}.linear.{part}"].T for i in range(layers)])

    return AcceptanceHead(
        *(
            jnp.asarray(a, jnp.float32)
            for a in (
                stack("weight"), stack("bias"), tensors[f"model.{layers}.weight"].T,
                tensors[f"model.{layers}.bias"],
            )
        )
    )  # fmt: skip
