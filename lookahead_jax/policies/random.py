"""random: scores drawn from a seed. The floor that every other policy must beat."""

import dataclasses

import jax
import jax.numpy as jnp

from lookahead_jax.policies.base import Policy
from lookahead_jax.policies.view import LayerView


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random(Policy):
    """Keeps random entries, different in every layer and head.

    Scores are uniform in [0, 1). A score depends on (seed, layer, KV head, absolute position)
    alone, so a row keeps the same entries alone, in any batch and under any padding.
    """

    seed: int = 0
    """Seed of the scores, modulo 2**32."""

    def score(self, view: LayerView) -> jax.Array:
        batch, heads, tokens = view.k.shape[:3]
        layer = jax.random.fold_in(jax.random.key(self.seed % 2**32), view.layer)
        keys = jax.vmap(lambda head: jax.random.fold_in(layer, head))(jnp.arange(heads))

        def draw(key, positions):  # [T] -> [T]
            return jax.vmap(lambda p: jax.random.uniform(jax.random.fold_in(key, p)))(positions)

        pos = jnp.broadcast_to(view.pos, (batch, heads, tokens)).astype(jnp.uint32)
        return jax.vmap(jax.vmap(draw), (None, 0))(keys, pos)
