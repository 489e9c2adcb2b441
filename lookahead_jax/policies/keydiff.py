"""keydiff: keys that point away from the others (arXiv 2504.15364)."""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from lookahead_jax.policies.base import LayerView, Policy

_TINY = 1e-16  # below any squared norm that matters; keeps a zero key at a score of 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyDiff(Policy):
    """Minus the cosine between a key (after RoPE) and the mean direction of the row's keys.

    One pass over the whole prompt, as in kvpress (the paper works block by block).
    """

    decode_observers: ClassVar[Literal["nobody"]] = "nobody"

    def score(self, view: LayerView) -> jax.Array:
        k = jnp.where((view.pos >= 0)[..., None], view.k, jnp.zeros((), view.k.dtype))
        direction = _unit(k.astype(jnp.float32))
        filled = jnp.maximum((view.pos >= 0).sum(-1), 1).astype(jnp.float32)
        mean = direction.sum(2) / filled[..., None]
        return -jnp.einsum("bksh,bkh->bks", direction, _unit(mean))


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), _TINY))
