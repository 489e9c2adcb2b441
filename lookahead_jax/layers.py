"""Norms, projections and the MLP of a decoder layer, as functions of one layer's parameters."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lookahead_jax.config import ModelConfig

Params = dict[str, Any]
MAX_ROWS = 8192  # rows of a text whose MLP activations exist at once

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def rms_norm(x: jax.Array, weight: jax.Array, *, config: ModelConfig) -> jax.Array:
    """Root-mean-square norm over the last axis, computed in float32.

    Llama rounds to the activation dtype before it multiplies by the weight; Gemma multiplies by
    (1 + weight) in float32 and rounds once. Both orders are needed to match checkpoints in bf16.
    """
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + config.norm_eps)
    if config.norm_offset:
        scale = 1.0 + weight.astype(jnp.float32)
        return (normed * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)
    return normed.astype(x.dtype) * weight.reshape((1,) * (x.ndim - 1) + (-1,))


def product_of_rows(
    product: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    *,
    inputs: int = 1,
    cpu: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """`product(x)`, a matrix product with the rows of x, in the form that a lone row wants.

    Of x the last `inputs` axes are contracted and those before them are rows. A vector times a
    matrix makes XLA on GPUs convert the matrix to float32 in memory, or write out every single
    product; two equal rows read the matrix once. `cpu` is the form for CPUs, if they have one.
    """
    lead = x.ndim - inputs
    if math.prod(x.shape[:lead]) > 1:
        return product(x)

    def twice(x):
        return jax.lax.slice_in_dim(
            product(jnp.concatenate([x, x], axis=lead - 1)), 0, 1, axis=lead - 1
        )

    return jax.lax.platform_dependent(
        x, cpu=cpu or product, cuda=twice, rocm=twice, default=product
    )


def _product(x: jax.Array, weight: jax.Array, inputs: int) -> jax.Array:
    """Contracts the last `inputs` axes of x with the first ones of the weight."""

    def halves(x):
        # XLA on CPU gives one row times a matrix to one core, but a batch of two to two cores.
        parts = weight.reshape(2, -1, math.prod(weight.shape[inputs:]))
        y = jnp.einsum(
            "sk,skn->sn", x.reshape(2, -1), parts, preferred_element_type=jnp.float32
        ).sum(0)
        return y.astype(x.dtype).reshape(x.shape[: x.ndim - inputs] + weight.shape[inputs:])

    def whole(x):
        return jnp.tensordot(x, weight, axes=inputs)

    cpu = None if weight.shape[0] % 2 else halves
    return product_of_rows(whole, x, inputs=inputs, cpu=cpu)


def linear(
    p: Params,
    name: str,
    x: jax.Array,
    *,
    inputs: int = 1,
    lora: Params | None = None,
) -> jax.Array:
    """`x @ p[name] + bias`, contracting the last `inputs` axes of x; plus a low-rank update.

    `lora` holds {name: {"a": [in, R], "b": [R, out]}} with flattened inputs and outputs; names
    it does not hold are left alone. The update is added only to the rows of this call, which is
    how a LoRA acts on lookahead rows and on nothing else.
    """
    weight = p[name]
    y = _product(x, weight, inputs)
    if lora is not None and name in lora:
        a, b = lora[name]["a"].astype(x.dtype), lora[name]["b"].astype(x.dtype)
        flat = x.reshape(*x.shape[: x.ndim - inputs], -1)
        y = y + (flat @ a @ b).reshape(y.shape)
    bias = p.get(f"{name}_bias")
    if bias is not None:
        y = y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
    return y


def mlp(
    p: Params,
    x: jax.Array,
    *,
    config: ModelConfig,
    lora: Params | None = None,
) -> jax.Array:
    """Gated MLP: down(act(gate(x)) * up(x)); [B, P, D] -> [B, P, D]."""
    gate = linear(p, "gate", x, lora=lora)
    up = linear(p, "up", x, lora=lora)
    hidden = _ACTIVATIONS[config.activation](gate) * up
    return linear(p, "down", hidden, lora=lora)


def by_rows(f: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """`f` along axis 1 of x [B, P, D], MAX_ROWS at a time: it bounds f's temporaries.

    The results take x's place. The last part has what remains as well: less than twice as much.
    """
    parts = x.shape[1] // MAX_ROWS
    if parts < 2:
        return f(x)

    def step(i, x):
        part = jax.lax.dynamic_slice_in_dim(x, i * MAX_ROWS, MAX_ROWS, 1)
        return jax.lax.dynamic_update_slice_in_dim(x, f(part), i * MAX_ROWS, 1)

    first = (parts - 1) * MAX_ROWS
    x = jax.lax.fori_loop(0, parts - 1, step, x)
    return jax.lax.dynamic_update_slice_in_dim(x, f(x[:, first:]), first, 1)
