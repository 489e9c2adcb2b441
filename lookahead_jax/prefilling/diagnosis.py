"""Where NaN and infinity come from: the first part of a model with an output that is not finite.

Runs on the host after a run has met logits that are NaN or infinite, never before.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.decoder import embed, logits, scan_layers
from lookahead_jax.model.jit import program
from lookahead_jax.model.layer_attention import layer_kinds
from lookahead_jax.model.layers import rms_norm
from lookahead_jax.model.params import Params
from lookahead_jax.model.quantization import QuantizedWeight, Weight
from lookahead_jax.prefilling.batching import pad_batch
from lookahead_jax.prefilling.layer_pass import layer_buffers, prompt_layer, prompt_layout


class NonFiniteError(ValueError):
    """A model computed logits that are NaN or infinite."""


class _Finite(NamedTuple):
    """Which outputs of a forward pass hold finite numbers only."""

    embedding: Bool[Array, ""]
    layers: Bool[Array, " L"]
    norm: Bool[Array, ""]
    head: Bool[Array, ""]


@program(static_argnames=("config",))
def _finite_outputs(params: Params, tokens: Int[Array, "B T"], *, config: ModelConfig) -> _Finite:
    tokens, prompt = prompt_layout(tokens, 0, None, config)
    valid = (tokens >= 0)[..., None]

    def finite(x: jax.Array) -> jax.Array:
        return (jnp.isfinite(x) | ~valid).all()

    x = embedded = embed(params, tokens, config=config)

    def step(carry, inputs):
        p, _, kind = inputs
        x, buffers = carry
        read = prompt_layer(p, x, buffers, prompt, kind, policy=None, config=config)
        return (read.x, read.buffers), finite(read.x)

    carry = (x, layer_buffers(prompt, x.dtype, config))
    (x, _), layers = scan_layers(step, carry, params["layers"], None, layer_kinds(config))
    x = rms_norm(x, params["final_norm"], config=config)
    last = jnp.take_along_axis(x, (prompt.length - 1)[:, None, None], axis=1)
    head = jnp.isfinite(logits(params, last, config=config)).all()
    return _Finite(finite(embedded), layers, finite(x), head)


def non_finite_error(
    params: Params, tokens: Sequence[int], name: str, *, config: ModelConfig
) -> NonFiniteError:
    """The error for text `name` whose next-token logits are not finite; names the cause.

    Runs the model once more over `tokens`, without a cache, to find the first layer whose output
    is NaN or infinite, and the weights of that layer that are.
    """
    batch = jnp.asarray(pad_batch([tokens], config=config))
    found = jax.tree.map(np.asarray, _finite_outputs(params, batch, config=config))
    tied = config.tie_embeddings
    if not found.embedding:
        where, weights = "the token embedding", {"embed": params["embed"]}
    elif not found.layers.all():
        layer = int(np.argmin(found.layers))
        where, weights = f"layer {layer} of {config.num_layers}", _layer(params, layer)
    elif not found.norm:
        where, weights = "the final norm", {"final_norm": params["final_norm"]}
    elif not found.head:
        head = {"embed": params["embed"]} if tied else {"lm_head": params["lm_head"]}
        where, weights = "the output head", head
    else:
        return NonFiniteError(
            f"{name}: the logits after {len(tokens)} tokens are NaN or infinite, but a plain pass "
            "over these tokens is finite: the cache, the lookahead modules or the logits' "
            "processing caused it. Run with the policy full to narrow it down"
        )
    bad = [key for key, w in weights.items() if not _all_finite(w)]
    cause = (
        f"its weights {', '.join(bad)} hold NaN or infinity: the checkpoint is damaged"
        if bad
        else f"its weights are finite, so {np.dtype(params['embed'].dtype).name} overflows: try "
        "dtype float32"
    )
    return NonFiniteError(
        f"{name}: the logits after {len(tokens)} tokens are NaN or infinite. The first output that "
        f"is not finite is that of {where}; {cause}"
    )


def _layer(params: Params, layer: int) -> Params:
    """The parameters of one layer, stacked or apart."""
    layers = params["layers"]
    if isinstance(layers, tuple):
        return layers[layer]
    return jax.tree.map(lambda a: a[layer], layers)


def _all_finite(weight: Weight) -> bool:
    """Whether no value of a weight, or no scale of one in int8, is NaN or infinite."""
    values = weight.scale if isinstance(weight, QuantizedWeight) else weight
    return bool(jnp.isfinite(values).all())
