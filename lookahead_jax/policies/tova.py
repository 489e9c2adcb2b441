"""tova: the last prompt query decides for all heads of a layer (arXiv 2401.06104)."""

import dataclasses

import jax
import jax.numpy as jnp

from lookahead_jax.policies.base import Policy
from lookahead_jax.policies.view import LayerView


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tova(Policy):
    """Keeps what the last prompt query attends to, the same entries in all heads of a layer.

    Scores are its attention, averaged over all N heads. The last token itself is always kept.
    """

    def window_rows(self, budget: int) -> int:
        return 1

    def score(self, view: LayerView) -> jax.Array:
        scores = view.attention_scores(reduce="mean", pool=None, group="mean")
        # Groups are equally large: the mean of their means is the mean over the N heads.
        return jnp.broadcast_to(scores.mean(1, keepdims=True), scores.shape)

    def protected(self, pos: jax.Array, length: jax.Array, budget: int) -> jax.Array:
        return pos >= length[:, None, None] - 1
