"""knorm: keeps the smallest keys, which attract attention (arXiv 2406.11430)."""

import dataclasses

import jax
import jax.numpy as jnp

from lookahead_jax.policies.base import CutByEntries, Policy
from lookahead_jax.policies.view import LayerView


@dataclasses.dataclass(frozen=True, kw_only=True)
class KNorm(Policy):
    """Keeps the entries with the smallest keys.

    Scores are minus the L2 norm of the key, which RoPE does not change, rounded to 14 bits: entries
    of one token in the first layer are then equal, and the earlier one is kept.
    """

    @property
    def decode_cut(self) -> CutByEntries:
        return CutByEntries()

    def score(self, view: LayerView) -> jax.Array:
        norm = jnp.linalg.norm(view.k.astype(jnp.float32), axis=-1)
        # Else the last bits of products would choose among them, which depend on the block's size.
        return -jax.lax.reduce_precision(norm, exponent_bits=8, mantissa_bits=14)
