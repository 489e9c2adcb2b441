"""drawn_model: children sampled from a draft model, accepted by their probability.

DySpec (Xiong et al. 2024, arXiv:2410.11744) in its threshold form. The value of a child's slot is
the probability of the path to its parent times the part of the parent's distribution that earlier
siblings have left. It is known before the token is drawn, as acceptance.accept_drawn requires.
B batch, P nodes, W nodes per level, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lookahead_jax.decoding.acceptance import DRAW
from lookahead_jax.decoding.device_drafter import Weights
from lookahead_jax.decoding.sampling import SamplingRows, keyed_noise
from lookahead_jax.decoding.tree import TokenTree, root_only
from lookahead_jax.drafters.draft_model import DraftCache, DraftModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawnModel(DraftModel):
    """A tree of the W most valuable slots per level, as long as their value is at least 1 / P.

    Greedy rows get the likeliest children instead of drawn ones.
    """

    def draw(
        self,
        weights: Weights,
        state: DraftCache,
        root: jax.Array,
        nodes: int,
        *,
        positions: jax.Array,
        sampling: SamplingRows,
    ) -> tuple[DraftCache, TokenTree, jax.Array]:
        """A tree below each row's `root` [B], whose positions are `positions` [B].

        Also returns the probabilities [B, P, V] that the children of each node were drawn from.
        """
        state = state.settled()
        cache, tree, batch = state.cache, root_only(root), len(root)
        depth = min(self.depth, nodes - 1)
        width = (nodes - 1) // depth
        warmth = jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)[:, None, None]
        value = jnp.ones((batch, 1), jnp.float32)  # probability of the paths to the newest level
        drawn = []
        for level in range(depth):
            newest = value.shape[1]
            chances = self._successors(weights, cache, tree, newest) / warmth
            q = jax.nn.softmax(jnp.where(jnp.isneginf(chances), -1e30, chances), axis=-1)
            drawn.append(q)
            noise = keyed_noise(
                lambda key, shape=q.shape[-1:]: jax.random.gumbel(key, shape),
                sampling.seed, jnp.broadcast_to(positions[:, None] + level, (batch, newest)), DRAW,
                distinct=True,
            )  # fmt: skip
            noise = jnp.where(sampling.temperature[:, None, None] > 0, noise, 0.0)
            # The first of the perturbed probabilities are draws without replacement, in order.
            _, token = jax.lax.top_k(jnp.log(q) + noise, width)
            chance = jnp.take_along_axis(q, token, axis=-1)
            left = 1.0 - (jnp.cumsum(chance, axis=-1) - chance)
            slot, at = jax.lax.top_k((value[..., None] * left).reshape(batch, -1), width)
            token = jnp.take_along_axis(token.reshape(batch, -1), at, axis=1)
            worth = slot >= 1.0 / nodes
            above = tree.tokens.shape[1] - newest + at // width
            paths = (value[..., None] * chance).reshape(batch, -1)
            value = jnp.where(worth, jnp.take_along_axis(paths, at, axis=1), 0.0)
            tree = TokenTree(
                jnp.concatenate([tree.tokens, jnp.where(worth, token, -1)], axis=1),
                jnp.concatenate([tree.parents, above.astype(jnp.int32)], axis=1),
            )
        spare = nodes - tree.tokens.shape[1]
        tree = jax.tree.map(lambda a: jnp.pad(a, [(0, 0), (0, spare)], constant_values=-1), tree)
        inner = jnp.concatenate(drawn, axis=1)  # nodes of the last level have no children
        return state, tree, jnp.pad(inner, [(0, 0), (0, nodes - inner.shape[1]), (0, 0)])
