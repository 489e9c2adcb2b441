"""Packed rows: those rows of a padded block that are used, side by side.

Norms, products and the MLP cost as much for a padding row as for any other, and do not know which
text a row belongs to. They run on the packed rows; attention runs on the padded block. B batch, P
rows of the block, N packed rows.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool

from lookahead_jax.model.layer_attention import Projections


@struct.dataclass
class Packing:
    """Where each row of a block [B, P] is among N packed rows, and the reverse."""

    rows: jax.Array  # [N] int32 index of a packed row in the flattened block; spare ones repeat 0
    places: jax.Array  # [B, P] int32 index among the packed rows; N: left out

    def pack(self, block: jax.Array, axis: int = 0) -> jax.Array:
        """[..., B, P, ...] -> [..., 1, N, ...]; `axis` is that of B."""
        shape = block.shape
        flat = block.reshape(*shape[:axis], -1, *shape[axis + 2 :])
        return jnp.expand_dims(jnp.take(flat, self.rows, axis=axis, mode="clip"), axis)

    def unpack(self, packed: jax.Array) -> jax.Array:
        """[1, N, ...] -> [B, P, ...]; zeros in rows that were left out."""
        return packed[0].at[self.places].get(mode="fill", fill_value=0)

    def unpacked(self, proj: Projections) -> Projections:
        """Projections of the packed rows as those of the block."""

        def by_head(a: jax.Array) -> jax.Array:  # [1, K, N, H] -> [B, K, P, H]
            return self.unpack(a.swapaxes(1, 2)).swapaxes(1, 2)

        return proj._replace(
            q=self.unpack(proj.q),
            k=by_head(proj.k),
            v=by_head(proj.v),
            q_unrotated=self.unpack(proj.q_unrotated),
        )


def packing_of(used: Bool[Array, "B P"], total: int) -> Packing:
    """A packing of the used rows of a block, of which there are at most `total`."""
    flat = used.reshape(-1)
    rows = jnp.nonzero(flat, size=total, fill_value=0)[0].astype(jnp.int32)
    places = jnp.where(flat, jnp.cumsum(flat, dtype=jnp.int32) - 1, total)
    return Packing(rows, places.reshape(used.shape))
