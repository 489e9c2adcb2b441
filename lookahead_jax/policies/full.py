"""full: nothing is evicted. Every other policy is measured against it."""

import dataclasses

import jax
import jax.numpy as jnp

from lookahead_jax.model.config import ModelConfig
from lookahead_jax.policies.base import Policy
from lookahead_jax.policies.view import LayerView


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full(Policy):
    """Keeps every entry; the budget is ignored."""

    def score(self, view: LayerView) -> jax.Array:
        return jnp.zeros(view.k.shape[:3], jnp.float32)

    def layer_budgets(self, length: jax.Array, budget: int, config: ModelConfig) -> jax.Array:
        return jnp.broadcast_to(length[None], (config.num_layers, *length.shape))

    def max_entries(self, tokens: int, budget: int, config: ModelConfig) -> int:
        return tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole(Full):
    """Also keeps entries that have left a sliding window: the first of two passes.

    The next token cannot see them, but prompt rows that are read once more can.
    """

    def candidates(self, pos: jax.Array, length: jax.Array, window: jax.Array | None) -> jax.Array:
        return pos >= 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitted(Full):
    """Full, with slots for prompts of at most `longest` tokens instead of those of the padding.

    For callers that know the lengths: entries past the slots would be lost.
    """

    longest: int

    def max_entries(self, tokens: int, budget: int, config: ModelConfig) -> int:
        return min(tokens, self.longest)
