"""knorm: keeps the smallest keys, which attract attention (arXiv 2406.11430)."""

import dataclasses

import jax
import jax.numpy as jnp

from lookahead_jax.policies.base import CutByEntries, Policy
from lookahead_jax.policies.view import LayerView


@dataclasses.dataclass(frozen=True, kw_only=True)
class KNorm(Policy):
    """Keeps the entries with the smallest keys.

    Scores are minus the L2 norm of the key, which RoPE does not change.
    """

    @property
    def decode_cut(self) -> CutByEntries:
        return CutByEntries()

    def score(self, view: LayerView) -> jax.Array:
        return -jnp.linalg.norm(view.k.astype(jnp.float32), axis=-1)
