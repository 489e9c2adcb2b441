"""recycling: the target's likeliest successors from the last time it read a token.

Token Recycling (Luo et al. 2024, arXiv:2408.08696). V vocabulary, B batch, P nodes.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lookahead_jax.decoding.device_drafter import Verified, Weights
from lookahead_jax.decoding.tree import TokenTree
from lookahead_jax.drafters._template import template
from lookahead_jax.model.config import ModelConfig

CANDIDATES = 8  # per token, as in the paper


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recycling:
    """A tree of fixed shape, filled from a table of each token's eight likeliest successors.

    Every node that the target has read, accepted or not, updates the table's line of its token,
    from unprocessed logits. If a step holds a token several times, accepted nodes win over rejected
    ones, then later rows of the batch, then later nodes, so the result does not depend on the order
    of a scatter. The state is the table, int32 [V, 8], -1 where unknown. All rows share it, and it
    outlives their requests.
    """

    weights = None

    def init(self, batch: int, room: int, config: ModelConfig) -> jax.Array:
        return jnp.full((config.vocab_size, CANDIDATES), -1, jnp.int32)

    def begin(
        self, weights: Weights, state: jax.Array, rows: jax.Array, prompts: jax.Array
    ) -> jax.Array:
        return state

    def propose(
        self, weights: Weights, state: jax.Array, root: jax.Array, nodes: int
    ) -> tuple[jax.Array, TokenTree]:
        tree, tokens = template(nodes, CANDIDATES), root[:, None]
        for parents, ranks in tree.levels:
            above = tokens[:, parents]
            child = state[jnp.maximum(above, 0), ranks[None]]
            tokens = jnp.concatenate([tokens, jnp.where(above >= 0, child, -1)], axis=1)
        parents = jnp.broadcast_to(tree.parents[None], tokens.shape)
        return state, TokenTree(tokens[:, tree.place], parents)

    def update(self, weights: Weights, state: jax.Array, verified: Verified) -> jax.Array:
        tokens, width = verified.tree.tokens, verified.tree.tokens.shape[1]
        _, best = jax.lax.top_k(verified.logits, CANDIDATES)
        index = jnp.arange(width, dtype=jnp.int32)
        path, count = verified.accepted.path, verified.accepted.count
        on_path = (path[:, None] == index[None, :, None]) & (
            index[None, None] < count[:, None, None]
        )
        nodes = jnp.arange(tokens.size, dtype=jnp.int32)
        priority = nodes + jnp.where(on_path.any(-1).ravel(), tokens.size, 0)
        outside = state.shape[0]
        at = jnp.where(verified.layout.valid, tokens, outside).ravel()
        # The last of each token's nodes wins; sorting the nodes is faster than a pass over V.
        at, _, node = jax.lax.sort((at, priority, nodes), num_keys=2)
        wins = jnp.append(at[1:] != at[:-1], True)
        lines = best.reshape(-1, CANDIDATES)[node].astype(jnp.int32)
        return state.at[jnp.where(wins, at, outside)].set(lines, mode="drop")
