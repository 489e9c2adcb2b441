"""keydiff: keeps the keys that point away from the others (arXiv 2504.15364)."""

import dataclasses

import jax
import jax.numpy as jnp

from lookahead_jax.policies.base import CutByEntries, Policy
from lookahead_jax.policies.view import LayerView

_TINY = 1e-16  # below any squared norm that matters; keeps a zero key at a score of 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyDiff(Policy):
    """Keeps the keys that point away from the mean direction of all keys.

    Scores are minus the cosine between the two, after RoPE. One pass over the whole prompt, as in
    kvpress (the paper works block by block).
    """

    @property
    def decode_cut(self) -> CutByEntries:
        return CutByEntries()

    def score(self, view: LayerView) -> jax.Array:
        k = jnp.where((view.pos >= 0)[..., None], view.k, jnp.zeros((), view.k.dtype))
        direction = _unit(k.astype(jnp.float32))
        filled = jnp.maximum((view.pos >= 0).sum(-1), 1).astype(jnp.float32)
        mean = direction.sum(2) / filled[..., None]
        return -jnp.einsum("bksh,bkh->bks", direction, _unit(mean))


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), _TINY))
