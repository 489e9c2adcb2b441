"""Masks over the vocabulary, applied to logits before anything else.

One bit per token: bit i % 32 of word i // 32. B batch, P nodes, V vocabulary, W words.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32


def allow_only(
    logits: Float[Array, "B P V"], allowed: UInt32[Array, "B P W"] | None
) -> Float[Array, "B P V"]:
    """The logits with -inf for tokens whose bit in `allowed` is 0; None: as they are."""
    if allowed is None:
        return logits
    places = jnp.arange(32, dtype=jnp.uint32)[None, None, None]
    bits = (allowed[..., None] >> places) & jnp.uint32(1)
    flags = bits.reshape(*allowed.shape[:-1], -1)[..., : logits.shape[-1]]
    return jnp.where(flags == 1, logits, -jnp.inf)
