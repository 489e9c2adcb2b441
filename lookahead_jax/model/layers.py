"""Norms, projections and the MLP of a decoder layer, as functions of one layer's parameters."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from lookahead_jax.kernels.few_rows_cpu import multiply_few_rows, takes
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.params import Params
from lookahead_jax.model.quantization import QuantizedWeight, Weight, multiply

MAX_ROWS = 8192  # rows of a text per MLP call; the last call may have up to twice as many

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def rms_norm(x: jax.Array, weight: jax.Array, *, config: ModelConfig) -> jax.Array:
    """Root-mean-square norm over the axes of the weight, x's last ones, computed in float32.

    Llama rounds to the activation dtype before it multiplies by the weight; Gemma multiplies in
    float32 and rounds once. Both orders are needed to match checkpoints in bf16.
    """
    x32, axes = x.astype(jnp.float32), tuple(range(-weight.ndim, 0))
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=axes, keepdims=True) + config.norm_eps)
    scale = 1.0 + weight.astype(jnp.float32) if config.norm_offset else weight
    scale = scale.reshape((1,) * (x.ndim - weight.ndim) + weight.shape)
    if config.norm_rounds_last:
        return (normed * scale.astype(jnp.float32)).astype(x.dtype)
    return normed.astype(x.dtype) * scale.astype(x.dtype)


def optional_norm(p: Params, name: str, x: jax.Array, *, config: ModelConfig) -> jax.Array:
    """`rms_norm` with the weight of that name; x itself if the family has no such norm."""
    return rms_norm(x, p[name], config=config) if name in p else x


def add_residual(x: jax.Array, out: jax.Array, *, config: ModelConfig) -> jax.Array:
    """The residual stream plus the output of attention or MLP, times the family's factor."""
    if config.residual_scale is not None:
        out = (out.astype(jnp.float32) * config.residual_scale).astype(x.dtype)
    return x + out


def product_of_rows(
    product: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    *,
    inputs: int = 1,
    cpu: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """`product(x)`, a matrix product with the rows of x, in a fast form if there are few rows.

    The last `inputs` axes of x are contracted; the axes before them are rows. For a vector times a
    matrix, XLA on GPUs converts the matrix to float32 in memory, or writes out every product. With
    two equal rows it reads the matrix once. `cpu` replaces `product` on CPUs.
    """
    lead = x.ndim - inputs

    def twice(x):
        return jax.lax.slice_in_dim(
            product(jnp.concatenate([x, x], axis=lead - 1)), 0, 1, axis=lead - 1
        )

    gpu = twice if math.prod(x.shape[:lead]) == 1 else product
    if gpu is product and cpu is None:
        return product(x)
    return jax.lax.platform_dependent(x, cpu=cpu or product, cuda=gpu, rocm=gpu, default=product)


def few_rows_form(
    x: jax.Array, weight: Weight, *, inputs: int = 1, transposed: bool = False
) -> Callable[[jax.Array], jax.Array] | None:
    """The product of a few rows with a weight on CPUs, in float32; None where it does not apply.

    It contracts the last `inputs` axes of x with the first axes of the weight, or the last axis of
    x with that of a table [V, D] if `transposed`.
    """
    matrix = weight.values if isinstance(weight, QuantizedWeight) else weight
    lead = x.ndim - inputs
    rows = math.prod(x.shape[:lead])
    outputs = matrix.shape[:1] if transposed else matrix.shape[inputs:]
    if not transposed:
        matrix = matrix.reshape(math.prod(matrix.shape[:inputs]), -1)
    if not takes(rows, x, matrix, transposed=transposed):
        return None

    def product(x):
        y = multiply_few_rows(x.reshape(rows, -1).astype(jnp.float32), matrix, transposed)
        y = y.reshape(x.shape[:lead] + outputs)
        if isinstance(weight, QuantizedWeight):
            y = y * weight.scale.reshape((1,) * lead + outputs)
        return y

    return product


def _product(x: jax.Array, weight: Weight, inputs: int) -> jax.Array:
    """Contracts the last `inputs` axes of x with the first ones of the weight."""

    def whole(x):
        if isinstance(weight, QuantizedWeight):
            axes = (tuple(range(x.ndim - inputs, x.ndim)), tuple(range(inputs)))
            return multiply(x, weight, axes).astype(x.dtype)
        return jnp.tensordot(x, weight, axes=inputs)

    forms = few_rows_form, _halves, _in_float32
    cpu = next(filter(None, (form(x, weight, inputs=inputs) for form in forms)), None)
    rounded = None if cpu is None else lambda x: cpu(x).astype(x.dtype)
    return product_of_rows(whole, x, inputs=inputs, cpu=rounded)


def _in_float32(
    x: jax.Array, weight: Weight, *, inputs: int
) -> Callable[[jax.Array], jax.Array] | None:
    """The product of many rows of 16-bit floats on CPUs; None where it does not apply.

    XLA on CPU uses the processor's matrix units for 16-bit inputs only if the result is float32.
    """
    if isinstance(weight, QuantizedWeight) or not x.dtype == weight.dtype != jnp.float32:
        return None

    def product(x):
        axes = (tuple(range(x.ndim - inputs, x.ndim)), tuple(range(inputs)))
        dims = (axes, ((), ()))
        return jax.lax.dot_general(x, weight, dims, preferred_element_type=jnp.float32)

    return product


def _halves(
    x: jax.Array, weight: Weight, *, inputs: int
) -> Callable[[jax.Array], jax.Array] | None:
    """The product of one row with floats on CPUs; None where it does not apply.

    XLA on CPU runs one row times a matrix on one core, but a batch of two on two cores.
    """
    rows = x.shape[: x.ndim - inputs]
    if isinstance(weight, QuantizedWeight) or math.prod(rows) != 1 or weight.shape[0] % 2:
        return None

    def product(x):
        parts = weight.reshape(2, -1, math.prod(weight.shape[inputs:]))
        y = jnp.einsum(
            "sk,skn->sn", x.reshape(2, -1), parts, preferred_element_type=jnp.float32
        ).sum(0)
        return y.reshape(rows + weight.shape[inputs:])

    return product


def linear(
    p: Params, name: str, x: jax.Array, *, inputs: int = 1, lora: Params | None = None
) -> jax.Array:
    """`linears` of one array."""
    return linears(p, name, [x], [lora], inputs=inputs)[0]


def linears(
    p: Params,
    name: str,
    xs: Sequence[jax.Array],
    loras: Sequence[Params | None],
    *,
    inputs: int = 1,
) -> list[jax.Array]:
    """`x @ p[name] + bias`, contracting the last `inputs` axes of each x, plus its low-rank update.

    The arrays differ in their second axis only and share one product, so the weight is read once.
    A LoRA holds {name: {"a": [in, R], "b": [R, out]}} with flattened inputs and outputs; other
    names get no update. Each LoRA applies only to the rows of its own array, so that of the
    lookahead rows changes nothing else.
    """
    y = _product(xs[0] if len(xs) == 1 else jnp.concatenate(xs, axis=1), p[name], inputs)
    bias, first, outputs = p.get(f"{name}_bias"), 0, []
    for x, lora in zip(xs, loras, strict=True):
        part = y if len(xs) == 1 else jax.lax.slice_in_dim(y, first, first + x.shape[1], axis=1)
        first += x.shape[1]
        if lora is not None and name in lora:
            a, b = lora[name]["a"].astype(x.dtype), lora[name]["b"].astype(x.dtype)
            flat = x.reshape(*x.shape[: x.ndim - inputs], -1)
            part = part + (flat @ a @ b).reshape(part.shape)
        if bias is not None:
            part = part + bias.reshape((1,) * (part.ndim - bias.ndim) + bias.shape)
        outputs.append(part)
    return outputs


def mlp(
    p: Params,
    xs: Sequence[jax.Array],
    loras: Sequence[Params | None],
    *,
    config: ModelConfig,
) -> list[jax.Array]:
    """Gated MLP: down(act(gate(x)) * up(x)) of each [B, P, D]."""
    gates, ups = (linears(p, name, xs, loras) for name in ("gate", "up"))
    hidden = [gated(gate, up, config=config) for gate, up in zip(gates, ups, strict=True)]
    return linears(p, "down", hidden, loras)


def gated(gate: jax.Array, up: jax.Array, *, config: ModelConfig) -> jax.Array:
    """The hidden units of a gated MLP; `ExpertsConfig.clamp` describes the clamped one."""
    if config.experts is not None and config.experts.clamp is not None:
        alpha, limit = config.experts.clamp
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return gate * jax.nn.sigmoid(alpha * gate) * (up + 1.0)
    return _ACTIVATIONS[config.activation](gate) * up


def by_rows(
    f: Callable[[Sequence[jax.Array]], Sequence[jax.Array]], xs: Sequence[jax.Array]
) -> list[jax.Array]:
    """`f` along axis 1 of the first array [B, P, D], MAX_ROWS at a time, to bound f's temporaries.

    The results replace the array's rows. The last part includes the remainder, so it has less than
    twice as many rows. The other arrays have few rows and join the last part.
    """
    x, *others = xs
    parts = x.shape[1] // MAX_ROWS
    if parts < 2:
        return list(f(xs))

    def step(i, x):
        part = jax.lax.dynamic_slice_in_dim(x, i * MAX_ROWS, MAX_ROWS, 1)
        return jax.lax.dynamic_update_slice_in_dim(x, f([part])[0], i * MAX_ROWS, 1)

    first = (parts - 1) * MAX_ROWS
    x = jax.lax.fori_loop(0, parts - 1, step, x)
    last, *others = f([x[:, first:], *others])
    return [jax.lax.dynamic_update_slice_in_dim(x, last, first, 1), *others]
