"""streaming_llm: attention sinks and the most recent tokens (arXiv 2309.17453)."""

import dataclasses

import jax
import jax.numpy as jnp

from lookahead_jax.policies.base import CutByEntries, Policy, protected_share
from lookahead_jax.policies.view import LayerView


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamingLLM(Policy):
    """Keeps the first `sinks` tokens and the most recent ones.

    An entry's score is its position. Kept keys keep the RoPE phase of their original position (the
    original numbers them anew inside the cache). C sinks or more are reduced to C // 2.
    """

    sinks: int = 4
    """First prompt tokens, always kept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sinks < 0:
            raise ValueError(f"sinks={self.sinks} must not be negative")

    @property
    def decode_cut(self) -> CutByEntries:
        return CutByEntries()

    def score(self, view: LayerView) -> jax.Array:
        recency = jnp.maximum(view.pos, 0).astype(jnp.float32)
        return jnp.broadcast_to(recency, view.k.shape[:3])

    def protected(self, pos: jax.Array, length: jax.Array, budget: int) -> jax.Array:
        return (pos >= 0) & (pos < protected_share(self.sinks, budget))
